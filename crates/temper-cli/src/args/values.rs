//! The words that options take, what they stand for, and what numbers may be.

use std::num::IntErrorKind;
use std::ops::RangeBounds;
use std::path::Path;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use temper::checkpoint::save::SaveType;
use temper::data::order::Order;
use temper::data::{TrainOn, Truncation};
use temper::model::files::Quantise;
use temper::optim::Scheduler;
use temper::parallel::Strategy;
use temper_kernels::{Cpu, Precision};

use crate::report::plots::{PLOTS, Plot};

/// How gradients of several processes are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduce {
    /// One part of a step for each process.
    #[default]
    Fast,
    /// As many parts on any number of processes.
    Exact,
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

    /// What a file of this name holds; none when its ending says nothing.
    pub fn of_file(path: &Path) -> Option<ReportFormat> {
        let ending = path.extension()?.to_str()?;
        REPORT_FORMATS.iter().find(|(name, _)| name.eq_ignore_ascii_case(ending)).map(|&(_, format)| format)
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

pub(super) const SCHEDULERS: [(&str, Scheduler); 4] = [
    ("constant", Scheduler::Constant),
    ("linear", Scheduler::Linear),
    ("cosine", Scheduler::Cosine),
    ("wsd", Scheduler::Wsd),
];
pub(super) const STRATEGIES: [(&str, Strategy); 3] =
    [("ddp", Strategy::Ddp), ("zero1", Strategy::Zero1), ("fsdp", Strategy::Fsdp)];
pub(super) const REDUCES: [(&str, Reduce); 2] = [("fast", Reduce::Fast), ("exact", Reduce::Exact)];
pub(super) const ORDERS: [(&str, Order); 2] =
    [("shuffled", Order::Shuffled), ("sequential", Order::Sequential)];
pub(super) const TRUNCATIONS: [(&str, Truncation); 4] = [
    ("keep_start", Truncation::KeepStart),
    ("keep_end", Truncation::KeepEnd),
    ("drop", Truncation::Drop),
    ("error", Truncation::Error),
];
/// For what is never cut.
pub(super) const WHOLE: [(&str, Truncation); 2] = [("error", Truncation::Error), ("drop", Truncation::Drop)];
pub(super) const TRAIN_ON: [(&str, TrainOn); 3] =
    [("completion", TrainOn::Completion), ("assistant", TrainOn::Assistant), ("all", TrainOn::All)];
pub(super) const SAVE_TYPES: [(&str, SaveType); 3] =
    [("f32", SaveType::F32), ("bf16", SaveType::BF16), ("f16", SaveType::F16)];
pub(super) const DTYPES: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];
pub(super) const LOSSES: [(&str, LossType); 1] = [("sigmoid", LossType::Sigmoid)];
pub(super) const METHODS: [(&str, Method); 2] = [("full", Method::Full), ("lora", Method::Lora)];
pub(super) const VARIANTS: [(&str, Variant); 3] =
    [("lora", Variant::Lora), ("rslora", Variant::RsLora), ("dora", Variant::Dora)];
pub(super) const QUANTISES: [(&str, Quantise); 4] =
    [("file", Quantise::File), ("none", Quantise::None), ("nf4", Quantise::Nf4), ("int8", Quantise::Int8)];
pub(super) const REPORT_FORMATS: [(&str, ReportFormat); 5] = [
    ("html", ReportFormat::Html),
    ("svg", ReportFormat::Svg),
    ("png", ReportFormat::Png),
    ("csv", ReportFormat::Csv),
    ("json", ReportFormat::Json),
];
pub(super) const CHECKS: [(&str, Checks); 6] = [
    ("attention", Checks::Attention),
    ("gradients", Checks::Gradients),
    ("dpo-identity", Checks::DpoIdentity),
    ("forest", Checks::Forest),
    ("adapters", Checks::Adapters),
    ("all", Checks::All),
];

/// The word that stands for a value.
pub(super) fn name_of<T: PartialEq>(values: &[(&'static str, T)], value: &T) -> &'static str {
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
pub(super) fn choice<T: Clone + Send + Sync + 'static>(
    values: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(values.iter().map(|(name, _)| *name)).try_map(move |word| {
        let found = values.iter().find(|(name, _)| *name == word);
        found.map(|(_, value)| value.clone()).ok_or("not one of them")
    })
}

/// Parses the name of a plot.
pub(super) fn plot() -> impl TypedValueParser<Value = &'static Plot> {
    PossibleValuesParser::new(PLOTS.iter().map(|plot| plot.name))
        .try_map(|word| PLOTS.iter().find(|plot| plot.name == word).ok_or("not one of them"))
}

pub(super) fn default_dtype() -> &'static str {
    if Cpu::has_bf16() { "bf16" } else { "f32" }
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if number > 0 => Ok(number),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err("the number is too large".into()),
        _ => Err("expected a whole number from 1".into()),
    }
}

/// More would only wait for each other.
pub(super) fn threads(text: &str) -> Result<usize, String> {
    up_to(1024, text)
}

/// Rows of a product that is measured; more are as fast.
pub(super) fn rows(text: &str) -> Result<usize, String> {
    up_to(1 << 16, text)
}

fn up_to(most: usize, text: &str) -> Result<usize, String> {
    let number = positive(text).ok().filter(|&number| number <= most);
    number.ok_or_else(|| format!("expected a whole number from 1 to {most}"))
}

/// Optimizer steps, at least one.
pub(super) fn steps(text: &str) -> Result<u64, String> {
    positive(text).map(|steps| steps as u64)
}

pub(super) fn whole(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a whole number from 0".into())
}

/// Devices compute in f32: what rounds to infinity or to nothing there would act as another number.
const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
const LARGEST: f64 = f32::MAX as f64;

pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    number(text, 0.0..=LARGEST, "a number from 0 to 3.4e38")
}

pub(super) fn above_zero(text: &str) -> Result<f64, String> {
    number(text, SMALLEST..=LARGEST, "a number above 0, from 1.2e-38 to 3.4e38")
}

pub(super) fn share(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0, "a number from 0 to 1")
}

pub(super) fn below_one(text: &str) -> Result<f64, String> {
    number(text, 0.0..1.0, "a number from 0 to below 1")
}

pub(super) fn below_half(text: &str) -> Result<f64, String> {
    number(text, 0.0..0.5, "a number from 0 to below 0.5")
}

fn number(text: &str, range: impl RangeBounds<f64>, expected: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("expected {expected}"))
}
