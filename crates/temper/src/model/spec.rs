//! What the parameters of a family are called, their shapes, how they begin, and which are trained.

use super::Config;
use super::config::Family;
use super::weights::{Block, Dense, Norm, Weights};

/// How a parameter begins when there is no checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Init {
    Constant(f32),
    /// Uniform between plus and minus this (He et al. 2015 with a = √5, as PyTorch's layers and PEFT's A begin).
    Uniform(f64),
    /// Normal with this standard deviation (Radford et al. 2019: `initializer_range`, divided by `sqrt(2 layers)` for what
    /// is added to the residual stream).
    Normal(f64),
}

/// What a parameter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A gain or a bias.
    Vector,
    /// An embedding of tokens or positions, or the head.
    Table,
    /// The weight of a dense layer.
    Linear,
    /// An adapter's A.
    LowRankA,
    /// An adapter's B.
    LowRankB,
    /// DoRA's magnitudes.
    Magnitude,
    /// The norms of adapted rows, computed from other parameters and never saved.
    Norms,
}

impl Role {
    /// Whether it belongs to adapters and not to the model.
    pub fn is_adapter(self) -> bool {
        !matches!(self, Role::Vector | Role::Table | Role::Linear)
    }
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
    /// What it is.
    pub role: Role,
    /// Whether it is trained.
    pub trained: bool,
    pub(super) init: Init,
}

impl Spec {
    fn vector(name: String, rows: usize, value: f32) -> Spec {
        Spec::new(Role::Vector, vec![(name, rows)], None, Init::Constant(value))
    }

    fn linear(parts: Vec<(String, usize)>, columns: usize, deviation: f64) -> Spec {
        Spec::new(Role::Linear, parts, Some(columns), Init::Normal(deviation))
    }

    fn table(name: &str, rows: usize, c: &Config) -> Spec {
        Spec::new(Role::Table, vec![(name.into(), rows)], Some(c.width), Init::Normal(c.initializer_range))
    }

    pub(super) fn new(role: Role, parts: Vec<(String, usize)>, columns: Option<usize>, init: Init) -> Spec {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let shape = [rows].into_iter().chain(columns).collect();
        Spec { parts, shape, transposed: false, role, trained: true, init }
    }

    /// Whether weight decay applies: to matrices, not to biases, norms and magnitudes.
    pub fn decays(&self) -> bool {
        self.shape.len() == 2
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

    pub(super) fn part_len(&self, rows: usize) -> usize {
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

/// The parameters of a configuration, all trained.
pub fn specs(config: &Config) -> Weights<Spec> {
    if config.is_gpt2() { gpt2_specs(config) } else { llama_specs(config) }
}

fn gpt2_specs(c: &Config) -> Weights<Spec> {
    let usual = c.initializer_range;
    let small = usual / (2.0 * c.layers.len() as f64).sqrt();
    let norm = |name: String| Norm {
        gain: Spec::vector(format!("{name}.weight"), c.width, 1.0),
        bias: Some(Spec::vector(format!("{name}.bias"), c.width, 0.0)),
    };
    let dense = |name: String, outputs: usize, inputs: usize, deviation: f64| Dense {
        weight: Spec {
            transposed: true,
            ..Spec::linear(vec![(format!("{name}.weight"), outputs)], inputs, deviation)
        },
        bias: Some(Spec::vector(format!("{name}.bias"), outputs, 0.0)),
        adapter: None,
    };
    let table = |name: &str, rows: usize| Spec::table(name, rows, c);
    let block = |layer: usize| {
        let name = |rest: &str| format!("transformer.h.{layer}.{rest}");
        Block {
            attention_norm: norm(name("ln_1")),
            qkv: dense(name("attn.c_attn"), c.qkv_width(), c.width, usual),
            head_norms: None,
            output: dense(name("attn.c_proj"), c.width, c.heads * c.head_width, small),
            output_norm: None,
            mlp_norm: norm(name("ln_2")),
            up: dense(name("mlp.c_fc"), c.mlp_width, c.width, usual),
            down: dense(name("mlp.c_proj"), c.width, c.mlp_width, small),
            down_norm: None,
        }
    };
    Weights {
        embedding: table("transformer.wte.weight", c.vocabulary),
        positions: Some(table("transformer.wpe.weight", c.context)),
        blocks: (0..c.layers.len()).map(block).collect(),
        norm: norm("transformer.ln_f".into()),
        head: (!c.tied).then(|| table("lm_head.weight", c.vocabulary)),
    }
}

fn llama_specs(c: &Config) -> Weights<Spec> {
    let usual = c.initializer_range;
    let small = usual / (2.0 * c.layers.len() as f64).sqrt();
    let gemma3 = c.family == Family::Gemma3;
    let gain = if gemma3 { 0.0 } else { 1.0 };
    let norm =
        |name: String| Norm { gain: Spec::vector(format!("{name}.weight"), c.width, gain), bias: None };
    let dense = |parts: Vec<(String, usize)>, inputs: usize, biased: bool, deviation: f64| {
        let named = |suffix: &str| {
            parts.iter().map(|(name, rows)| (format!("{name}.{suffix}"), *rows)).collect::<Vec<_>>()
        };
        let outputs = parts.iter().map(|(_, rows)| rows).sum();
        let bias = biased.then(|| Spec { parts: named("bias"), ..Spec::vector(String::new(), outputs, 0.0) });
        Dense { weight: Spec::linear(named("weight"), inputs, deviation), bias, adapter: None }
    };
    let table = |name: &str| Spec::table(name, c.vocabulary, c);
    let block = |layer: usize| {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let (q, kv) = (c.heads * c.head_width, c.kv_heads * c.head_width);
        let qkv = vec![
            (name("self_attn.q_proj"), q),
            (name("self_attn.k_proj"), kv),
            (name("self_attn.v_proj"), kv),
        ];
        let head_norm =
            |which: &str| Spec::vector(name(&format!("self_attn.{which}_norm.weight")), c.head_width, gain);
        let up = vec![(name("mlp.gate_proj"), c.mlp_width), (name("mlp.up_proj"), c.mlp_width)];
        Block {
            attention_norm: norm(name("input_layernorm")),
            qkv: dense(qkv, c.width, c.qkv_bias, usual),
            head_norms: c.qk_norm.then(|| ["q", "k"].map(head_norm)),
            output: dense(vec![(name("self_attn.o_proj"), c.width)], q, c.output_bias, small),
            output_norm: gemma3.then(|| norm(name("post_attention_layernorm"))),
            mlp_norm: norm(name(if gemma3 {
                "pre_feedforward_layernorm"
            } else {
                "post_attention_layernorm"
            })),
            up: dense(up, c.width, c.mlp_bias, usual),
            down: dense(vec![(name("mlp.down_proj"), c.width)], c.mlp_width, c.mlp_bias, small),
            down_norm: gemma3.then(|| norm(name("post_feedforward_layernorm"))),
        }
    };
    Weights {
        embedding: table("model.embed_tokens.weight"),
        positions: None,
        blocks: (0..c.layers.len()).map(block).collect(),
        norm: norm("model.norm".into()),
        head: (!c.tied).then(|| table("lm_head.weight")),
    }
}
