//! Tiny models of each kind, sequences for them, and their loss with its gradient.

use temper_kernels::{Device, uniform};

use super::values;
use crate::data::{Forest, Sequence};
use crate::model::config::{self, Config, Family};
use crate::model::decoder::{Decoder, ParameterGradients, StepDropout};
use crate::model::layers::Layer;
use crate::model::lora::{Lora, Targets};
use crate::model::rotary::{RopeScaling, Rotary};
use crate::model::spec::{Role, Spec, specs};
use crate::model::weights::{Parameters, Weights};

/// Adapters of some layers beside a head that is trained whole, and DoRA's of all.
pub(super) fn loras(config: &Config) -> [Lora; 2] {
    let names = if config.is_gpt2() { ["attn.c_attn", "mlp.c_proj"] } else { ["v_proj", "down_proj"] };
    let some = Lora {
        rank: 2,
        alpha: 3.0,
        rslora: true,
        targets: Targets::Named(names.map(str::to_owned).to_vec()),
        modules_to_save: vec!["lm_head".into()],
        ..Lora::default()
    };
    let all = Lora { dora: true, targets: Targets::AllLinear, modules_to_save: Vec::new(), ..some.clone() };
    [some, all]
}

/// A tiny model of each kind of block.
pub(super) fn configs() -> Vec<(&'static str, Config)> {
    let rotary = Rotary { theta: 100.0, scaling: RopeScaling::None };
    let layer = Layer { window: None, rotary: Some(rotary) };
    let llama = Config {
        family: Family::Llama,
        vocabulary: 19,
        width: 12,
        layers: vec![layer; 2],
        heads: 4,
        kv_heads: 2,
        head_width: 4,
        mlp_width: 10,
        context: 32,
        norm_epsilon: 1e-5,
        embedding_scale: 1.0,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: true,
        initializer_range: 0.02,
        dropout: config::Dropout::default(),
        bos: None,
        eos: Vec::new(),
    };
    let gpt2 = Config {
        family: Family::Gpt2,
        layers: vec![Layer { rotary: None, ..layer }; 2],
        kv_heads: 4,
        head_width: 3,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        ..llama.clone()
    };
    let qwen3 = Config { family: Family::Qwen3, qk_norm: true, tied: false, head_width: 6, ..llama.clone() };
    let window = Some(3);
    let mistral = Config {
        family: Family::Mistral,
        layers: vec![Layer { window, ..layer }; 2],
        qkv_bias: true,
        ..llama.clone()
    };
    let smollm3 = Config {
        family: Family::SmolLm3,
        layers: vec![layer, Layer { window, rotary: None }],
        ..llama.clone()
    };
    let local = Some(Rotary { theta: 10.0, ..rotary });
    let gemma3 = Config {
        family: Family::Gemma3,
        layers: vec![Layer { window, rotary: local }, layer],
        qk_norm: true,
        embedding_scale: 3.5,
        ..llama.clone()
    };
    vec![
        ("GPT-2", gpt2),
        ("Llama", llama),
        ("Qwen3 (head norms, own head)", qwen3),
        ("Mistral (window), biases", mistral),
        ("SmolLM3 (layers without positions)", smollm3),
        ("Gemma 3 (norms of branches, two kinds of layers)", gemma3),
    ]
}

/// Sequences that share prefixes, partly.
pub(super) fn sequences(vocabulary: usize) -> Vec<Sequence> {
    let token = |i: usize| ((i * i + 3 * i) % vocabulary) as u32;
    let make = |prefix: usize, own: usize, len: usize, trained| Sequence {
        tokens: (0..prefix).map(token).chain((0..len).map(|i| token(own + 5 * i))).collect(),
        trained,
        prompt: prefix,
    };
    vec![
        make(5, 2, 4, vec![5..9]),
        make(5, 3, 3, vec![2..4, 6..8]),
        make(0, 7, 6, vec![1..6]),
        make(5, 2, 6, vec![5..11]),
    ]
}

/// A decoder whose parameters are large enough that nothing is flat.
pub(super) fn decoder<D: Device>(device: &D, config: &Config) -> Decoder<D> {
    Decoder::new(config.clone(), weights(device, &specs(config)))
}

/// The same with adapters, their B scaled. With B = 0, DoRA's magnitudes are the norms.
pub(super) fn adapted<D: Device>(device: &D, config: &Config, lora: &Lora, b: f32) -> Decoder<D> {
    let Ok(specs) = lora.specs(config) else { unreachable!("the names are those of the tiny models") };
    let weights = weights(device, &specs);
    let mut decoder = Decoder::adapted(device, config, lora, specs, weights);
    for block in &mut decoder.weights.blocks {
        for dense in block.dense_mut() {
            for matrix in dense.adapter.iter_mut().flat_map(|adapter| &mut adapter.b) {
                let scaled = device.weight_values(matrix).iter().map(|x| b * x).collect();
                *matrix = device.weight(scaled, true);
            }
        }
    }
    decoder.refresh_norms(device);
    if b == 0.0 {
        decoder.magnitudes_from_norms(device);
    }
    decoder
}

fn weights<D: Device>(device: &D, specs: &Weights<Spec>) -> Parameters<D> {
    let start = |spec: &Spec| -> Vec<f32> {
        let scale = if spec.decays() { 0.4 } else { 0.2 };
        let name = &spec.parts[0].0;
        let around_one =
            name.ends_with("norm.weight") || name.contains("ln_") || spec.role == Role::Magnitude;
        let base = if around_one { 1.0 } else { 0.0 };
        values(name, spec.len()).iter().map(|x| (base + scale * x) as f32).collect()
    };
    specs.map_each(|spec| device.upload(start(spec)), |spec| device.weight(start(spec), true))
}

/// `Σ coefficient · logp` over the targets of one forest and its gradient, parameter by parameter.
pub(super) fn loss_and_gradient<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    forest: &Forest,
    dropout: StepDropout,
    coefficients: &[f64],
) -> (f64, Vec<Option<D::Buffer>>) {
    let mut a = decoder.activations(device, forest.rows(), true);
    let mut g = decoder.gradients(device, forest.rows());
    let mut dw = decoder.zeros(device);
    decoder.forward(device, forest, dropout, None, &mut a);
    let output = decoder.head_before_backward(device, forest, &mut a);
    let sums = ParameterGradients { sums: &mut dw, add: true, ready: &mut |_, _| {} };
    decoder.backward(device, forest, dropout, coefficients, &output.log_sum_exp, &mut a, &mut g, sums);
    let loss = output.logp.iter().zip(coefficients).map(|(logp, c)| logp * c).sum();
    (loss, dw.iter_mut().map(Option::take).collect())
}

/// A coefficient for each target that depends on its token and sequence, not on the batch.
pub(super) fn coefficients(forest: &Forest, first_sequence: usize) -> Vec<f64> {
    let weight =
        |owner: u32, token: u32| uniform(first_sequence as u64 + u64::from(owner), token.into()) - 0.3;
    forest.owners.iter().zip(&forest.targets).map(|(&owner, target)| weight(owner, target.token)).collect()
}
