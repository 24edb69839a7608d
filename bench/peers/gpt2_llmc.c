// One full training step of GPT-2 with llm.c's CPU code: forward, backward, clipping at norm 1, AdamW.
// usage: gpt2_llmc CHECKPOINT.bin TOKENS.bin LEARNING_RATE
// TOKENS.bin: three int32 (steps, rows, tokens of a row), then the tokens. Prints `seconds loss` of every step to stderr.

#define TESTING
#include "train_gpt2.c"

static void clip(GPT2 *model) {
    double squares = 0.0;
    #pragma omp parallel for reduction(+ : squares)
    for (size_t i = 0; i < model->num_parameters; i++) {
        squares += (double)model->grads_memory[i] * model->grads_memory[i];
    }
    if (squares <= 1.0) { return; }
    float scale = (float)(1.0 / sqrt(squares));
    #pragma omp parallel for
    for (size_t i = 0; i < model->num_parameters; i++) { model->grads_memory[i] *= scale; }
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "give three arguments: the checkpoint, the tokens and the learning rate\n");
        return 1;
    }
    FILE *file = fopenCheck(arguments[2], "rb");
    int shape[3];
    freadCheck(shape, sizeof(int), 3, file);
    int steps = shape[0], rows = shape[1], length = shape[2] - 1;
    int *row = malloc((length + 1) * sizeof(int));
    int *inputs = malloc(rows * length * sizeof(int)), *targets = malloc(rows * length * sizeof(int));
    GPT2 model;
    gpt2_build_from_checkpoint(&model, arguments[1]);
    for (int step = 1; step <= steps; step++) {
        for (int r = 0; r < rows; r++) {
            freadCheck(row, sizeof(int), length + 1, file);
            memcpy(inputs + r * length, row, length * sizeof(int));
            memcpy(targets + r * length, row + 1, length * sizeof(int));
        }
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        gpt2_forward(&model, inputs, targets, rows, length);
        float loss = model.mean_loss;
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        clip(&model);
        gpt2_update(&model, atof(arguments[3]), 0.9f, 0.999f, 1e-8f, 0.0f, step);
        clock_gettime(CLOCK_MONOTONIC, &end);
        fprintf(stderr, "%.9f %.9f\n", end.tv_sec - start.tv_sec + (end.tv_nsec - start.tv_nsec) * 1e-9, loss);
    }
    return 0;
}
