//! A run killed at any moment and started again ends with the same bytes.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Place, fixture, lines};

const STEPS: usize = 60;

/// A run with everything that could depend on where it is cut: shuffling, dropout, moments, a schedule.
struct Case {
    place: Place,
    arguments: Vec<String>,
    /// The file with the weights, in `final/`.
    weights: &'static str,
}

impl Case {
    /// A verb that may have options behind it.
    fn new(verb: &str) -> Case {
        let place = Place::new();
        let data = if verb.starts_with("dpo") { place.pairs() } else { place.chats() };
        let (model, steps) = (fixture("chat-tiny"), STEPS / 6);
        let words = format!(
            "{verb} --model {model} --data {data} --eval-data {data} --eval-steps 7 --batch-size 2 --epochs {steps} \
             --learning-rate 1e-3 --warmup-ratio 0.1 --lr-scheduler cosine --dropout 0.1 --save-steps 5 --threads 2"
        );
        let weights = if verb.contains("lora") { "adapter_model.safetensors" } else { "model.safetensors" };
        Case { place, arguments: words.split_whitespace().map(str::to_owned).collect(), weights }
    }

    fn start(&self, out: &str) -> Child {
        let arguments = self.arguments.iter().map(String::as_str).chain(["--out", out]);
        self.place.temper(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn finish(&self, out: &str) -> Vec<u8> {
        assert!(self.start(out).wait().unwrap().success());
        fs::read(self.place.path(out).join("final").join(self.weights)).unwrap()
    }

    /// Starts, and kills once there are so many lines of metrics; whether it was still running.
    fn kill_at(&self, out: &str, wanted: usize) -> bool {
        let metrics = self.place.path(out).join("metrics.jsonl");
        let mut child = self.start(out);
        let written = || fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
        while written() < wanted {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        kill(child)
    }

    /// Metrics without what a clock or the machine decides.
    fn metrics(&self, out: &str) -> Vec<Value> {
        let mut lines = lines(&self.place.path(out).join("metrics.jsonl"));
        for line in lines.iter_mut().filter_map(Value::as_object_mut) {
            for key in ["seconds", "tokens_per_second", "peak_rss_bytes"] {
                line.remove(key);
            }
        }
        lines
    }
}

/// Kills at once, as `kill -9`; whether it was still running.
fn kill(mut child: Child) -> bool {
    child.kill().unwrap();
    !child.wait().unwrap().success()
}

fn same_after_kills(verb: &str, kills: &[usize]) {
    let case = Case::new(verb);
    let expected = case.finish("whole");
    let killed = kills.iter().filter(|&&lines| case.kill_at("killed", lines)).count();
    assert!(killed > 0, "the runs were too fast to kill");
    assert!(case.finish("killed") == expected, "other bytes");
    assert_eq!(case.metrics("killed"), case.metrics("whole"));
    assert_eq!(case.metrics("killed").len(), STEPS + STEPS / 7 + 1);
}

#[test]
fn sft_killed_at_several_steps() {
    same_after_kills("sft", &[1, 7, 13, 30, 52]);
}

#[test]
fn dpo_killed_at_several_steps() {
    same_after_kills("dpo", &[2, 16, 44]);
}

#[test]
fn adapters_killed_at_several_steps() {
    same_after_kills(
        "sft --method lora --lora-r 4 --lora-dropout 0.1 --modules-to-save lm_head",
        &[2, 20, 41],
    );
    same_after_kills("dpo --method lora --lora-r 4 --lora-variant dora --quantize nf4", &[2, 33]);
}

#[test]
fn killed_at_any_time() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    let mut killed = 0;
    for attempt in 0..20u64 {
        let child = case.start("killed");
        std::thread::sleep(Duration::from_millis(5 + attempt * 37 % 190));
        killed += u32::from(kill(child));
    }
    assert!(killed > 0);
    assert!(case.finish("killed") == expected, "other bytes");
    assert_eq!(case.metrics("killed"), case.metrics("whole"));
}

#[test]
fn a_run_may_go_on_with_other_threads() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    assert!(case.kill_at("killed", 20));
    let mut one_thread = case.arguments.clone();
    *one_thread.last_mut().unwrap() = "1".into();
    let arguments = one_thread.iter().map(String::as_str).chain(["--out", "killed", "--keep", "1"]);
    assert!(case.place.temper(arguments).stderr(Stdio::null()).status().unwrap().success());
    assert!(fs::read(case.place.path("killed/final/model.safetensors")).unwrap() == expected, "other bytes");
}
