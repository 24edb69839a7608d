//! A run killed at any moment and started again ends with the same bytes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Place, Ran, fixture, lines, manifest};

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
        self.start_with(out, &[], Stdio::null())
    }

    fn start_with(&self, out: &str, more: &[&str], stderr: Stdio) -> Child {
        let arguments = self.arguments.iter().map(String::as_str).chain(["--out", out]);
        let arguments = arguments.chain(more.iter().copied());
        self.place.temper(arguments).stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
    }

    /// Waits until a file has so many lines.
    fn wait_for(&self, file: &str, wanted: usize) {
        while fs::read_to_string(self.place.path(file)).map_or(0, |text| text.lines().count()) < wanted {
            std::thread::sleep(Duration::from_millis(1));
        }
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

/// Sends a signal.
fn send(signal: &str, child: &Child) {
    let command = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
}

fn same_after_kills(verb: &str, kills: &[usize]) {
    let case = Case::new(verb);
    let expected = case.finish("whole");
    let killed = kills.iter().filter(|&&lines| case.kill_at("killed", lines)).count();
    assert!(killed > 0, "the runs were too fast to kill");
    assert!(case.finish("killed") == expected, "other bytes");
    assert_eq!(case.metrics("killed"), case.metrics("whole"));
    assert_eq!(case.metrics("killed").len(), 1 + STEPS + STEPS / 7 + 1);
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

/// Samples change no number of the training, and are the same after kills.
#[test]
fn samples_killed_at_several_steps() {
    let case = Case::new("sft");
    let expected = case.finish("plain");
    let prompts = case.place.file("prompts.txt", "What comes after 3?\n\nWhat comes after 7?\nHello\n");
    let mut sampled = Case::new("sft");
    let words = format!("--sample-prompts {prompts} --sample-steps 4 --sample-max-new-tokens 6");
    sampled.arguments.extend(words.split(' ').map(str::to_owned));
    assert!(sampled.finish("whole") == expected, "other bytes");
    let killed = [1, 9, 31].into_iter().filter(|&lines| sampled.kill_at("killed", lines)).count();
    assert!(killed > 0);
    assert!(sampled.finish("killed") == expected, "other bytes");
    assert_eq!(sampled.metrics("killed"), case.metrics("plain"));
    let [whole, killed] =
        ["whole", "killed"].map(|out| lines(&sampled.place.path(out).join("samples.jsonl")));
    assert_eq!(whole, killed);
    let steps: Vec<usize> = whole.iter().map(|line| line["step"].as_u64().unwrap() as usize).collect();
    assert_eq!(steps, (0..=STEPS).step_by(4).flat_map(|step| [step; 3]).collect::<Vec<_>>());
    assert_eq!(whole[1]["prompt"], "What comes after 7?");
    assert!(whole.iter().all(|line| (0..=6).contains(&line["tokens"].as_u64().unwrap())));
    assert_ne!(whole[0]["answer"], whole[whole.len() - 3]["answer"], "it learnt something");
}

/// Ctrl-C, or what `kill` sends: what is done is saved, and the words say how to go on.
#[test]
#[cfg(unix)]
fn a_signal_saves_what_is_done() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    let mut last = 0;
    for (signal, code, wanted) in [("INT", 130, 8), ("TERM", 143, 30)] {
        let child = case.start_with("stopped", &["--save-steps", "0"], Stdio::piped());
        case.wait_for("stopped/metrics.jsonl", wanted);
        send(signal, &child);
        let ran = Ran(child.wait_with_output().unwrap()).failed(code, &["run the same command again"]);
        let said = ran.stderr();
        let after = said.split("stopped  after step ").nth(1).unwrap();
        let step = after.split(';').next().unwrap().parse().unwrap();
        assert!((last..STEPS).contains(&step), "{said}");
        assert!(case.place.path(&format!("stopped/checkpoints/step-{step}/DONE")).exists());
        last = step;
    }
    assert!(case.finish("stopped") == expected, "other bytes");
    assert_eq!(case.metrics("stopped"), case.metrics("whole"));
}

/// More records than there should be in a step.
fn many(case: &Case) -> String {
    let rows = lines(&case.place.path("chats.jsonl"));
    let other = |(i, mut row): (usize, Value)| {
        row["messages"][0]["content"] = format!("What comes after {i}, and why?").into();
        row
    };
    case.place.jsonl("many.jsonl", rows.iter().cycle().take(6000).cloned().enumerate().map(other))
}

/// A step of seconds is given up between two of its micro-batches.
#[test]
#[cfg(unix)]
fn a_signal_does_not_wait_for_a_long_step() {
    let case = Case::new("sft");
    let data = many(&case);
    let child = case.start_with("stopped", &["--data", &data, "--batch-size", "6000"], Stdio::piped());
    case.wait_for("stopped/manifest.json", 1);
    send("INT", &child);
    Ran(child.wait_with_output().unwrap()).failed(130, &["stopped  before the first step"]);
    // The signal may have come before there was anything to write.
    let begun = case.place.path("stopped/metrics.jsonl").exists();
    let metrics = if begun { case.metrics("stopped") } else { Vec::new() };
    assert!(metrics.iter().all(|line| line["step"] == 0), "a step was done");
}

/// Nor is the evaluation before the first step waited for.
#[test]
#[cfg(unix)]
fn a_signal_does_not_wait_for_a_long_evaluation() {
    let case = Case::new("sft");
    let data = many(&case);
    let child = case.start_with("stopped", &["--eval-data", &data], Stdio::piped());
    // It is there when the evaluation begins.
    while !case.place.path("stopped/metrics.jsonl").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    send("INT", &child);
    Ran(child.wait_with_output().unwrap()).failed(130, &["stopped  before the first step"]);
    assert_eq!(case.metrics("stopped"), Vec::<Value>::new());
}

/// Nor that after the last step, for which a checkpoint stands in.
#[test]
#[cfg(unix)]
fn a_signal_does_not_wait_for_the_last_evaluation() {
    let case = Case::new("sft");
    let data = many(&case);
    let more = ["--eval-data", &data, "--eval-steps", "0", "--save-steps", "0", "--max-steps", "2"];
    assert!(case.start_with("whole", &more, Stdio::null()).wait().unwrap().success());
    let child = case.start_with("stopped", &more, Stdio::piped());
    case.wait_for("stopped/metrics.jsonl", 3);
    send("INT", &child);
    Ran(child.wait_with_output().unwrap()).failed(130, &["stopped  after step 2"]);
    assert!(case.place.path("stopped/checkpoints/step-2/DONE").exists());
    assert_eq!(case.metrics("stopped").len(), 3);
    assert!(case.start_with("stopped", &more, Stdio::null()).wait().unwrap().success());
    assert_eq!(case.metrics("stopped"), case.metrics("whole"));
}

/// A closed terminal is such a signal, but not to a run that was started to outlive it.
#[test]
#[cfg(target_os = "linux")]
fn a_hangup_saves_what_is_done_unless_it_is_ignored() {
    let case = Case::new("sft");
    let data = many(&case);
    let start = |disposition: &str, out: &str, steps: &str| {
        let more =
            ["--data", &data, "--epochs", "1", "--max-steps", steps, "--eval-steps", "0", "--out", out];
        let arguments = case.arguments.iter().map(String::as_str).chain(more);
        let program = case.place.temper(arguments);
        // What these tests themselves were started to do with the signal would be inherited.
        let mut env = Command::new("env");
        env.arg(format!("--{disposition}-signal=HUP")).arg(program.get_program()).args(program.get_args());
        env.current_dir(program.get_current_dir().unwrap());
        env.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        env.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // More steps than any machine does before the signal comes.
    let closed = start("default", "closed", "3000");
    case.wait_for("closed/metrics.jsonl", 5);
    send("HUP", &closed);
    Ran(closed.wait_with_output().unwrap()).failed(129, &["run the same command again"]);
    let nohup = start("ignore", "nohup", "800");
    case.wait_for("nohup/metrics.jsonl", 5);
    send("HUP", &nohup);
    Ran(nohup.wait_with_output().unwrap()).good();
}

#[test]
#[cfg(unix)]
fn a_second_signal_ends_at_once() {
    let case = Case::new("sft");
    // A micro-batch that takes seconds.
    let data = many(&case);
    let more = ["--data", &data, "--batch-size", "6000", "--epochs", "2", "--microbatch-tokens", "10000000"];
    let mut child = case.start_with("stopped", &more, Stdio::piped());
    case.wait_for("stopped/manifest.json", 1);
    send("INT", &child);
    let said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.into_iter().any(|line| line.contains("stopping")));
    send("INT", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!case.place.path("stopped/checkpoints").exists(), "the step was not finished");
}

#[test]
fn a_run_may_go_on_with_other_threads_and_evaluations() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    assert!(case.kill_at("killed", 20));
    let mut others = case.arguments.clone();
    *others.last_mut().unwrap() = "1".into();
    let every = others.iter().position(|word| word == "--eval-steps").unwrap() + 1;
    others[every] = "3".into();
    let arguments = others.iter().map(String::as_str).chain(["--out", "killed", "--keep", "1"]);
    assert!(case.place.temper(arguments).stderr(Stdio::null()).status().unwrap().success());
    assert!(fs::read(case.place.path("killed/final/model.safetensors")).unwrap() == expected, "other bytes");
    let evaluated = |metrics: Vec<Value>| -> Vec<u64> {
        let of_evaluations = metrics.into_iter().filter(|line| line["eval_loss"].is_number());
        of_evaluations.filter_map(|line| line["step"].as_u64()).collect()
    };
    let (before, after) = (evaluated(case.metrics("whole")), evaluated(case.metrics("killed")));
    assert!(before.contains(&49) && !before.contains(&51), "{before:?}");
    assert!(after.contains(&51) && !after.contains(&49), "{after:?}");
}

#[test]
fn a_run_stops_where_it_is_told_to_and_goes_on() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    for (stop, lines) in [("12", 15), ("12", 15), ("7", 15), ("31", 38)] {
        let arguments = case.arguments.iter().map(String::as_str);
        let arguments = arguments.chain(["--out", "stopped", "--stop-after", stop]);
        assert!(case.place.temper(arguments).stderr(Stdio::null()).status().unwrap().success());
        assert!(!case.place.path("stopped/final").exists());
        let metrics = case.metrics("stopped");
        assert_eq!(metrics.len(), lines);
        assert!(metrics[lines - 1]["eval_loss"].is_number(), "the last line is no evaluation");
    }
    // The newest command is the one that counts.
    let more = ["--save-dtype", "bf16", "--stop-after", "36"];
    assert!(case.start_with("stopped", &more, Stdio::null()).wait().unwrap().success());
    let setting = |key: &str| manifest(&case.place.path("stopped"))["settings"][key]["value"].clone();
    assert_eq!((setting("stop_after"), setting("save_dtype")), (36.into(), "bf16".into()));
    assert!(case.finish("stopped") == expected, "other bytes");
    assert_eq!((setting("stop_after"), setting("save_dtype")), (Value::Null, "f32".into()));
    let again = case.start_with("stopped", &["--save-dtype", "f16"], Stdio::piped()).wait_with_output();
    assert!(String::from_utf8_lossy(&again.unwrap().stderr).contains("with another `--save-dtype`"));
    let late = case.start_with("late", &["--stop-after", "60"], Stdio::piped()).wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&late.stderr).contains("`--stop-after 60` has no effect"));
}

#[test]
fn a_damaged_checkpoint_says_that_the_one_before_will_do() {
    let case = Case::new("sft");
    let expected = case.finish("whole");
    assert!(case.start_with("run", &["--stop-after", "12"], Stdio::null()).wait().unwrap().success());
    let folder = case.place.path("run/checkpoints/step-12");
    let sums = fs::read(folder.join("DONE")).unwrap();
    for name in ["state.json", "moments.safetensors", "model.safetensors", "config.json"] {
        let whole = fs::read(folder.join(name)).unwrap();
        let other_step = String::from_utf8_lossy(&whole).replace(": 12", ": 11").into_bytes();
        let turned = whole.windows(8).position(|bytes| bytes == b"[400,32]").map(|at| {
            let mut turned = whole.clone();
            turned[at..at + 8].copy_from_slice(b"[32,400]");
            turned
        });
        assert_eq!(turned.is_some(), name.ends_with(".safetensors"));
        let mut flipped = whole.clone();
        flipped[whole.len() - 2] ^= 1;
        // Those that were written before there were sums say less.
        for (done, flipped) in [(sums.clone(), Some(flipped)), (Vec::new(), None)] {
            fs::write(folder.join("DONE"), done).unwrap();
            let mut ways = vec![Some(whole[..whole.len() / 2].to_vec()), None];
            ways.extend((name == "state.json").then(|| Some(other_step.clone())));
            ways.extend(flipped.map(Some));
            ways.extend(turned.clone().map(Some));
            for damaged in ways {
                match damaged {
                    Some(bytes) => fs::write(folder.join(name), bytes).unwrap(),
                    None => fs::remove_file(folder.join(name)).unwrap(),
                }
                let ran = Ran(case.start_with("run", &[], Stdio::piped()).wait_with_output().unwrap());
                ran.failed(1, &["step-12", "remove this checkpoint to go on from the one before"]);
            }
        }
        fs::write(folder.join(name), whole).unwrap();
    }
    fs::remove_dir_all(folder).unwrap();
    assert!(case.finish("run") == expected, "other bytes");
    let end = case.place.path("run/final");
    fs::remove_file(end.join("model.safetensors")).unwrap();
    let ran = Ran(case.start_with("run", &[], Stdio::piped()).wait_with_output().unwrap());
    ran.failed(1, &["cannot read model.safetensors", "hint: remove `final`"]);
    fs::remove_dir_all(end).unwrap();
    assert!(case.finish("run") == expected, "other bytes");
}
