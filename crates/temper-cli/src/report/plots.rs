//! Which plots there are, and the lines that runs have in them.

use super::run::Run;
use super::thin::Point;

/// A plot.
#[derive(Debug)]
pub struct Plot {
    /// As `--plot` has it.
    pub name: &'static str,
    pub title: &'static str,
    /// Of the values; for the loss see [`Plot::unit`].
    unit: &'static str,
    /// Columns of the metrics, each with what it is called beside another one. The second is dashed.
    pub lines: &'static [(&'static str, &'static str)],
    /// Whether the values of steps vary so much that a running mean says more.
    noisy: bool,
    /// What a value of the file is multiplied by.
    scale: f64,
}

const PLOT: Plot = Plot { name: "", title: "", unit: "", lines: &[], noisy: true, scale: 1.0 };

/// All plots, as the page has them.
pub static PLOTS: [Plot; 12] = [
    Plot { name: "loss", title: "Loss", lines: &[("loss", "")], ..PLOT },
    Plot { name: "eval-loss", title: "Evaluation loss", lines: &[("eval_loss", "")], noisy: false, ..PLOT },
    Plot {
        name: "accuracy",
        title: "Reward accuracy",
        unit: "share of pairs",
        lines: &[("rewards/accuracies", "training"), ("eval_rewards/accuracies", "evaluation")],
        ..PLOT
    },
    Plot {
        name: "margin",
        title: "Reward margin",
        unit: "chosen − rejected",
        lines: &[("rewards/margins", "training"), ("eval_rewards/margins", "evaluation")],
        ..PLOT
    },
    Plot {
        name: "rewards",
        title: "Rewards",
        unit: "β · log-ratio",
        lines: &[("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")],
        ..PLOT
    },
    Plot {
        name: "logps",
        title: "Log-probs",
        unit: "nats per answer",
        lines: &[("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
        ..PLOT
    },
    Plot {
        name: "token-accuracy",
        title: "Token accuracy",
        unit: "share of trained tokens",
        lines: &[("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "evaluation")],
        ..PLOT
    },
    Plot {
        name: "entropy",
        title: "Entropy",
        unit: "nats per trained token",
        lines: &[("entropy", "training"), ("eval_entropy", "evaluation")],
        ..PLOT
    },
    Plot {
        name: "learning-rate",
        title: "Learning rate",
        lines: &[("learning_rate", "")],
        noisy: false,
        ..PLOT
    },
    Plot {
        name: "grad-norm",
        title: "Gradient norm",
        unit: "before clipping",
        lines: &[("grad_norm", "")],
        ..PLOT
    },
    Plot {
        name: "speed",
        title: "Tokens per second",
        unit: "tokens/s",
        lines: &[("tokens_per_second", "")],
        ..PLOT
    },
    Plot {
        name: "memory",
        title: "Peak memory",
        unit: "GB",
        lines: &[("peak_rss_bytes", "")],
        noisy: false,
        scale: 1e-9,
    },
];

impl Plot {
    /// The unit of the values, which for a loss depends on the verbs that trained.
    pub fn unit<'a>(&self, verbs: impl Iterator<Item = &'a str> + Clone) -> &'static str {
        let (dpo, all) = (verbs.clone().filter(|verb| *verb == "dpo").count(), verbs.count());
        match self.name {
            "loss" | "eval-loss" if dpo == 0 => "nats per token",
            "loss" | "eval-loss" if dpo == all => "nats per pair",
            "loss" | "eval-loss" => "nats per token, of DPO per pair",
            _ => self.unit,
        }
    }

    /// Whether a line of this plot wants a running mean.
    pub fn is_noisy(&self, column: &str) -> bool {
        self.noisy && !column.starts_with("eval_")
    }

    /// A run's points in a line of this plot.
    pub fn points(&self, run: &Run, column: &str) -> Vec<Point> {
        run.metrics.points(column).iter().map(|&(step, value)| (step, value * self.scale)).collect()
    }

    /// Whether any run has something to draw here.
    pub fn has_points(&self, runs: &[Run]) -> bool {
        let has = |run: &Run| self.lines.iter().any(|(column, _)| !run.metrics.points(column).is_empty());
        runs.iter().any(has)
    }
}
