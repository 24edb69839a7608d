//! What a decoder looks like, from `config.json`.

/// The model families temper knows; they share one decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// GPT-2: LayerNorm, learned positions, biases everywhere, GELU.
    Gpt2,
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on q, k and v.
    Qwen2,
    /// Llama with norms on q and k.
    Qwen3,
}

/// How the frequencies of rotary positions are changed for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As in the paper.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_context / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths shorter than `original_context / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// The context that the frequencies were trained for.
        original_context: usize,
    },
}

/// How a decoder knows the order of its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// A learned vector for each position, added to the embedding.
    Learned,
    /// Rotary embedding of q and k (Su et al. 2021, arXiv 2104.09864).
    Rotary {
        /// The base of the frequencies.
        theta: f64,
        /// Their scaling.
        scaling: RopeScaling,
    },
}

/// Dropout probabilities as the checkpoint's config states them; a run's `--dropout` replaces them all.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Dropout {
    /// On the sum of embeddings.
    pub embedding: f64,
    /// On attention probabilities.
    pub attention: f64,
    /// On each branch before it is added to the residual stream.
    pub residual: f64,
}

/// A decoder's dimensions and choices. All sizes are at least 1 and checked to fit together.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family, which decides the names of tensors.
    pub family: Family,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even when positions are rotary.
    pub head_width: usize,
    /// Inner width of the MLP.
    pub mlp_width: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
    /// Added to the variance in norms.
    pub norm_epsilon: f64,
    /// Position encoding.
    pub positions: Positions,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMSNorm on each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// The head's weight is the embedding.
    pub tied: bool,
    /// A token sees at most this many tokens, itself included.
    pub sliding_window: Option<usize>,
    /// Dropout of the checkpoint.
    pub dropout: Dropout,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

impl Config {
    /// GPT-2's LayerNorm, GELU; every other family has RMSNorm, SwiGLU.
    pub fn is_gpt2(&self) -> bool {
        self.family == Family::Gpt2
    }

    /// Columns of the fused q, k, v projection: `(heads + 2 kv_heads) * head_width`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_width
    }
}
impl Config { pub fn from_json(_: &serde_json::Value) -> Result<Config, super::Error> { Err(super::Error::Config{key:"".into(),expected:"".into(),found:"".into()}) } }
