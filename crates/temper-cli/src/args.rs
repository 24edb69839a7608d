//! The command line: every verb and its options, each defined once. Help, defaults, the keys of `--config` and
//! the manifest's settings all come from here.

use std::net::IpAddr;
use std::ops::RangeBounds;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use temper::checkpoint::save::SaveType;
use temper::data::order::Order;
use temper::data::{TrainOn, Truncation};
use temper::model::files::Quantise;
use temper::optim::Scheduler;
use temper::parallel::Strategy;
use temper_kernels::{Cpu, Precision};

use crate::mlflow::Address;
use crate::report::plots::{PLOTS, Plot};

/// Post-train language models on the CPU: SFT, DPO, and what goes with them
#[derive(Parser, Debug)]
#[command(name = "temper", version, max_term_width = 110, args_override_self = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Subcommand, Debug)]
pub enum Verb {
    #[command(flatten)]
    Trains(Trains),
    /// Log-probability of every completion, perplexity, preference accuracy
    #[command(
        after_help = "`row` is the number of the record in its file, from 0: line 1 of a .jsonl file is row 0.\n\
        Nothing is cut: a record longer than the model's context is an error.\n\nExample:\n  temper score --model runs/dpo/final --data held-out.jsonl --json > scores.jsonl"
    )]
    Score(Score),
    /// Answer the same prompts with several models or adapters, and score them on the same data
    #[command(
        after_help = "Models are in memory one at a time. MODEL+ADAPTER is a model with an adapter on it, as in base.gguf+runs/lora/final.\n\nExample:\n  temper compare SmolLM2-135M-Instruct runs/sft/final runs/dpo/final --prompts prompts.txt --data held-out.jsonl --html compare.html"
    )]
    Compare(Compare),
    /// Continue a prompt
    #[command(
        after_help = "Without sampling options the model's generation_config.json decides, else the likeliest token is taken.\n\nExample:\n  temper generate --model runs/sft/final --chat --prompt 'Why is the sky blue?' --temperature 0.7"
    )]
    Generate(Generate),
    /// Talk to a model in the terminal
    #[command(
        after_help = "Without sampling options the model's generation_config.json decides, else the likeliest token is taken.\n\nExample:\n  temper chat --model runs/dpo/final --system 'Answer briefly.'"
    )]
    Chat(Chat),
    /// Add an adapter's weights to its model, and compare the two
    #[command(
        after_help = "The result is an ordinary model folder.\n\nExample:\n  temper merge --model SmolLM2-135M-Instruct --adapter runs/lora/final --out merged --dtype bf16"
    )]
    Merge(Merge),
    /// What a model holds; with data, every token of a record: context, trained or cut
    #[command(
        mut_arg("truncation", |arg| arg.requires("data")),
        mut_arg("train_on", |arg| arg.requires("data")),
        after_help = "Example:\n  temper inspect --model SmolLM2-135M-Instruct --data chats.jsonl --rows 2"
    )]
    Inspect(Inspect),
    /// What a training run would need of memory, by purpose; takes the verb and its options
    #[command(
        after_help = "Nothing is trained and nothing written.\n\nExample:\n  temper plan dpo --model SmolLM2-135M --data preferences.jsonl --out runs/dpo --batch-size 32 --ranks 8 --bandwidth 10"
    )]
    Plan {
        #[command(flatten)]
        cluster: Cluster,
        /// The verb that would train.
        #[command(subcommand)]
        verb: Trains,
    },
    /// What runs came to: one page with curves, settings, answers and final numbers
    #[command(
        after_help = "The page needs no network and nothing beside it. A run may still be going on.\n\nExample:\n  temper report runs/sft runs/dpo --out report.html"
    )]
    Report(Report),
    /// Look at runs while they train: a page of this machine that follows a folder of them
    #[command(
        after_help = "With another --host than this machine's own, the page asks for a token, which is printed at the start.\n\nExample:\n  temper watch runs"
    )]
    Watch(Watch),
    /// Check the arithmetic on this machine
    #[command(after_help = "Example:\n  temper selftest attention")]
    Selftest(Selftest),
    /// Time the operations on this machine, beside what it could do at best
    #[command(after_help = "Example:\n  temper bench --dtype f32")]
    Bench(Bench),
    /// Train many runs of one verb, compare them, and keep the best one's configuration
    #[command(
        after_help = SWEEP_HELP
    )]
    Sweep(Sweep),
    /// See it work, offline: pretrain a tiny model, fine-tune it, align it, and look at the page
    #[command(after_help = "Example:\n  temper quickstart --out quickstart")]
    Quickstart(Quickstart),
}

/// The verbs that train.
#[derive(Subcommand, Debug)]
pub enum Trains {
    /// Supervised fine-tuning on text, completions or conversations
    #[command(
        mut_arg("learning_rate", |arg| arg.default_value("2e-5").required(false)),
        mut_arg("lr_scheduler", |arg| arg.default_value("linear").required(false)),
        after_help = "Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper sft --model SmolLM2-135M --data chats.jsonl --chat-template chatml --out runs/sft"
    )]
    Sft(Sft),
    /// Direct preference optimisation on pairs of a chosen and a rejected answer
    #[command(
        mut_arg("learning_rate", |arg| arg.default_value("1e-6").required(false)),
        mut_arg("lr_scheduler", |arg| arg.default_value("linear").required(false)),
        after_help = "Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper dpo --model runs/sft/final --data preferences.jsonl.gz --out runs/dpo --beta 0.1"
    )]
    Dpo(Dpo),
    /// Next-token training on documents, joined and cut into blocks of the maximal length
    #[command(
        mut_arg("learning_rate", |arg| arg.default_value("5e-4").required(false)),
        mut_arg("lr_scheduler", |arg| arg.default_value("cosine").required(false)),
        after_help = "Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper pretrain --config-model tiny/config.json --data books.txt --out runs/pretrain"
    )]
    Pretrain(Pretrain),
}

impl Trains {
    /// What they all read.
    pub fn training(&self) -> &Training {
        match self {
            Trains::Sft(options) => &options.training,
            Trains::Dpo(options) => &options.training,
            Trains::Pretrain(options) => &options.training,
        }
    }
}

/// Options of `temper sft`.
#[derive(Args, Debug)]
pub struct Sft {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub training: Training,
    #[command(flatten)]
    pub rendering: Rendering,
}

/// Options of `temper dpo`.
#[derive(Args, Debug)]
pub struct Dpo {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub training: Training,
    #[command(flatten)]
    pub length: Length,
    #[command(flatten)]
    pub preference: Preference,
}

/// Options of `temper pretrain`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("start").args(["model", "config_model"]).required(true))]
pub struct Pretrain {
    /// Model to go on with: a folder in Hugging Face layout or a .gguf file
    #[arg(long, value_name = "MODEL", help_heading = "Files")]
    pub model: Option<PathBuf>,
    /// Begin with fresh weights of this shape: a config.json with tokenizer.json beside it, or their folder
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub config_model: Option<PathBuf>,
    #[command(flatten)]
    pub training: Training,
}

/// A model and how it writes conversations.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct ModelAndTemplate {
    /// Model: a folder in Hugging Face layout or a .gguf file
    #[arg(long)]
    pub model: PathBuf,
    /// Chat template that replaces the model's own: `chatml`, or a Jinja file
    #[arg(long, value_name = "chatml|FILE")]
    pub chat_template: Option<String>,
}

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
    /// Training data: a .jsonl, .json, .parquet, .csv or .txt file, also .gz or .zst, or a folder of them
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
    #[arg(long, value_name = "N", default_value = "0", conflicts_with = "warmup_ratio")]
    pub warmup_steps: u64,
    /// Warmup as a share of all steps
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub warmup_ratio: Option<f64>,
    /// Passes over the data
    #[arg(long, value_name = "N", value_parser = not_negative, default_value = "3")]
    pub epochs: f64,
    /// Optimizer steps, whatever `--epochs` says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_steps: Option<u64>,
    /// Records (of preferences: pairs) of an optimizer step
    #[arg(long, value_name = "N", value_parser = positive, default_value = "8")]
    pub batch_size: usize,
    /// Tokens computed at a time; a step has as many parts as it needs, and the same result
    #[arg(long, value_name = "TOKENS", value_parser = positive, default_value = "768")]
    pub microbatch_tokens: usize,
    /// Decoupled weight decay of the matrices
    #[arg(long, value_name = "DECAY", value_parser = not_negative, default_value = "0")]
    pub weight_decay: f64,
    /// AdamW's decay of the mean of gradients
    #[arg(long, value_name = "BETA", value_parser = below_one, default_value = "0.9")]
    pub adam_beta1: f64,
    /// AdamW's decay of the mean of squared gradients
    #[arg(long, value_name = "BETA", value_parser = below_one, default_value = "0.999")]
    pub adam_beta2: f64,
    /// Added to the root of the mean of squared gradients
    #[arg(long, value_name = "EPSILON", value_parser = above_zero, default_value = "1e-8")]
    pub adam_epsilon: f64,
    /// Gradients with a larger norm are scaled down to it; 0 never
    #[arg(long, value_name = "NORM", value_parser = not_negative, default_value = "1.0")]
    pub max_grad_norm: f64,
    /// Dropout probability, instead of all in the model's configuration [default: off]
    #[arg(long, value_name = "P", value_parser = below_one)]
    pub dropout: Option<f64>,
    /// Order of the records within an epoch
    #[arg(long, value_parser = choice(&ORDERS), default_value = "shuffled")]
    pub order: Order,
    /// Seed of order, dropout and fresh weights
    #[arg(long, default_value = "42")]
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
    /// Adapters count `alpha / r` times [default: 32]
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
    /// The adapters' B learns so many times faster than A (LoRA+) [default: 1]
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

/// Options that need `--method lora`.
pub const LORA_ONLY: [&str; 9] = [
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "lora_variant",
    "lora_plus_ratio",
    "modules_to_save",
    "quantize",
    "adapter",
];

/// An adapter on a model that is only used.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct AdapterOptions {
    /// Adapter to put on the model: the folder that PEFT or temper wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// How the model below it is kept: unpacked, as the file's quantised blocks, or quantised to 4 or 8 bits
    /// [default: none]
    #[arg(long, value_name = "HOW", value_parser = choice(&QUANTISES), requires = "adapter")]
    pub quantize: Option<Quantise>,
}

/// Held-out data.
#[derive(Args, Debug)]
#[command(next_help_heading = "Evaluation")]
pub struct Evaluation {
    /// Held-out data, evaluated at the end
    #[arg(long, value_name = "DATA")]
    pub eval_data: Option<PathBuf>,
    /// Evaluate every so many steps too; 0 for the end only
    #[arg(long, value_name = "N", default_value = "0", requires = "eval_data")]
    pub eval_steps: u64,
}

/// Answers during the run.
#[derive(Args, Debug)]
#[command(next_help_heading = "Samples")]
pub struct Sampled {
    /// Prompts that the model answers before the first step and at the end, into samples.jsonl: the lines of a .txt
    /// file, or records with `prompt` or `messages`
    #[arg(long, value_name = "FILE")]
    pub sample_prompts: Option<PathBuf>,
    /// Answer them every so many steps too; 0 for the beginning and the end only
    #[arg(long, value_name = "N", default_value = "0", requires = "sample_prompts")]
    pub sample_steps: u64,
    /// Longest answer in tokens
    #[arg(long, value_name = "N", value_parser = positive, default_value = "64", requires = "sample_prompts")]
    pub sample_max_new_tokens: usize,
}

/// Checkpoints and the final model.
#[derive(Args, Debug)]
#[command(next_help_heading = "Saving")]
pub struct Saving {
    /// Save a checkpoint every so many steps; 0 for none
    #[arg(long, value_name = "N", default_value = "500")]
    pub save_steps: u64,
    /// Evaluate, save and stop after this step; the same command without it goes on
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
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
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
}

/// Several processes, started by `mpirun`, `srun` and the like.
#[derive(Args, Debug)]
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
    /// What a process can send, in Gbit/s, while it receives as much
    #[arg(long, value_name = "GBIT/S", value_parser = above_zero, global = true, default_value = "10")]
    pub bandwidth: f64,
    /// How long a message takes however short it is, in microseconds
    #[arg(long, value_name = "US", value_parser = not_negative, global = true, default_value = "30")]
    pub latency: f64,
    /// Seconds that one process takes for a step, as metrics.jsonl has them [default: from the operations of a step
    /// and 60 % of this machine's peak]
    #[arg(long, value_name = "S", value_parser = above_zero, global = true)]
    pub step_seconds: Option<f64>,
}

/// How gradients of several processes are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// One part of a step for each process.
    Fast,
    /// As many parts on any number of processes.
    Exact,
}

/// What is done with records longer than allowed.
#[derive(Args, Debug)]
#[command(next_help_heading = "Tokens")]
pub struct Length {
    /// What to do with longer ones: cut the end or the beginning, leave the record out, or stop
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
    #[arg(long, value_parser = not_negative, default_value = "0.1")]
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

/// Options of `temper score`.
#[derive(Args, Debug)]
pub struct Score {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub adapter: AdapterOptions,
    /// Data: a .jsonl, .json, .parquet, .csv or .txt file, also .gz or .zst, or a folder of them
    #[arg(long)]
    pub data: PathBuf,
    /// Write one JSON object for each record, and a summary last
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
    /// Tokens computed at a time
    #[arg(long, value_name = "TOKENS", value_parser = positive, default_value = "1024")]
    pub microbatch_tokens: usize,
}

/// How answers are drawn.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Longest answer in tokens
    #[arg(long, value_name = "N", value_parser = positive, default_value = "256")]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T", value_parser = not_negative)]
    pub temperature: Option<f64>,
    /// Draw from this many of the likeliest tokens; 0 from all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw from the fewest likeliest tokens whose probabilities reach this
    #[arg(long, value_name = "P", value_parser = share)]
    pub top_p: Option<f64>,
    /// Seed of the draws [default: 42]
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Options of `temper generate`.
#[derive(Args, Debug)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub adapter: AdapterOptions,
    /// The prompt; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub prompt: String,
    /// Give the prompt as a user's message, through the chat template
    #[arg(long, help_heading = "Prompt")]
    pub chat: bool,
    /// A system message before it
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompt")]
    pub system: Option<String>,
    /// Number of answers
    #[arg(long, value_name = "N", value_parser = positive, default_value = "1", help_heading = "Prompt")]
    pub samples: usize,
    #[command(flatten)]
    pub sampling: SamplingOptions,
    #[command(flatten)]
    pub compute: Compute,
}

/// Options of `temper compare`.
#[derive(Args, Debug)]
pub struct Compare {
    /// Models: folders in Hugging Face layout or .gguf files, each with `+ADAPTER` behind it for an adapter on it
    #[arg(value_name = "MODEL[+ADAPTER]", required = true)]
    pub models: Vec<String>,
    /// Prompts: the lines of a .txt file, or records with `prompt` or `messages`
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub prompts: PathBuf,
    /// Data to score: log-probabilities, and of preferences the accuracy
    #[arg(long, help_heading = "Files")]
    pub data: Option<PathBuf>,
    /// Chat template that replaces every model's own: `chatml`, or a Jinja file
    #[arg(long, value_name = "chatml|FILE", help_heading = "Files")]
    pub chat_template: Option<String>,
    /// Write a page with answers and scores too
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
    /// Write one JSON object for each prompt and model, and for each model's scores
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingOptions,
    #[command(flatten)]
    pub compute: Compute,
    /// Tokens scored at a time
    #[arg(long, value_name = "TOKENS", value_parser = positive, default_value = "1024", requires = "data")]
    pub microbatch_tokens: usize,
}

/// Options of `temper chat`.
#[derive(Args, Debug)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub adapter: AdapterOptions,
    /// A system message to begin with
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingOptions,
    #[command(flatten)]
    pub compute: Compute,
}

/// Options of `temper merge`.
#[derive(Args, Debug)]
pub struct Merge {
    /// Model that the adapter was trained on: a folder in Hugging Face layout or a .gguf file
    #[arg(long, help_heading = "Files")]
    pub model: PathBuf,
    /// Adapter: the folder that PEFT or temper wrote
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub adapter: PathBuf,
    /// Folder for the merged model; must be new
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    pub out: PathBuf,
    /// Number format of the merged model
    #[arg(long, value_name = "TYPE", value_parser = choice(&SAVE_TYPES), default_value = "f32", help_heading = "Files")]
    pub dtype: SaveType,
    /// How the model was kept in training, to say what merging into the unquantised one changes
    #[arg(long, value_name = "HOW", value_parser = choice(&QUANTISES), default_value = "file", help_heading = "Files")]
    pub quantize: Quantise,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Computing")]
    pub threads: Option<usize>,
}

/// Options of `temper inspect`.
#[derive(Args, Debug)]
pub struct Inspect {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    /// List every tensor
    #[arg(long, conflicts_with = "data")]
    pub tensors: bool,
    /// Show the tokens of this data's records instead
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Number of records to show
    #[arg(long, value_name = "N", value_parser = positive, default_value = "1", requires = "data", help_heading = "Tokens")]
    pub rows: usize,
    /// Longest sequence in tokens [default: the smaller of 1024 and the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = positive, requires = "data", help_heading = "Tokens")]
    pub max_length: Option<usize>,
    #[command(flatten)]
    pub rendering: Rendering,
}

/// Options of `temper report`.
#[derive(Args, Debug)]
pub struct Report {
    /// Run directories: what was given to `--out`
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// File to write [default: report.html, or report with the format's ending]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The page, one plot as a picture, or every point as data
    #[arg(long, value_name = "FORMAT", value_parser = choice(&REPORT_FORMATS), default_value = "html")]
    pub format: ReportFormat,
    /// Which plot is drawn, or whose points are written [default: loss for a picture, all for data]
    #[arg(long, value_name = "NAME", value_parser = plot())]
    pub plot: Option<&'static Plot>,
}

/// Options of `temper watch`.
#[derive(Args, Debug)]
pub struct Watch {
    /// Folder of runs, or a run; runs are found up to four folders below
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Port of the page; 0 takes any that is free
    #[arg(long, value_name = "PORT", default_value = "6007")]
    pub port: u16,
    /// Address to listen at; at the default one only this machine can ask
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
}

/// Options of `temper selftest`.
#[derive(Args, Debug)]
pub struct Selftest {
    /// What to check
    #[arg(value_name = "WHAT", value_parser = choice(&CHECKS), default_value = "all")]
    pub what: Checks,
    /// Write one JSON object for each check
    #[arg(long)]
    pub json: bool,
}

/// Options of `temper bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// Rows of a micro-batch
    #[arg(long, value_name = "N", value_parser = positive, default_value = "1024")]
    pub rows: usize,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
}

/// Options of `temper sweep`.
#[derive(Args, Debug)]
pub struct Sweep {
    /// TOML file: a verb, its options, and the space of those that vary; see below
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Runs at a time; they share the threads, and each needs its memory
    #[arg(long, value_name = "N", value_parser = positive, default_value = "1")]
    pub jobs: usize,
    /// List the runs and their commands, and train nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What `temper sweep --help` says of its file.
const SWEEP_HELP: &str = "\
The file:
  verb = \"sft\"              # sft, dpo or pretrain
  out = \"sweeps/lr\"         # folder: runs/, table.md, table.csv, best.toml
  metric = \"eval_loss\"      # last value of this key of metrics.jsonl decides [default: eval_loss]
  goal = \"min\"              # or \"max\"; needed unless the metric is a loss
  samples = 20              # draw so many points of the space with `seed`, instead of taking all
  seed = 0
  [base]                    # options of the verb, as in its --config
  model = \"SmolLM2-135M\"
  data = \"chats.jsonl\"
  eval_data = \"held-out.jsonl\"
  [space]                   # every combination
  learning_rate = [1e-5, 2e-5, 5e-5]
  max_steps = [25, 50, 100]
  # with `samples` also: { log = [1e-6, 1e-4] }, { uniform = [0, 0.1] }, { whole = [4, 64] }
  [halving]                 # optional: stop the worse runs early
  first = 0.25              # after this share of `max_steps`, then twice (1 / keep) as much, …
  keep = 0.5                # this share of the runs goes on

Instead of [space], one table [[runs]] for each run. The same command goes on with an interrupted sweep, skips what \
is done, and tries failed runs again.

Runs that differ only in `max_steps` share the steps at which they are in the same state, exactly: with \
lr_scheduler = \"constant\", or \"wsd\" before its decay, and no warmup_ratio. Others are trained whole. The cheapest way \
to compare lengths is one run with --eval-steps.

Example:
  temper sweep lr.toml --jobs 2";

/// Options of `temper quickstart`.
#[derive(Args, Debug)]
pub struct Quickstart {
    /// A chat model of your own, as a folder or a `.gguf` file: SFT and DPO on it with two small embedded data
    /// sets, instead of a small world and a model from nothing
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Folder for the models, the data and the page; must be new or empty
    #[arg(long, value_name = "DIR", default_value = "temper-quickstart")]
    pub out: PathBuf,
    /// The same way in seconds, too short to learn anything
    #[arg(long)]
    pub smoke: bool,
    /// Seed of the world, the weights and the samples; with `--model`, of the order of the records
    #[arg(long, default_value = "0")]
    pub seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
}

/// What a report is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportFormat {
    Html,
    Svg,
    Png,
    Csv,
    Json,
}

impl ReportFormat {
    /// As `--format` has it, and as files end.
    pub fn name(self) -> &'static str {
        name_of(&REPORT_FORMATS, &self)
    }
}

/// Losses of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossType {
    /// `−log σ(βΔ)`.
    Sigmoid,
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Every weight.
    Full,
    /// Adapters.
    Lora,
}

/// Kinds of adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Scaled by `alpha / r`.
    Lora,
    /// Scaled by `alpha / √r`.
    RsLora,
    /// With magnitudes.
    Dora,
}

/// Groups of checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checks {
    /// Attention against stored values.
    Attention,
    /// Gradients against finite differences.
    Gradients,
    /// The identity behind DPO.
    DpoIdentity,
    /// Forests against single sequences.
    Forest,
    /// Adapters that change nothing against none.
    Adapters,
    /// All of them.
    All,
}

const SCHEDULERS: [(&str, Scheduler); 4] = [
    ("constant", Scheduler::Constant),
    ("linear", Scheduler::Linear),
    ("cosine", Scheduler::Cosine),
    ("wsd", Scheduler::Wsd),
];
const STRATEGIES: [(&str, Strategy); 3] =
    [("ddp", Strategy::Ddp), ("zero1", Strategy::Zero1), ("fsdp", Strategy::Fsdp)];
const REDUCES: [(&str, Reduce); 2] = [("fast", Reduce::Fast), ("exact", Reduce::Exact)];
const ORDERS: [(&str, Order); 2] = [("shuffled", Order::Shuffled), ("sequential", Order::Sequential)];
const TRUNCATIONS: [(&str, Truncation); 4] = [
    ("keep_start", Truncation::KeepStart),
    ("keep_end", Truncation::KeepEnd),
    ("drop", Truncation::Drop),
    ("error", Truncation::Error),
];
const TRAIN_ON: [(&str, TrainOn); 3] =
    [("completion", TrainOn::Completion), ("assistant", TrainOn::Assistant), ("all", TrainOn::All)];
const SAVE_TYPES: [(&str, SaveType); 3] =
    [("f32", SaveType::F32), ("bf16", SaveType::BF16), ("f16", SaveType::F16)];
const DTYPES: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];
const LOSSES: [(&str, LossType); 1] = [("sigmoid", LossType::Sigmoid)];
const METHODS: [(&str, Method); 2] = [("full", Method::Full), ("lora", Method::Lora)];
const VARIANTS: [(&str, Variant); 3] =
    [("lora", Variant::Lora), ("rslora", Variant::RsLora), ("dora", Variant::Dora)];
const QUANTISES: [(&str, Quantise); 4] =
    [("file", Quantise::File), ("none", Quantise::None), ("nf4", Quantise::Nf4), ("int8", Quantise::Int8)];
const REPORT_FORMATS: [(&str, ReportFormat); 5] = [
    ("html", ReportFormat::Html),
    ("svg", ReportFormat::Svg),
    ("png", ReportFormat::Png),
    ("csv", ReportFormat::Csv),
    ("json", ReportFormat::Json),
];
const CHECKS: [(&str, Checks); 6] = [
    ("attention", Checks::Attention),
    ("gradients", Checks::Gradients),
    ("dpo-identity", Checks::DpoIdentity),
    ("forest", Checks::Forest),
    ("adapters", Checks::Adapters),
    ("all", Checks::All),
];

/// The word that stands for a value.
fn name_of<T: PartialEq>(values: &[(&'static str, T)], value: &T) -> &'static str {
    values.iter().find(|(_, other)| other == value).map_or("", |(name, _)| name)
}

/// As `--quantize` has it.
pub fn quantise_name(quantise: Quantise) -> &'static str {
    name_of(&QUANTISES, &quantise)
}

/// As `--lora-variant` has it.
pub fn variant_name(variant: Variant) -> &'static str {
    name_of(&VARIANTS, &variant)
}

/// Parses one of some words.
fn choice<T: Clone + Send + Sync + 'static>(
    values: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(values.iter().map(|(name, _)| *name)).try_map(move |word| {
        let found = values.iter().find(|(name, _)| *name == word);
        found.map(|(_, value)| value.clone()).ok_or("not one of them")
    })
}

/// Parses the name of a plot.
fn plot() -> impl TypedValueParser<Value = &'static Plot> {
    PossibleValuesParser::new(PLOTS.iter().map(|plot| plot.name))
        .try_map(|word| PLOTS.iter().find(|plot| plot.name == word).ok_or("not one of them"))
}

fn default_dtype() -> &'static str {
    if Cpu::has_bf16() { "bf16" } else { "f32" }
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a whole number from 1".into())
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, 0.0..f64::INFINITY, "a number from 0")
}

fn above_zero(text: &str) -> Result<f64, String> {
    number(text, f64::MIN_POSITIVE..f64::INFINITY, "a number above 0")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0, "a number from 0 to 1")
}

fn below_one(text: &str) -> Result<f64, String> {
    number(text, 0.0..1.0, "a number from 0 to below 1")
}

fn below_half(text: &str) -> Result<f64, String> {
    number(text, 0.0..0.5, "a number from 0 to below 0.5")
}

fn number(text: &str, range: impl RangeBounds<f64>, expected: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("expected {expected}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_options_fit_together() {
        super::Cli::command().debug_assert();
    }
}
