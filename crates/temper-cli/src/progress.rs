//! Progress on stderr: bars on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::iter;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use temper::model::Adapted;
use temper::train::{Event, Metrics, Objective, Run, Sample, Start, StepReport};

use crate::output::{duration, grouped, is_quiet, say, set_bar, warn};

/// Columns from which a line has room for a bar.
const WITH_BAR: usize = 100;

/// Plain lines come no closer together.
const BETWEEN_LINES: Duration = Duration::from_secs(2);

/// Samples shown each time, and letters of each prompt and answer.
const SHOWN_SAMPLES: usize = 2;
const SHOWN_LETTERS: usize = 60;

/// A count with a bar on a terminal, and now and then a line elsewhere.
pub struct Counter {
    label: &'static str,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Counter {
    /// A counter up to `total`.
    pub fn new(label: &'static str, total: u64) -> Counter {
        let bar = if columns() < WITH_BAR { "" } else { "{bar:16} " };
        let style = ProgressStyle::with_template(&format!("{{prefix:>10}}  {bar}{{pos}}/{{len}}  {{msg}}"));
        let bar = (has_bars() && !is_quiet()).then(|| {
            let bar = ProgressBar::new(total).with_prefix(label);
            if let Ok(style) = style { bar.with_style(style) } else { bar }
        });
        set_bar(bar.clone());
        Counter { label, bar, last_line: None }
    }

    /// A counter that writes lines, also on a terminal.
    pub fn lines(label: &'static str) -> Counter {
        Counter { label, bar: None, last_line: None }
    }

    /// Shows that `done` of `total` are done, and more, what matters most first: behind a bar as much as the line has
    /// room for. A plain line is written when enough time has gone by, and for the last.
    pub fn show(&mut self, done: u64, total: u64, more: &[String]) {
        if let Some(bar) = &self.bar {
            let columns = columns();
            let before = 12 + if columns < WITH_BAR { 0 } else { 17 } + format!("{done}/{total}").len();
            bar.set_message(fitting(more, columns.saturating_sub(before)));
            return bar.set_position(done);
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES);
        if due || done == total {
            self.last_line = Some(Instant::now());
            let counts = format!("{}/{}", grouped(done), grouped(total));
            say(
                self.label,
                iter::once(&counts).chain(more).map(String::as_str).collect::<Vec<_>>().join("  "),
            );
        }
    }

    /// Leaves the bar as it is.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
            set_bar(None);
            // The cursor is left behind the bar.
            let _ = writeln!(std::io::stderr());
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Whether stderr is a terminal that can draw a line again.
pub fn has_bars() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Columns of the terminal that bars are drawn on; 0 is how one says that it does not know.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stderr());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|&columns| columns > 0).unwrap_or(80)
}

/// The first parts that fit so many columns, each after two spaces.
fn fitting(parts: &[String], columns: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let separator = if line.is_empty() { "" } else { "  " };
        if line.chars().count() + separator.len() + part.chars().count() + 2 > columns {
            break;
        }
        line = line + separator + part;
    }
    line
}

/// Shows the events of a run.
pub struct Progress {
    steps: u64,
    /// Whether the first loss must be ln 2: the policy is its reference, and nothing is dropped.
    starts_at_reference: bool,
    preference: bool,
    /// Where the reference's log-probabilities come from.
    source: String,
    cache: Option<String>,
    reference: Option<Counter>,
    training: Option<Counter>,
    /// Whether there may be bars; standard output may be the same terminal.
    bars: bool,
    begun: Instant,
    first: u64,
}

impl Progress {
    /// Shows the events of this run, with bars where there is a terminal, or as lines.
    pub fn new(run: &Run<'_>, bars: bool) -> Progress {
        let preference = run.objective != Objective::Sft;
        // Fresh adapters change nothing, whatever is dropped before them.
        let adapters = match run.start {
            Start::Adapted(_, Adapted { adapter: Some(_), lora, .. }) => lora.dropout > 0.0,
            _ => false,
        };
        let dropout = adapters || run.settings.dropout != Default::default();
        Progress {
            steps: run.steps,
            starts_at_reference: preference && run.reference.is_none() && !dropout,
            preference,
            source: match run.reference {
                Some(model) => format!("log-probabilities of `{}`", model.path.display()),
                None => "log-probabilities of the model as it is before the first step".into(),
            },
            cache: run.cache.as_ref().map(|cache| cache.folder.display().to_string()),
            reference: None,
            training: None,
            bars,
            begun: Instant::now(),
            first: 0,
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Reference(done, total) => self.reference(done as u64, total as u64),
            Event::Resumed(step) => say("resume", format!("after step {}", grouped(step))),
            Event::Step(report) => self.step(report),
            Event::Evaluated(step, report) => {
                say("eval", format!("step {step}  {}", numbers(report).join("  ")))
            }
            Event::Sampled(step, samples) => show_samples(step, samples),
            Event::LostTensorBoard(error) => warn(format!(
                "cannot write the file for TensorBoard: {error}; it is made again when the run goes on"
            )),
            Event::LostCache(error) => {
                warn(format!("{error}; the reference will be computed again in the next run"))
            }
            Event::Saved(path) => say("saved", format!("`{}`", path.display())),
        }
    }

    fn reference(&mut self, done: u64, total: u64) {
        let counter = self.reference.get_or_insert_with(|| {
            say("reference", &self.source);
            counter("reference", total, self.bars)
        });
        counter.show(done, total, &[]);
        if done == total {
            counter.finish();
        }
    }

    fn step(&mut self, report: &StepReport) {
        if self.training.is_none() {
            self.begin(report);
        }
        let seconds = self.begun.elapsed().as_secs_f64() / (report.step - self.first) as f64;
        let left = seconds * (self.steps - report.step) as f64;
        let mut more = numbers(&report.metrics);
        more.extend([
            format!("{} left", duration(left)),
            format!("{:.0} tok/s", report.step_tokens as f64 / report.seconds),
            format!("lr {:.2e}", report.learning_rate),
            format!("grad_norm {:.3}", report.grad_norm),
        ]);
        if let Some(counter) = &mut self.training {
            counter.show(report.step, self.steps, &more);
        }
        if report.step == 1 && self.starts_at_reference {
            let loss = report.metrics.loss;
            let far = (loss - std::f64::consts::LN_2).abs();
            say(
                "check",
                format!(
                    "first loss {loss:.6}, {far:.0e} from ln 2, where a policy equal to its reference begins"
                ),
            );
        }
    }

    /// Before the first step's line.
    fn begin(&mut self, report: &StepReport) {
        if let (true, None, Some(cache)) = (self.preference, &self.reference, &self.cache) {
            say("reference", format!("{}, from the cache in `{cache}`", self.source));
        }
        self.first = report.step - 1;
        self.begun = Instant::now() - Duration::from_secs_f64(report.seconds);
        self.training = Some(counter("step", self.steps, self.bars));
    }
}

/// The first few, shortened.
fn show_samples(step: u64, samples: &[Sample]) {
    let quoted = |text: &str| {
        let mut words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some((at, _)) = words.char_indices().nth(SHOWN_LETTERS) {
            words.truncate(at);
            words.push('…');
        }
        format!("“{words}”")
    };
    for (index, sample) in samples.iter().take(SHOWN_SAMPLES).enumerate() {
        let label = if index == 0 { "samples" } else { "" };
        let (prompt, answer) = (quoted(&sample.prompt), quoted(&sample.answer));
        say(label, format!("step {step}  {prompt} → {answer}"));
    }
}

fn counter(label: &'static str, total: u64, bars: bool) -> Counter {
    if bars { Counter::new(label, total) } else { Counter::lines(label) }
}

/// Loss and, for pairs, accuracy and margin.
fn numbers(report: &Metrics) -> Vec<String> {
    let mut numbers = vec![format!("loss {:.4}", report.loss)];
    if let Some(preferences) = &report.preferences {
        numbers.push(format!("accuracy {:.3}", preferences.accuracy));
        numbers.push(format!("margin {:.4}", preferences.margin));
    }
    numbers
}
