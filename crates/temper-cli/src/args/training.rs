//! The options that the verbs that train have in common, and what they share with others.

use std::path::PathBuf;

use clap::Args;
use temper::checkpoint::save::SaveType;
use temper::data::order::Order;
use temper::data::{TrainOn, Truncation};
use temper::model::files::Quantise;
use temper::optim::Scheduler;
use temper::parallel::Strategy;
use temper_kernels::Precision;

use super::values::*;
use crate::mlflow::Address;

/// What every verb that trains reads.
#[derive(Args, Debug)]
pub struct Training {
    #[command(flatten)]
    pub files: TrainingFiles,
    #[command(flatten)]
    pub optimisation: Optimisation,
    #[command(flatten)]
    pub lora: LoraOptions,
    #[command(flatten)]
    pub evaluation: Evaluation,
    #[command(flatten)]
    pub samples: Sampled,
    #[command(flatten)]
    pub saving: Saving,
    #[command(flatten)]
    pub compute: Compute,
    #[command(flatten)]
    pub parallelism: Parallelism,
    #[command(flatten)]
    pub output: Output,
    /// Longest sequence in tokens [default: the smaller of 1024 and the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = positive, help_heading = "Tokens")]
    pub max_length: Option<usize>,
}

/// Where training reads and writes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct TrainingFiles {
    /// Training data: a .jsonl, .json, .csv or .txt file, also .gz or .zst, a .parquet file, or a folder of them
    #[arg(long)]
    pub data: PathBuf,
    /// Run directory: manifest, metrics (also for TensorBoard), checkpoints, final model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// TOML file of options, as in `learning_rate = 1e-5`; options given here win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How the weights are changed.
#[derive(Args, Debug)]
#[command(next_help_heading = "Optimisation")]
pub struct Optimisation {
    /// Highest learning rate
    #[arg(long, value_name = "RATE", value_parser = not_negative)]
    pub learning_rate: f64,
    /// How the learning rate falls after the warmup
    #[arg(long, value_name = "SHAPE", value_parser = choice(&SCHEDULERS))]
    pub lr_scheduler: Scheduler,
    /// Steps over which the learning rate rises from 0
    #[arg(long, value_name = "N", value_parser = whole, default_value = "0", conflicts_with = "warmup_ratio")]
    pub warmup_steps: u64,
    /// Warmup as a share of all steps
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub warmup_ratio: Option<f64>,
    /// Passes over the data
    #[arg(long, value_name = "N", value_parser = not_negative, default_value = "3")]
    pub epochs: f64,
    /// Optimizer steps, whatever `--epochs` says
    #[arg(long, value_name = "N", value_parser = steps)]
    pub max_steps: Option<u64>,
    /// Records (of preferences: pairs) of an optimizer step
    #[arg(long, value_name = "N", value_parser = positive, default_value = "8")]
    pub batch_size: usize,
    /// Tokens computed at a time; a step has as many parts as it needs, and the same result up to rounding
    #[arg(long, value_name = "TOKENS", value_parser = positive, default_value = "768")]
    pub microbatch_tokens: usize,
    /// Decoupled weight decay of the matrices
    #[arg(long, value_name = "DECAY", value_parser = not_negative, default_value = "0")]
    pub weight_decay: f64,
    /// AdamW's decay of the first moment, the mean of gradients
    #[arg(long, value_name = "BETA", value_parser = below_one, default_value = "0.9")]
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment, the mean of squared gradients
    #[arg(long, value_name = "BETA", value_parser = below_one, default_value = "0.999")]
    pub adam_beta2: f64,
    /// Added to the root of the mean of squared gradients
    #[arg(long, value_name = "EPSILON", value_parser = above_zero, default_value = "1e-8")]
    pub adam_epsilon: f64,
    /// Clips the global norm of the gradients to this; 0 turns it off
    #[arg(long, value_name = "NORM", value_parser = not_negative, default_value = "1.0")]
    pub max_grad_norm: f64,
    /// Dropout probability of embeddings, attention and residual branches; those in the model's configuration are not used
    /// [default: 0]
    #[arg(long, value_name = "P", value_parser = below_one)]
    pub dropout: Option<f64>,
    /// Order of the records within an epoch
    #[arg(long, value_parser = choice(&ORDERS), default_value = "shuffled")]
    pub order: Order,
    /// Seed of order, dropout and fresh weights
    #[arg(long, value_parser = whole, default_value = "42")]
    pub seed: u64,
}

/// Adapters instead of all weights.
#[derive(Args, Debug)]
#[command(next_help_heading = "LoRA")]
pub struct LoraOptions {
    /// What is trained: all weights, or low-rank adapters beside frozen ones; the options below need `lora`
    #[arg(long, value_name = "METHOD", value_parser = choice(&METHODS), default_value = "full")]
    pub method: Method,
    /// Rank of the adapters [default: 16]
    #[arg(long, value_name = "R", value_parser = positive, conflicts_with = "adapter")]
    pub lora_r: Option<usize>,
    /// What adapters add is scaled by `alpha / r` [default: 32]
    #[arg(long, value_name = "ALPHA", value_parser = above_zero, conflicts_with = "adapter")]
    pub lora_alpha: Option<f64>,
    /// Dropout at the adapters' inputs [default: 0, or the start adapter's]
    #[arg(long, value_name = "P", value_parser = below_one)]
    pub lora_dropout: Option<f64>,
    /// Layers with adapters: `all-linear`, or names as `q_proj,v_proj` [default: all-linear]
    #[arg(long, value_name = "NAMES", conflicts_with = "adapter")]
    pub lora_target: Option<String>,
    /// `rslora` scales by alpha/√r, `dora` trains norms apart from directions [default: lora]
    #[arg(long, value_name = "VARIANT", value_parser = choice(&VARIANTS), conflicts_with = "adapter")]
    pub lora_variant: Option<Variant>,
    /// Learning rate of the adapters' B, as a multiple of A's (LoRA+) [default: 1]
    #[arg(long, value_name = "RATIO", value_parser = above_zero)]
    pub lora_plus_ratio: Option<f64>,
    /// Modules to train whole beside the adapters, as `lm_head,embed_tokens`
    #[arg(long, value_name = "NAMES", conflicts_with = "adapter")]
    pub modules_to_save: Option<String>,
    /// How frozen weights are kept: as the file's quantised blocks, unpacked, or quantised to 4 or 8 bits
    /// [default: file]
    #[arg(long, value_name = "HOW", value_parser = choice(&QUANTISES))]
    pub quantize: Option<Quantise>,
    /// Adapter to go on with: the folder that PEFT or temper wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

/// An adapter on a model that is only used.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct AdapterOptions {
    /// Adapter to put on the model: the folder that PEFT or temper wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// How the model is kept: unpacked, as the file's quantised blocks, or quantised to 4 or 8 bits
    #[arg(long, value_name = "HOW", value_parser = choice(&QUANTISES), default_value = "none")]
    pub quantize: Quantise,
}

/// Held-out data.
#[derive(Args, Debug)]
#[command(next_help_heading = "Evaluation")]
pub struct Evaluation {
    /// Held-out data, evaluated before the first step and at the end
    #[arg(long, value_name = "DATA")]
    pub eval_data: Option<PathBuf>,
    /// Evaluate every so many steps too; 0 for the beginning and the end only
    #[arg(long, value_name = "N", value_parser = whole, default_value = "0", requires = "eval_data")]
    pub eval_steps: u64,
}

/// Answers during the run.
#[derive(Args, Debug)]
#[command(next_help_heading = "Samples")]
pub struct Sampled {
    /// Prompts that the model answers before the first step and at the end, into samples.jsonl: the lines of a .txt
    /// file, or records with `prompt` or `messages`. A chat template writes them as a user's message, but for a `prompt` in
    /// text beside its answer: that is read as it is, as in training
    #[arg(long, value_name = "FILE")]
    pub sample_prompts: Option<PathBuf>,
    /// Answer them every so many steps too; 0 for the beginning and the end only
    #[arg(long, value_name = "N", value_parser = whole, default_value = "0", requires = "sample_prompts")]
    pub sample_steps: u64,
    /// Longest answer in tokens
    #[arg(long, value_name = "N", value_parser = positive, default_value = "64", requires = "sample_prompts")]
    pub sample_max_new_tokens: usize,
}

/// Checkpoints and the final model.
#[derive(Args, Debug)]
#[command(next_help_heading = "Saving")]
pub struct Saving {
    /// Save a checkpoint every so many steps; with 0 only where a run is stopped
    #[arg(long, value_name = "N", value_parser = whole, default_value = "500")]
    pub save_steps: u64,
    /// Evaluate, save and stop after this step; the same command without it goes on
    #[arg(long, value_name = "STEP", value_parser = steps)]
    pub stop_after: Option<u64>,
    /// Checkpoints kept
    #[arg(long, value_name = "N", value_parser = positive, default_value = "2")]
    pub keep: usize,
    /// Number format of the final model
    #[arg(long, value_name = "TYPE", value_parser = choice(&SAVE_TYPES), default_value = "f32")]
    pub save_dtype: SaveType,
}

/// What is shown while it runs.
#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub struct Output {
    /// Say nothing but errors and warnings
    #[arg(long)]
    pub quiet: bool,
    /// Write events to standard output as JSON, one a line: steps and evaluations as in metrics.jsonl, what is saved,
    /// how it ended
    #[arg(long)]
    pub json: bool,
    /// Send settings and metrics to an MLflow server too, as `mlflow=http://HOST:PORT`; the experiment is `temper`, or
    /// what stands behind a `#`
    #[arg(long, value_name = "mlflow=URI", value_parser = Address::parse)]
    pub log_to: Option<Address>,
}

/// What computes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Computing")]
pub struct Compute {
    /// Number format of products: f32, or bf16 summed in f32 [default: bf16 where the processor has it]
    #[arg(long, value_name = "TYPE", value_parser = choice(&DTYPES), default_value = default_dtype(), hide_default_value = true)]
    pub dtype: Precision,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

/// Several processes, started by `mpirun`, `srun` and the like.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Processes")]
pub struct Parallelism {
    /// What each keeps: everything (ddp), its part of the optimizer's states (zero1), or its part of parameters,
    /// gradients and states (fsdp) [default: ddp]
    #[arg(long, value_name = "HOW", value_parser = choice(&STRATEGIES))]
    pub parallel: Option<Strategy>,
    /// How gradients are added: `exact` gives the same bits on any number of processes that divides the shards
    #[arg(long, value_name = "HOW", value_parser = choice(&REDUCES), default_value = "fast")]
    pub reduce: Reduce,
    /// Parts of a step that are computed apart and then added, with `--reduce exact` [default: 4]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub shards: Option<usize>,
}

/// The machines on which `temper plan` imagines a run.
#[derive(Args, Debug)]
#[command(next_help_heading = "Cluster")]
pub struct Cluster {
    /// Processes: says too what each would send and keep, and how long a step would take, with every `--parallel`
    #[arg(long, value_name = "N", value_parser = positive, global = true)]
    pub ranks: Option<usize>,
    /// What a process can send, in Gbit/s, while it receives as much [default: 10]
    #[arg(long, value_name = "GBIT/S", value_parser = above_zero, global = true)]
    pub bandwidth: Option<f64>,
    /// How long a message takes however short it is, in microseconds [default: 30]
    #[arg(long, value_name = "US", value_parser = not_negative, global = true)]
    pub latency: Option<f64>,
    /// Seconds that one process takes for a step, as metrics.jsonl has them [default: from the operations of a step
    /// and 60 % of this machine's peak]
    #[arg(long, value_name = "S", value_parser = above_zero, allow_negative_numbers = true, global = true)]
    pub step_seconds: Option<f64>,
}

impl Cluster {
    /// In Gbit/s.
    pub fn bandwidth(&self) -> f64 {
        self.bandwidth.unwrap_or(10.0)
    }

    /// In microseconds.
    pub fn latency(&self) -> f64 {
        self.latency.unwrap_or(30.0)
    }

    /// The first option that says something of processes; without any it has no effect.
    pub fn unused(&self) -> Option<&'static str> {
        let options = [
            ("--bandwidth", self.bandwidth),
            ("--latency", self.latency),
            ("--step-seconds", self.step_seconds),
        ];
        options.into_iter().find(|(_, value)| self.ranks.is_none() && value.is_some()).map(|(name, _)| name)
    }
}

/// What is done with records longer than allowed.
#[derive(Args, Debug)]
#[command(next_help_heading = "Tokens")]
pub struct Length {
    /// What to do with longer ones: cut the end or the beginning (not the BOS that begins every text; of a pair the same of
    /// both sides), leave the record out, or stop
    #[arg(long, value_name = "HOW", value_parser = choice(&TRUNCATIONS), default_value = "keep_start")]
    pub truncation: Truncation,
}

/// Which tokens there are and which are trained.
#[derive(Args, Debug)]
#[command(next_help_heading = "Tokens")]
pub struct Rendering {
    #[command(flatten)]
    pub length: Length,
    /// Tokens to train: the (last) answer, every answer of the assistant, or all
    /// [default: assistant for conversations, completion for prompts and completions]
    #[arg(long, value_name = "WHICH", value_parser = choice(&TRAIN_ON))]
    pub train_on: Option<TrainOn>,
}

/// The objective of DPO.
#[derive(Args, Debug)]
#[command(next_help_heading = "Preference")]
pub struct Preference {
    /// Strength of the pull to the reference
    #[arg(long, value_parser = above_zero, default_value = "0.1")]
    pub beta: f64,
    /// The loss of a pair
    #[arg(long, value_name = "LOSS", value_parser = choice(&LOSSES), default_value = "sigmoid")]
    pub loss_type: LossType,
    /// Assumed probability that a pair is the wrong way round
    #[arg(long, value_name = "SHARE", value_parser = below_half, default_value = "0")]
    pub label_smoothing: f64,
    /// Model to stay near to [default: the model as it is before the first step]
    #[arg(long, value_name = "MODEL")]
    pub reference: Option<PathBuf>,
}
