"""TRL's DPOTrainer and SFTTrainer on the same tokens, with the flags that are fastest on a CPU.

usage: trl_trainer.py dpo|sft MODEL JOB.json JOB.jsonl --dtype f32-onednn|bf16 [--reference live|cached]
"""
import argparse, contextlib, json, os, tempfile, time
from common import load_job, load_model, report, use
from transformers import AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds and loss of every optimizer step."""

    def __init__(self):
        self.steps, self.start = [], None

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps.append(dict(seconds=time.perf_counter() - self.start))

    def on_log(self, _args, _state, _control, logs=None, **_kwargs):
        if "loss" in logs:
            self.steps[-1]["loss"] = logs["loss"]


def settings(a, job, folder, rows):
    """One record at a time pads least; nothing is recomputed; the learning rate is constant."""
    return dict(
        output_dir=folder, use_cpu=True, bf16=a.dtype == "bf16", gradient_checkpointing=False,
        per_device_train_batch_size=1, gradient_accumulation_steps=rows, max_steps=len(job["steps"]),
        learning_rate=job["learning_rate"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch_fused", max_length=None, logging_steps=1,
        train_sampling_strategy="sequential", logging_nan_inf_filter=False,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False)


def dpo_trainer(a, job, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    records = [json.loads(line) for line in open(a.data, encoding="utf-8")]
    config = DPOConfig(**settings(a, job, folder, len(job["steps"][0])), beta=job["beta"],
                       precompute_ref_log_probs=a.reference == "cached")
    return DPOTrainer, config, Dataset.from_list(records)


def sft_trainer(a, job, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = [dict(input_ids=row["ids"], assistant_masks=row["mask"]) for step in job["steps"] for row in step]
    config = SFTConfig(**settings(a, job, folder, len(job["steps"][0])))  # the masks choose what is trained
    return SFTTrainer, config, Dataset.from_list(rows)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("task", choices=("dpo", "sft"))
    options.add_argument("model")
    options.add_argument("job")
    options.add_argument("data")
    options.add_argument("--dtype", choices=("f32-onednn", "bf16"), required=True)
    options.add_argument("--reference", choices=("live", "cached"))
    run(options.parse_args())


def run(a):
    use(a.dtype)
    job, clock = load_job(a.job), Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer, config, data = (dpo_trainer if a.task == "dpo" else sft_trainer)(a, job, folder)

        tokenizer = AutoTokenizer.from_pretrained(a.model)
        trainer = Trainer(model=load_model(a.model), args=config, train_dataset=data, processing_class=tokenizer,
                          callbacks=[clock])
        with open(os.devnull, "w") as nowhere:  # the trainer prints its log; standard output is for one line
            with contextlib.redirect_stdout(nowhere):
                trainer.train()
    packages = ("torch", "transformers", "trl")
    if a.task == "dpo":
        report(job, f"trl {a.reference}", a.dtype, clock.steps, packages, pairs=len(job["steps"][0]))
    else:
        tokens = [sum(len(row["ids"]) for row in rows) for rows in job["steps"]]
        report(job, "trl", a.dtype, clock.steps, packages, tokens=tokens)


if __name__ == "__main__":
    main()
