//! One full training step of GPT-2 124M in burn on its flex backend: forward, backward, clipping at norm 1, AdamW.

use std::collections::HashMap;
use std::time::Instant;

use bench_peers::{HEADS, Job, LAYERS, WIDTH, Weight, shifted};
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{gelu_approximate, log_softmax};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};

#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Block {
    ln_1: LayerNorm,
    c_attn: Linear,
    attn_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    mlp_proj: Linear,
}

#[derive(Module, Debug)]
struct Gpt2 {
    wte: Param<Tensor<2>>,
    wpe: Param<Tensor<2>>,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
}

/// Takes parameters out of the checkpoint.
struct Loader<'a> {
    weights: HashMap<String, Weight>,
    device: &'a Device,
}

impl Loader<'_> {
    fn take<const N: usize>(&mut self, name: String) -> Param<Tensor<N>> {
        let weight = self.weights.remove(&name).unwrap_or_else(|| panic!("the model has no tensor `{name}`"));
        Param::from_data(TensorData::new(weight.values, weight.shape), self.device)
    }

    fn linear(&mut self, name: &str) -> Linear {
        Linear { weight: self.take(format!("{name}.weight")), bias: self.take(format!("{name}.bias")) }
    }

    fn layer_norm(&mut self, name: &str) -> LayerNorm {
        let mut norm = LayerNormConfig::new(WIDTH).init(self.device);
        norm.gamma = self.take(format!("{name}.weight"));
        norm.beta = Some(self.take(format!("{name}.bias")));
        norm
    }

    fn block(&mut self, layer: usize) -> Block {
        let at = |part: &str| format!("transformer.h.{layer}.{part}");
        Block {
            ln_1: self.layer_norm(&at("ln_1")),
            c_attn: self.linear(&at("attn.c_attn")),
            attn_proj: self.linear(&at("attn.c_proj")),
            ln_2: self.layer_norm(&at("ln_2")),
            c_fc: self.linear(&at("mlp.c_fc")),
            mlp_proj: self.linear(&at("mlp.c_proj")),
        }
    }

    fn model(mut self) -> Gpt2 {
        Gpt2 {
            wte: self.take("transformer.wte.weight".into()),
            wpe: self.take("transformer.wpe.weight".into()),
            blocks: (0..LAYERS).map(|layer| self.block(layer)).collect(),
            ln_f: self.layer_norm("transformer.ln_f"),
        }
    }
}

impl Linear {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        burn::tensor::module::linear(x, self.weight.val(), Some(self.bias.val()))
    }
}

impl Block {
    fn forward(&self, x: Tensor<2>, rows: usize) -> Tensor<2> {
        let [tokens, _] = x.dims();
        let qkv = self.c_attn.forward(self.ln_1.forward(x.clone()));
        let heads = |part: usize| {
            qkv.clone()
                .narrow(1, part * WIDTH, WIDTH)
                .reshape([rows, tokens / rows, HEADS, WIDTH / HEADS])
                .swap_dims(1, 2)
        };
        let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
        let mixed = attention(heads(0), heads(1), heads(2), None, None, causal);
        let x = x + self.attn_proj.forward(mixed.swap_dims(1, 2).reshape([tokens, WIDTH]));
        let inner = gelu_approximate(self.c_fc.forward(self.ln_2.forward(x.clone())));
        x + self.mlp_proj.forward(inner)
    }
}

impl Gpt2 {
    fn loss(&self, inputs: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [rows, length] = inputs.dims();
        let tokens = rows * length;
        let positions = self.wpe.val().narrow(0, 0, length).unsqueeze::<3>();
        let embedded = burn::tensor::module::embedding(self.wte.val(), inputs) + positions;
        let x = self
            .blocks
            .iter()
            .fold(embedded.reshape([tokens, WIDTH]), |x, block| block.forward(x, rows));
        let logits = self.ln_f.forward(x).matmul(self.wte.val().transpose());
        log_softmax(logits, 1).gather(1, targets.reshape([tokens, 1])).mean().neg()
    }
}

/// Adds up the squares of all gradients.
struct Squares<'a> {
    gradients: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
        if let Some(gradient) = self.gradients.get::<N>(param.id) {
            self.sum += gradient.square().sum().into_scalar::<f32>() as f64;
        }
    }
}

/// Multiplies all gradients.
struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
        if let Some(gradient) = self.gradients.remove::<N>(param.id) {
            self.gradients.register(param.id, gradient.mul_scalar(self.factor));
        }
    }
}

/// Scales all gradients so that their common norm is at most 1. burn's own clipping looks at each tensor alone.
fn clip(gradients: &mut GradientsParams, model: &Gpt2) {
    let mut squares = Squares { gradients, sum: 0.0 };
    model.visit(&mut squares);
    let norm = squares.sum.sqrt();
    if norm > 1.0 {
        model.visit(&mut Scale { gradients, factor: 1.0 / norm });
    }
}

fn main() {
    let job = Job::from_command_line();
    let device = Device::flex().autodiff();
    let rows = job.steps[0].len();
    let length = job.steps[0][0].len() - 1;
    let mut model = Loader { weights: job.weights(), device: &device }.model();
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
    let ints = |values: Vec<u32>| {
        let values: Vec<i64> = values.into_iter().map(i64::from).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [rows, length]), &device)
    };
    let mut measured = Vec::new();
    for step in &job.steps {
        let start = Instant::now();
        let (inputs, targets) = shifted(step);
        let loss = model.loss(ints(inputs), ints(targets));
        let mut gradients = GradientsParams::from_grads(loss.backward(), &model);
        clip(&mut gradients, &model);
        model = optimizer.step(job.learning_rate, model, gradients);
        let loss = loss.into_scalar::<f32>() as f64;
        measured.push((start.elapsed().as_secs_f64(), loss));
    }
    job.report("burn-flex", "0.22.0", &measured);
}
