//! One full training step of GPT-2 124M in candle: forward, backward, clipping at norm 1, AdamW.
//!
//! candle's fused softmax and layer norm have no backward, so both are written out, with the maximum held constant.

use std::collections::HashMap;
use std::time::Instant;

use bench_peers::{HEADS, Job, LAYERS, WIDTH, shifted};
use candle_core::backprop::GradStore;
use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};

struct Model {
    variables: HashMap<String, Var>,
    /// 0 where a token may look, minus infinity where it may not.
    mask: Tensor,
}

impl Model {
    fn get(&self, name: &str) -> &Tensor {
        self.variables[name].as_tensor()
    }

    /// x · weight + bias; the file holds weights as `[in, out]`.
    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(self.get(&format!("{name}.weight")))?.broadcast_add(self.get(&format!("{name}.bias")))
    }

    fn layer_norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        centred
            .broadcast_div(&deviation)?
            .broadcast_mul(self.get(&format!("{name}.weight")))?
            .broadcast_add(self.get(&format!("{name}.bias")))
    }

    fn attention(&self, x: &Tensor, rows: usize, name: &str) -> Result<Tensor> {
        let length = x.dim(0)? / rows;
        let qkv = self.linear(x, &format!("{name}.c_attn"))?;
        let heads = |part: usize| {
            qkv.narrow(1, part * WIDTH, WIDTH)?
                .reshape((rows, length, HEADS, WIDTH / HEADS))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (q, k, v) = ((heads(0)? * ((WIDTH / HEADS) as f64).powf(-0.5))?, heads(1)?, heads(2)?);
        let scores = q.matmul(&k.t()?)?.broadcast_add(&self.mask)?;
        let mixed = softmax(&scores)?.matmul(&v)?;
        let joined = mixed.transpose(1, 2)?.reshape((rows * length, WIDTH))?;
        self.linear(&joined, &format!("{name}.c_proj"))
    }

    fn loss(&self, inputs: &Tensor, targets: &Tensor, rows: usize) -> Result<Tensor> {
        let length = inputs.dim(0)? / rows;
        let positions = self.get("transformer.wpe.weight").narrow(0, 0, length)?;
        let embedding = self.get("transformer.wte.weight");
        let mut x = embedding
            .index_select(inputs, 0)?
            .reshape((rows, length, WIDTH))?
            .broadcast_add(&positions)?
            .reshape((rows * length, WIDTH))?;
        for layer in 0..LAYERS {
            let at = |part: &str| format!("transformer.h.{layer}.{part}");
            x = (&x + self.attention(&self.layer_norm(&x, &at("ln_1"))?, rows, &at("attn"))?)?;
            let inner = self.linear(&self.layer_norm(&x, &at("ln_2"))?, &at("mlp.c_fc"))?.gelu()?;
            x = (&x + self.linear(&inner, &at("mlp.c_proj"))?)?;
        }
        let logits = self.layer_norm(&x, "transformer.ln_f")?.matmul(&embedding.t()?)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
        let normaliser = shifted.exp()?.sum_keepdim(1)?.log()?;
        let picked = shifted.gather(&targets.unsqueeze(1)?, 1)?;
        (normaliser - picked)?.mean_all()
    }
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// Scales all gradients so that their common norm is at most 1.
fn clip<'a>(gradients: &mut GradStore, variables: impl Iterator<Item = &'a Var> + Clone) -> Result<()> {
    let mut squares = 0.0;
    for variable in variables.clone() {
        if let Some(gradient) = gradients.get(variable) {
            squares += gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
        }
    }
    let norm = f64::from(squares.sqrt());
    if norm <= 1.0 {
        return Ok(());
    }
    for variable in variables {
        if let Some(gradient) = gradients.remove(variable) {
            gradients.insert(variable, (gradient / norm)?);
        }
    }
    Ok(())
}

fn causal_mask(length: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..length * length)
        .map(|at| if at % length > at / length { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    Tensor::from_vec(values, (1, 1, length, length), &Device::Cpu)
}

fn main() -> Result<()> {
    let job = Job::from_command_line();
    let rows = job.steps[0].len();
    let length = job.steps[0][0].len() - 1;
    let variables = job
        .weights()
        .into_iter()
        .map(|(name, weight)| {
            Ok((name, Var::from_tensor(&Tensor::from_vec(weight.values, weight.shape, &Device::Cpu)?)?))
        })
        .collect::<Result<HashMap<_, _>>>()?;
    let model = Model { variables, mask: causal_mask(length)? };
    let settings = ParamsAdamW { lr: job.learning_rate, weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(model.variables.values().cloned().collect(), settings)?;
    let mut measured = Vec::new();
    for step in &job.steps {
        let start = Instant::now();
        let (inputs, targets) = shifted(step);
        let inputs = Tensor::from_vec(inputs, rows * length, &Device::Cpu)?;
        let targets = Tensor::from_vec(targets, rows * length, &Device::Cpu)?;
        let loss = model.loss(&inputs, &targets, rows)?;
        let mut gradients = loss.backward()?;
        clip(&mut gradients, model.variables.values())?;
        optimizer.step(&gradients)?;
        measured.push((start.elapsed().as_secs_f64(), f64::from(loss.to_scalar::<f32>()?)));
    }
    job.report("candle", "0.11.0", &measured);
    Ok(())
}
