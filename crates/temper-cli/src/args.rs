//! The command line: every verb and its options, each defined once. Help, defaults, the keys of `--config` and
//! the manifest's settings all come from here.

mod scope;
mod training;
mod values;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use temper::checkpoint::save::SaveType;
use temper::data::Truncation;
use temper::model::files::Quantise;

use crate::report::plots::Plot;
pub use scope::Scope;
pub use training::*;
use values::*;
pub use values::{Checks, LossType, Method, Reduce, ReportFormat, Variant, quantise_name, variant_name};

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
        after_help = "`row` is the number of the record in its file, from 0; headers and blank lines do not count.\n\
        Nothing is cut.\n\nExample:\n  temper score --model runs/dpo/final --data held-out.jsonl --json > scores.jsonl"
    )]
    Score(Score),
    /// Answer the same prompts with several models or adapters, and score them on the same data
    #[command(
        after_help = "Models are in memory one at a time. Without --max-new-tokens, the smallest of their own limits holds for all. MODEL+ADAPTER is a model with an adapter on it, as in base.gguf+runs/lora/final.\n\nExample:\n  temper compare SmolLM2-135M-Instruct runs/sft/final runs/dpo/final --prompts prompts.txt --data held-out.jsonl --html compare.html"
    )]
    Compare(Compare),
    /// Continue a prompt
    #[command(
        mut_arg("chat_template", |arg| arg.requires("chat")),
        after_help = "What no sampling option says is as the model's generation_config.json has it; where that draws nothing, the likeliest token is taken.\n\nExample:\n  temper generate --model runs/sft/final --chat --prompt 'Why is the sky blue?' --temperature 0.7"
    )]
    Generate(Generate),
    /// Talk to a model in the terminal
    #[command(
        after_help = "What no sampling option says is as the model's generation_config.json has it; where that draws nothing, the likeliest token is taken.\n\nExample:\n  temper chat --model runs/dpo/final --system 'Answer briefly.'"
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
        mut_subcommands(|verb| {
            verb.mut_arg("out", |arg| arg.required(false).default_value("run"))
                .after_help("Nothing is trained and nothing written.")
        }),
        after_help = "Nothing is trained and nothing written.\n\nExample:\n  temper plan dpo --model SmolLM2-135M --data preferences.jsonl --batch-size 32 --ranks 8 --bandwidth 10"
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
        after_help = "Records of the data, in one form:\n\
        \x20 {\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]}\n\
        \x20 {\"prompt\": \"…\", \"completion\": \"…\"}, with texts or lists of messages\n\
        \x20 {\"instruction\": \"…\", \"input\": \"…\", \"output\": \"…\"}\n\
        \x20 {\"conversations\": [{\"from\": \"human\", \"value\": \"…\"}, {\"from\": \"gpt\", \"value\": \"…\"}]}\n\
        \x20 {\"text\": \"…\"}\n\
        \x20 preferences, as for `temper dpo`: the chosen answers\n\
        A column `system` beside messages and instructions is their system message.\n\
        Records with \"label\" or \"kto_tag\" false are left out; an answer with \"weight\": 0 beside its content is context.\n\
        What a template writes for an answer is trained, whatever its `{% generation %}` marks say.\n\
        Columns `tools` and `chat_template_kwargs` are given to the chat template.\n\n\
        Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper sft --model SmolLM2-135M --data chats.jsonl --chat-template chatml --out runs/sft"
    )]
    Sft(Sft),
    /// Direct preference optimisation on pairs of a chosen and a rejected answer
    #[command(
        mut_arg("learning_rate", |arg| arg.default_value("1e-6").required(false)),
        mut_arg("lr_scheduler", |arg| arg.default_value("linear").required(false)),
        after_help = "Records of the data, in one form:\n\
        \x20 {\"prompt\": \"…\", \"chosen\": \"…\", \"rejected\": \"…\"}, with texts or lists of messages\n\
        \x20 {\"chosen\": …, \"rejected\": …}, each a whole conversation\n\
        \x20 {\"instruction\": \"…\", \"input\": \"…\", \"chosen\": \"…\", \"rejected\": \"…\"}\n\
        \x20 {\"conversations\": […], \"chosen\": {…}, \"rejected\": {…}}, messages\n\
        A column `system` beside messages and instructions is their system message.\n\n\
        Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper dpo --model runs/sft/final --data preferences.jsonl.gz --out runs/dpo --beta 0.1"
    )]
    Dpo(Dpo),
    /// Next-token training on documents, joined and cut into blocks of the maximal length
    #[command(
        mut_arg("learning_rate", |arg| arg.default_value("5e-4").required(false)),
        mut_arg("lr_scheduler", |arg| arg.default_value("cosine").required(false)),
        after_help = "Records of the data: {\"text\": \"…\"}; a .txt file is one document.\n\n\
        Ctrl-C saves what is done; run the same command again to go on with an interrupted run.\n\nExample:\n  temper pretrain --config-model tiny/config.json --data books.txt --out runs/pretrain"
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

/// Options of `temper score`.
#[derive(Args, Debug)]
pub struct Score {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub adapter: AdapterOptions,
    /// Data: a .jsonl, .json, .csv or .txt file, also .gz or .zst, a .parquet file, or a folder of them
    #[arg(long)]
    pub data: PathBuf,
    /// What to do with records longer than the model's context: stop, or leave them out
    #[arg(long, value_name = "HOW", value_parser = choice(&WHOLE), default_value = "error")]
    pub truncation: Truncation,
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
    /// Longest answer in tokens [default: as generation_config.json has it, else 256]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_new_tokens: Option<usize>,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T", value_parser = not_negative)]
    pub temperature: Option<f64>,
    /// Draw from this many of the likeliest tokens; 0 from all
    #[arg(long, value_name = "K", value_parser = whole)]
    pub top_k: Option<u64>,
    /// Draw from the fewest likeliest tokens whose probabilities reach this
    #[arg(long, value_name = "P", value_parser = share)]
    pub top_p: Option<f64>,
    /// Seed of the draws [default: 42]
    #[arg(long, value_parser = whole)]
    pub seed: Option<u64>,
}

/// Options of `temper generate`.
#[derive(Args, Debug)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelAndTemplate,
    #[command(flatten)]
    pub adapter: AdapterOptions,
    /// The prompt; `-` reads it from standard input, without a line's end behind it
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
    /// Prompts: the lines of a .txt file, or records with `prompt` or `messages`. A chat template writes them as a user's
    /// message, but for a `prompt` in text beside its answer: that is read as it is, as in training
    #[arg(long, value_name = "FILE", help_heading = "Files")]
    pub prompts: PathBuf,
    /// Data to score: log-probabilities, and of preferences the accuracy
    #[arg(long, help_heading = "Files")]
    pub data: Option<PathBuf>,
    /// What to do with records longer than a model's context: stop, or leave them out
    #[arg(long, value_name = "HOW", value_parser = choice(&WHOLE), default_value = "error", requires = "data", help_heading = "Files")]
    pub truncation: Truncation,
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
    #[arg(long, value_name = "N", value_parser = threads, help_heading = "Computing")]
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
    /// Run directories, which were given to `--out`, or folders with runs in them
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// File to write [default: report, with the format's ending]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The page, one plot as a picture, or every point as data [default: what `--out` ends with, or html]
    #[arg(long, value_name = "FORMAT", value_parser = choice(&REPORT_FORMATS))]
    pub format: Option<ReportFormat>,
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
    #[arg(long, value_name = "N", value_parser = rows, default_value = "1024")]
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
  out = \"sweeps/lr\"         # folder: runs/, table.md, table.csv, best.toml, report.html
  metric = \"eval_loss\"      # last value of this key of metrics.jsonl decides [default: eval_loss]
  goal = \"min\"              # or \"max\"; needed unless the metric is a loss
  # samples = 5             # draw so many points of the space with `seed`, instead of taking all
  # seed = 0
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
    #[arg(long, value_parser = whole, default_value = "0")]
    pub seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_options_fit_together() {
        super::Cli::command().debug_assert();
    }

    /// A name that no option has any more would be a line of [`super::Scope::of`] without effect.
    #[test]
    fn every_option_with_a_scope_is_there() {
        let command = super::Cli::command();
        let names = include_str!("args/scope.rs").split('"').skip(1).step_by(2);
        for name in names.filter(|name| super::Scope::of(name) != super::Scope::Numbers) {
            let has = |verb: &&str| {
                let verb = command.find_subcommand(verb).unwrap();
                verb.get_arguments().any(|argument| argument.get_id() == name)
            };
            assert!(["sft", "dpo", "pretrain"].iter().any(has), "{name}");
        }
    }
}
