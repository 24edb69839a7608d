//! The parameters: which there are, their names in files, their initial values.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fmt::Write as _;

use temper_kernels::{Device, mix, uniform};

use super::{Config, Error};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::save::SavedTensor;

/// A dense layer: weight `[outputs, inputs]`, bias `[outputs]`.
#[derive(Debug, Clone)]
pub struct Dense<T, M = T> {
    /// The weight.
    pub weight: M,
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
pub struct Block<T, M = T> {
    /// Before attention.
    pub attention_norm: Norm<T>,
    /// q, k and v in one: `[A, C]`.
    pub qkv: Dense<T, M>,
    /// Norms of the heads of q and of k, `[head_width]` (Qwen3).
    pub head_norms: Option<[T; 2]>,
    /// `[C, heads · head_width]`.
    pub output: Dense<T, M>,
    /// Before the MLP.
    pub mlp_norm: Norm<T>,
    /// Gate and up in one: `[2F, C]`; `[F, C]` for GELU.
    pub up: Dense<T, M>,
    /// `[C, F]`.
    pub down: Dense<T, M>,
}

/// Something for each parameter: its value, its gradient, its description. Vectors and matrices may take
/// different forms: `T` and `M`.
#[derive(Debug, Clone)]
pub struct Weights<T, M = T> {
    /// `[V, C]`.
    pub embedding: M,
    /// `[context, C]`, learned positions.
    pub positions: Option<M>,
    /// The blocks.
    pub blocks: Vec<Block<T, M>>,
    /// Before the head.
    pub norm: Norm<T>,
    /// `[V, C]`; none when it is the embedding.
    pub head: Option<M>,
}

/// One of [`Weights`].
#[derive(Debug, Clone, Copy)]
pub enum Parameter<T, M = T> {
    /// A gain or a bias.
    Vector(T),
    /// Anything with rows and columns.
    Matrix(M),
}

impl<T> Parameter<T> {
    fn either(self) -> T {
        let (Parameter::Vector(x) | Parameter::Matrix(x)) = self;
        x
    }
}

impl<T, M> Weights<T, M> {
    /// The same structure with `vector` of each vector and `matrix` of each matrix, in the order of
    /// [`Weights::parameters`].
    pub fn map_each<'a, U, N>(
        &'a self,
        vector: impl Fn(&'a T) -> U,
        matrix: impl Fn(&'a M) -> N,
    ) -> Weights<U, N> {
        let norm = |norm: &'a Norm<T>| {
            let gain = vector(&norm.gain);
            Norm { gain, bias: norm.bias.as_ref().map(&vector) }
        };
        let dense = |dense: &'a Dense<T, M>| {
            let weight = matrix(&dense.weight);
            Dense { weight, bias: dense.bias.as_ref().map(&vector) }
        };
        let block = |block: &'a Block<T, M>| Block {
            attention_norm: norm(&block.attention_norm),
            qkv: dense(&block.qkv),
            head_norms: block.head_norms.as_ref().map(|[q, k]| [vector(q), vector(k)]),
            output: dense(&block.output),
            mlp_norm: norm(&block.mlp_norm),
            up: dense(&block.up),
            down: dense(&block.down),
        };
        Weights {
            embedding: matrix(&self.embedding),
            positions: self.positions.as_ref().map(&matrix),
            blocks: self.blocks.iter().map(block).collect(),
            norm: norm(&self.norm),
            head: self.head.as_ref().map(&matrix),
        }
    }

    /// Every parameter, from the embedding to the head.
    pub fn parameters(&self) -> Vec<Parameter<&T, &M>> {
        let all = RefCell::new(Vec::new());
        self.map_each(
            |x| all.borrow_mut().push(Parameter::Vector(x)),
            |x| all.borrow_mut().push(Parameter::Matrix(x)),
        );
        all.into_inner()
    }

    /// Every parameter to change, in the same order.
    pub fn parameters_mut(&mut self) -> Vec<Parameter<&mut T, &mut M>> {
        use Parameter::{Matrix, Vector};
        let mut all = vec![Matrix(&mut self.embedding)];
        all.extend(self.positions.as_mut().map(Matrix));
        for block in &mut self.blocks {
            all.push(Vector(&mut block.attention_norm.gain));
            all.extend(block.attention_norm.bias.as_mut().map(Vector));
            all.push(Matrix(&mut block.qkv.weight));
            all.extend(block.qkv.bias.as_mut().map(Vector));
            all.extend(block.head_norms.iter_mut().flatten().map(Vector));
            all.push(Matrix(&mut block.output.weight));
            all.extend(block.output.bias.as_mut().map(Vector));
            all.push(Vector(&mut block.mlp_norm.gain));
            all.extend(block.mlp_norm.bias.as_mut().map(Vector));
            for dense in [&mut block.up, &mut block.down] {
                all.push(Matrix(&mut dense.weight));
                all.extend(dense.bias.as_mut().map(Vector));
            }
        }
        all.push(Vector(&mut self.norm.gain));
        all.extend(self.norm.bias.as_mut().map(Vector));
        all.extend(self.head.as_mut().map(Matrix));
        all
    }

    /// The head's weight.
    pub fn head(&self) -> &M {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The head's weight, to change.
    pub fn head_mut(&mut self) -> &mut M {
        self.head.as_mut().unwrap_or(&mut self.embedding)
    }
}

impl<T> Weights<T> {
    /// The same structure with `f` of each element, in the order of [`Weights::iter`].
    pub fn map<'a, U>(&'a self, f: impl FnMut(&'a T) -> U) -> Weights<U> {
        let f = RefCell::new(f);
        self.map_each(|x| f.borrow_mut()(x), |x| f.borrow_mut()(x))
    }

    /// Every element, from the embedding to the head.
    pub fn iter(&self) -> Vec<&T> {
        self.parameters().into_iter().map(Parameter::either).collect()
    }

    /// Every element to change, in the same order.
    pub fn iter_mut(&mut self) -> Vec<&mut T> {
        self.parameters_mut().into_iter().map(Parameter::either).collect()
    }
}

/// The parameters of a model on a device.
pub type Parameters<D> = Weights<<D as Device>::Buffer, <D as Device>::Weight>;

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
    trained: bool,
) -> crate::Result<Parameters<D>> {
    let specs = specs(config);
    check(checkpoint, &specs)?;
    let vector = |values| device.upload(values);
    read(checkpoint, &specs, "", vector, |values| device.weight(values, trained))
}

/// Reads something for every parameter: tensors with the parameters' names behind a prefix.
///
/// # Errors
/// When one is missing or cannot be read.
pub fn read<T, M>(
    checkpoint: &Checkpoint,
    specs: &Weights<Spec>,
    prefix: &str,
    vector: impl Fn(Vec<f32>) -> T,
    matrix: impl Fn(Vec<f32>) -> M,
) -> crate::Result<Weights<T, M>> {
    let failure = Cell::new(None);
    let values = |spec: &Spec| {
        let mut values = vec![0.0; spec.len()];
        let mut at = 0;
        for (name, rows) in &spec.parts {
            let part = &mut values[at..at + spec.part_len(*rows)];
            at += part.len();
            if let Err(error) = checkpoint.read_into(&format!("{prefix}{name}"), part) {
                failure.set(Some(failure.take().unwrap_or(error)));
            }
            if spec.transposed {
                part.copy_from_slice(&transpose(part, *rows, spec.columns()));
            }
        }
        values
    };
    let weights = specs.map_each(|spec| vector(values(spec)), |spec| matrix(values(spec)));
    match failure.into_inner() {
        Some(error) => Err(error.into()),
        None => Ok(weights),
    }
}

/// The same tensors to be saved, one part of a parameter at a time.
pub fn saved<'a, T: Sync, M: Sync>(
    weights: &'a Weights<T, M>,
    specs: &'a Weights<Spec>,
    prefix: &str,
    vector: impl Fn(&'a T) -> Cow<'a, [f32]> + Copy + 'a,
    matrix: impl Fn(&'a M) -> Cow<'a, [f32]> + Copy + 'a,
) -> Vec<SavedTensor<'a>> {
    let mut tensors = Vec::new();
    for (spec, parameter) in specs.iter().into_iter().zip(weights.parameters()) {
        let mut at = 0;
        for (name, rows) in &spec.parts {
            let range = at..at + spec.part_len(*rows);
            at = range.end;
            let values = move || {
                let all = match parameter {
                    Parameter::Vector(x) => vector(x),
                    Parameter::Matrix(x) => matrix(x),
                };
                match all {
                    all if spec.transposed => {
                        Cow::Owned(transpose(&all[range.clone()], spec.columns(), *rows))
                    }
                    Cow::Borrowed(all) => Cow::Borrowed(&all[range.clone()]),
                    Cow::Owned(all) => Cow::Owned(all[range.clone()].to_vec()),
                }
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
pub fn initialise<D: Device>(device: &D, config: &Config, seed: u64) -> Parameters<D> {
    let index = Cell::new(0);
    let values = |spec: &Spec| {
        index.set(index.get() + 1);
        let key = mix(mix(seed, u64::from_be_bytes(*b"initial ")), index.get());
        match spec.start {
            Start::Constant(value) => vec![value; spec.len()],
            Start::Normal(deviation) => {
                (0..spec.len() as u64).map(|i| (deviation * normal(key, i)) as f32).collect()
            }
        }
    };
    specs(config).map_each(|spec| device.upload(values(spec)), |spec| device.weight(values(spec), true))
}

/// Number `i` of a standard normal stream (Box & Muller 1958).
fn normal(key: u64, i: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(key, 2 * i)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(key, 2 * i + 1)).cos()
}
