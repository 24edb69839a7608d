//! The parameters: which there are, their names in files, their initial values.

use std::borrow::Cow;
use std::fmt::Write as _;

use temper_kernels::{Device, mix, uniform};

use super::{Config, Error};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::save::SavedTensor;

/// A dense layer: weight `[outputs, inputs]`, bias `[outputs]`.
#[derive(Debug, Clone)]
pub struct Dense<T> {
    /// The weight.
    pub weight: T,
    /// The bias, where the family has one.
    pub bias: Option<T>,
}

/// A norm: gain and bias `[width]`.
#[derive(Debug, Clone)]
pub struct Norm<T> {
    /// The gain.
    pub gain: T,
    /// The bias of a LayerNorm.
    pub bias: Option<T>,
}

/// One block.
#[derive(Debug, Clone)]
pub struct Block<T> {
    /// Before attention.
    pub attention_norm: Norm<T>,
    /// q, k and v in one: `[A, C]`.
    pub qkv: Dense<T>,
    /// Norms of the heads of q and of k, `[head_width]` (Qwen3).
    pub head_norms: Option<[T; 2]>,
    /// `[C, heads · head_width]`.
    pub output: Dense<T>,
    /// Before the MLP.
    pub mlp_norm: Norm<T>,
    /// Gate and up in one: `[2F, C]`; `[F, C]` for GELU.
    pub up: Dense<T>,
    /// `[C, F]`.
    pub down: Dense<T>,
}

/// Something for each parameter: its buffer, its gradient, its description.
#[derive(Debug, Clone)]
pub struct Weights<T> {
    /// `[V, C]`.
    pub embedding: T,
    /// `[context, C]`, learned positions.
    pub positions: Option<T>,
    /// The blocks.
    pub blocks: Vec<Block<T>>,
    /// Before the head.
    pub norm: Norm<T>,
    /// `[V, C]`; none when it is the embedding.
    pub head: Option<T>,
}

impl<T> Dense<T> {
    fn map<'a, U>(&'a self, f: &mut impl FnMut(&'a T) -> U) -> Dense<U> {
        Dense { weight: f(&self.weight), bias: self.bias.as_ref().map(f) }
    }
}

impl<T> Norm<T> {
    fn map<'a, U>(&'a self, f: &mut impl FnMut(&'a T) -> U) -> Norm<U> {
        Norm { gain: f(&self.gain), bias: self.bias.as_ref().map(f) }
    }
}

impl<T> Weights<T> {
    /// The same structure with `f` of each element, in the order of [`Weights::iter`].
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Weights<U> {
        let f = &mut f;
        Weights {
            embedding: f(&self.embedding),
            positions: self.positions.as_ref().map(&mut *f),
            blocks: self
                .blocks
                .iter()
                .map(|block| Block {
                    attention_norm: block.attention_norm.map(f),
                    qkv: block.qkv.map(f),
                    head_norms: block.head_norms.as_ref().map(|[q, k]| [f(q), f(k)]),
                    output: block.output.map(f),
                    mlp_norm: block.mlp_norm.map(f),
                    up: block.up.map(f),
                    down: block.down.map(f),
                })
                .collect(),
            norm: self.norm.map(f),
            head: self.head.as_ref().map(f),
        }
    }

    /// Every element, from the embedding to the head.
    pub fn iter(&self) -> Vec<&T> {
        let mut all = Vec::new();
        self.map(|x| all.push(x));
        all
    }

    /// Every element to change, in the same order.
    pub fn iter_mut(&mut self) -> Vec<&mut T> {
        let mut all = vec![&mut self.embedding];
        all.extend(&mut self.positions);
        for block in &mut self.blocks {
            all.push(&mut block.attention_norm.gain);
            all.extend(&mut block.attention_norm.bias);
            all.push(&mut block.qkv.weight);
            all.extend(&mut block.qkv.bias);
            all.extend(block.head_norms.iter_mut().flatten());
            all.push(&mut block.output.weight);
            all.extend(&mut block.output.bias);
            all.push(&mut block.mlp_norm.gain);
            all.extend(&mut block.mlp_norm.bias);
            for dense in [&mut block.up, &mut block.down] {
                all.push(&mut dense.weight);
                all.extend(&mut dense.bias);
            }
        }
        all.push(&mut self.norm.gain);
        all.extend(&mut self.norm.bias);
        all.extend(&mut self.head);
        all
    }

    /// The head's weight.
    pub fn head(&self) -> &T {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The head's weight, to change.
    pub fn head_mut(&mut self) -> &mut T {
        self.head.as_mut().unwrap_or(&mut self.embedding)
    }
}

/// How a parameter begins when there is no checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Start {
    Constant(f32),
    /// Normal with this standard deviation (Radford et al. 2019: 0.02, divided by `sqrt(2 layers)` for what is
    /// added to the residual stream).
    Normal(f64),
}

/// What a parameter is called in files and how it lies there.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Names in a Hugging Face file with the rows of the parameter that each holds.
    pub parts: Vec<(String, usize)>,
    /// `[rows]` or `[rows, columns]`, as it lies in memory.
    pub shape: Vec<usize>,
    /// The file holds `[columns, rows]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Whether weight decay applies: to matrices, not to biases and norms.
    pub decay: bool,
    start: Start,
}

impl Spec {
    fn vector(name: String, rows: usize, value: f32) -> Spec {
        Spec {
            parts: vec![(name, rows)],
            shape: vec![rows],
            transposed: false,
            decay: false,
            start: Start::Constant(value),
        }
    }

    fn matrix(parts: Vec<(String, usize)>, columns: usize, deviation: f64, transposed: bool) -> Spec {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        Spec { parts, shape: vec![rows, columns], transposed, decay: true, start: Start::Normal(deviation) }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements; it always has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Columns of a row; 1 for a vector.
    pub fn columns(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    fn part_len(&self, rows: usize) -> usize {
        rows * self.columns()
    }

    /// The shape in the file of a part with this many rows.
    pub fn file_shape(&self, rows: usize) -> Vec<usize> {
        match (&self.shape[1..], self.transposed) {
            ([columns], true) => vec![*columns, rows],
            ([columns], false) => vec![rows, *columns],
            _ => vec![rows],
        }
    }
}

/// `[rows, columns]` of `values`, a matrix `[columns, rows]`.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const TILE: usize = 64;
    let mut out = vec![0.0; values.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..columns).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..columns.min(c0 + TILE) {
                    out[r * columns + c] = values[c * rows + r];
                }
            }
        }
    }
    out
}

/// The parameters of a configuration.
pub fn specs(config: &Config) -> Weights<Spec> {
    if config.is_gpt2() { gpt2_specs(config) } else { llama_specs(config) }
}

fn gpt2_specs(c: &Config) -> Weights<Spec> {
    let small = 0.02 / (2.0 * c.layers as f64).sqrt();
    let norm = |name: String| Norm {
        gain: Spec::vector(format!("{name}.weight"), c.width, 1.0),
        bias: Some(Spec::vector(format!("{name}.bias"), c.width, 0.0)),
    };
    let dense = |name: String, outputs: usize, inputs: usize, deviation: f64| Dense {
        weight: Spec::matrix(vec![(format!("{name}.weight"), outputs)], inputs, deviation, true),
        bias: Some(Spec::vector(format!("{name}.bias"), outputs, 0.0)),
    };
    let table = |name: &str, rows: usize| Spec::matrix(vec![(name.into(), rows)], c.width, 0.02, false);
    let block = |layer: usize| {
        let name = |rest: &str| format!("transformer.h.{layer}.{rest}");
        Block {
            attention_norm: norm(name("ln_1")),
            qkv: dense(name("attn.c_attn"), c.qkv_width(), c.width, 0.02),
            head_norms: None,
            output: dense(name("attn.c_proj"), c.width, c.heads * c.head_width, small),
            mlp_norm: norm(name("ln_2")),
            up: dense(name("mlp.c_fc"), c.mlp_width, c.width, 0.02),
            down: dense(name("mlp.c_proj"), c.width, c.mlp_width, small),
        }
    };
    Weights {
        embedding: table("transformer.wte.weight", c.vocabulary),
        positions: Some(table("transformer.wpe.weight", c.context)),
        blocks: (0..c.layers).map(block).collect(),
        norm: norm("transformer.ln_f".into()),
        head: (!c.tied).then(|| table("lm_head.weight", c.vocabulary)),
    }
}

fn llama_specs(c: &Config) -> Weights<Spec> {
    let small = 0.02 / (2.0 * c.layers as f64).sqrt();
    let norm = |name: String| Norm { gain: Spec::vector(format!("{name}.weight"), c.width, 1.0), bias: None };
    let dense = |parts: Vec<(String, usize)>, inputs: usize, biased: bool, deviation: f64| {
        let named = |suffix: &str| {
            parts.iter().map(|(name, rows)| (format!("{name}.{suffix}"), *rows)).collect::<Vec<_>>()
        };
        let outputs = parts.iter().map(|(_, rows)| rows).sum();
        let bias = biased.then(|| Spec { parts: named("bias"), ..Spec::vector(String::new(), outputs, 0.0) });
        Dense { weight: Spec::matrix(named("weight"), inputs, deviation, false), bias }
    };
    let table = |name: &str| Spec::matrix(vec![(name.into(), c.vocabulary)], c.width, 0.02, false);
    let block = |layer: usize| {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let (q, kv) = (c.heads * c.head_width, c.kv_heads * c.head_width);
        let qkv = vec![
            (name("self_attn.q_proj"), q),
            (name("self_attn.k_proj"), kv),
            (name("self_attn.v_proj"), kv),
        ];
        let head_norm =
            |which: &str| Spec::vector(name(&format!("self_attn.{which}_norm.weight")), c.head_width, 1.0);
        let up = vec![(name("mlp.gate_proj"), c.mlp_width), (name("mlp.up_proj"), c.mlp_width)];
        Block {
            attention_norm: norm(name("input_layernorm")),
            qkv: dense(qkv, c.width, c.qkv_bias, 0.02),
            head_norms: c.qk_norm.then(|| ["q", "k"].map(head_norm)),
            output: dense(vec![(name("self_attn.o_proj"), c.width)], q, c.output_bias, small),
            mlp_norm: norm(name("post_attention_layernorm")),
            up: dense(up, c.width, c.mlp_bias, 0.02),
            down: dense(vec![(name("mlp.down_proj"), c.width)], c.mlp_width, c.mlp_bias, small),
        }
    };
    Weights {
        embedding: table("model.embed_tokens.weight"),
        positions: None,
        blocks: (0..c.layers).map(block).collect(),
        norm: norm("model.norm".into()),
        head: (!c.tied).then(|| table("lm_head.weight")),
    }
}

/// Reads every parameter of a checkpoint, after comparing its names and shapes with what the model needs.
///
/// # Errors
/// [`Error::Tensors`] with every missing, unexpected and wrongly shaped tensor; reading errors.
pub fn load<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    config: &Config,
) -> crate::Result<Weights<D::Buffer>> {
    let specs = specs(config);
    check(checkpoint, &specs)?;
    read(device, checkpoint, &specs, "")
}

/// Reads something for every parameter: tensors with the parameters' names behind a prefix.
///
/// # Errors
/// When one is missing or cannot be read.
pub fn read<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    specs: &Weights<Spec>,
    prefix: &str,
) -> crate::Result<Weights<D::Buffer>> {
    let mut failure = None;
    let weights = specs.map(|spec| {
        let mut values = vec![0.0; spec.len()];
        let mut at = 0;
        for (name, rows) in &spec.parts {
            let part = &mut values[at..at + spec.part_len(*rows)];
            at += part.len();
            if let Err(error) = checkpoint.read_into(&format!("{prefix}{name}"), part) {
                failure.get_or_insert(error);
            }
            if spec.transposed {
                part.copy_from_slice(&transpose(part, *rows, spec.columns()));
            }
        }
        device.upload(values)
    });
    match failure {
        Some(error) => Err(error.into()),
        None => Ok(weights),
    }
}

/// The same tensors to be saved, one part of a parameter at a time.
pub fn saved<'a, D: Device>(
    device: &'a D,
    weights: &'a Weights<D::Buffer>,
    specs: &'a Weights<Spec>,
    prefix: &str,
) -> Vec<SavedTensor<'a>> {
    let mut tensors = Vec::new();
    for (spec, buffer) in specs.iter().into_iter().zip(weights.iter()) {
        let mut at = 0;
        for (name, rows) in &spec.parts {
            let range = at..at + spec.part_len(*rows);
            at = range.end;
            let values = move || match device.download(buffer) {
                all if spec.transposed => Cow::Owned(transpose(&all[range.clone()], spec.columns(), *rows)),
                Cow::Borrowed(all) => Cow::Borrowed(&all[range.clone()]),
                Cow::Owned(all) => Cow::Owned(all[range.clone()].to_vec()),
            };
            tensors.push(SavedTensor {
                name: format!("{prefix}{name}"),
                shape: spec.file_shape(*rows),
                values: Box::new(values),
            });
        }
    }
    tensors
}

/// Compares the names and shapes of a checkpoint with what the model needs.
fn check(checkpoint: &Checkpoint, specs: &Weights<Spec>) -> Result<(), Error> {
    let mut problems = String::new();
    let mut expected = std::collections::HashMap::new();
    for spec in specs.iter() {
        for (name, rows) in &spec.parts {
            expected.insert(name.clone(), spec.file_shape(*rows));
            if !checkpoint.contains(name) {
                let _ = write!(problems, "\n  missing    {name} {:?}", spec.file_shape(*rows));
            }
        }
    }
    for (name, shape) in checkpoint.tensors() {
        match expected.get(name) {
            None => _ = write!(problems, "\n  unexpected {name} {shape:?}"),
            Some(wanted) if wanted != shape => {
                _ = write!(problems, "\n  shape      {name} {shape:?}, expected {wanted:?}")
            }
            Some(_) => {}
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: checkpoint.path.clone(), problems }) }
}

/// Fresh parameters: normal matrices, zero biases, gains of one; a function of the seed.
pub fn initialise<D: Device>(device: &D, config: &Config, seed: u64) -> Weights<D::Buffer> {
    let mut index = 0;
    specs(config).map(|spec| {
        index += 1;
        let key = mix(mix(seed, u64::from_be_bytes(*b"initial ")), index);
        device.upload(match spec.start {
            Start::Constant(value) => vec![value; spec.len()],
            Start::Normal(deviation) => {
                (0..spec.len() as u64).map(|i| (deviation * normal(key, i)) as f32).collect()
            }
        })
    })
}

/// Number `i` of a standard normal stream (Box & Muller 1958).
fn normal(key: u64, i: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(key, 2 * i)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(key, 2 * i + 1)).cos()
}
