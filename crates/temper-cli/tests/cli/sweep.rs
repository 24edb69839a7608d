//! Many runs: what is skipped, shared and stopped early, and that each ends as it would have alone.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Place, Ran, fixture, lines};

/// A place with data and the file `s.toml` of a sweep into `s/`; `top` stands above [base], `rest` behind it.
fn sweep(verb: &str, top: &str, rest: &str) -> Place {
    let place = Place::new();
    let data = if verb == "dpo" { place.pairs() } else { place.chats() };
    let text = format!(
        "verb = '{verb}'\nout = 's'\n{top}\n[base]\nmodel = '{}'\ndata = '{data}'\neval_data = '{data}'\n\
         batch_size = 2\ndropout = 0.1\nthreads = 2\n{rest}",
        fixture("chat-tiny")
    );
    place.file("s.toml", &text);
    place
}

fn weights(place: &Place, run: &str) -> Vec<u8> {
    fs::read(place.path(run).join("final/model.safetensors")).unwrap()
}

/// The columns `run`, `state`, `steps` and the metric of table.csv; no name here has a comma in it.
fn table(place: &Place) -> Vec<[String; 4]> {
    let text = fs::read_to_string(place.path("s/table.csv")).unwrap();
    let mut rows = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = rows.next().unwrap();
    let metric = header.iter().position(|name| *name == "steps").unwrap() - 1;
    let cells = |row: Vec<&str>| [row[0], row[1], row[metric + 1], row[metric]].map(str::to_owned);
    rows.map(cells).collect()
}

/// Trains a run of the sweep by itself, in another folder, by its configuration.
fn alone(place: &Place, run: &str) -> Vec<u8> {
    let verb = fs::read_to_string(place.path("s.toml")).unwrap();
    let verb = verb.split('\'').nth(1).unwrap().to_owned();
    let config = format!("s/runs/{run}.toml");
    place.run(&verb, &["--config", &config, "--out", &format!("alone/{run}")]).good();
    weights(place, &format!("alone/{run}"))
}

/// Metrics without what a clock or the machine decides.
fn metrics(folder: &Path) -> Vec<Value> {
    let mut lines = lines(&folder.join("metrics.jsonl"));
    for line in lines.iter_mut().filter_map(Value::as_object_mut) {
        line.retain(|key, _| !["seconds", "tokens_per_second", "peak_rss_bytes"].contains(&key.as_str()));
    }
    lines
}

fn start(place: &Place) -> Child {
    place.temper(["sweep", "s.toml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until a file has so many lines.
fn wait_for_lines(path: &Path, wanted: usize) {
    while fs::read_to_string(path).map_or(0, |text| text.lines().count()) < wanted {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How often a run was started.
fn starts(place: &Place, run: &str) -> usize {
    fs::read_to_string(place.path(&format!("s/runs/{run}.log"))).unwrap().matches("temper  ").count()
}

#[test]
fn a_killed_sweep_goes_on_and_a_failed_run_takes_nothing_along() {
    let rates = "max_steps = 500\nsave_steps = 50\n[space]\nlearning_rate = [1e-3, 2e-3, 5e-3]\n";
    let place = sweep("sft", "", rates);
    let mut killed = start(&place);
    wait_for_lines(&place.path("s/runs/learning_rate=2e-3/metrics.jsonl"), 60);
    killed.kill().unwrap();
    killed.wait().unwrap();
    // What the sweep left behind still trains.
    assert!(!place.path("s/runs/learning_rate=2e-3/final").exists(), "the run was too fast to kill");
    let said = place.run("sweep s.toml", &[]).good();
    assert!(said.stderr().contains("1 were done before"), "{}", said.stderr());
    let found = table(&place);
    assert!(found.iter().all(|[_, state, steps, _]| state == "finished" && steps == "500"), "{found:?}");
    let values: Vec<f64> = found.iter().map(|row| row[3].parse().unwrap()).collect();
    assert!(values.is_sorted(), "{values:?}");
    assert!(said.stdout().contains(&format!("* {:>10.4}", values[0])), "{}", said.stdout());
    for run in ["learning_rate=1e-3", "learning_rate=2e-3", "learning_rate=5e-3"] {
        assert!(weights(&place, &format!("s/runs/{run}")) == alone(&place, run), "other bytes in {run}");
    }
    assert_eq!(starts(&place, "learning_rate=1e-3"), 1);
    let best = format!("s/runs/{}", found[0][0]);
    place.run("sft --config s/best.toml", &[]).good();
    assert!(weights(&place, "s/best") == weights(&place, &best), "best.toml makes another model");

    // A value more in the space, with which a run fails: the others are not started again.
    let text = fs::read_to_string(place.path("s.toml")).unwrap();
    place.file("s.toml", &text.replace("[1e-3", "[1e30, 1e-3"));
    for attempts in [1, 2] {
        place.run("sweep s.toml", &[]).failed(
            1,
            &["1 of 4 runs failed", "learning_rate=1e30.log", "not finite", "hint: the same command"],
        );
        assert_eq!(starts(&place, "learning_rate=1e-3"), 1);
        assert_eq!(starts(&place, "learning_rate=1e30"), attempts);
    }
    assert_eq!(table(&place)[3][1], "failed");
}

#[test]
fn a_sweep_that_is_asked_to_stop_says_how_to_go_on() {
    let place = sweep("sft", "", "max_steps = 900\nsave_steps = 50\n[space]\nlearning_rate = [1e-3, 2e-3]\n");
    let asked = start(&place);
    wait_for_lines(&place.path("s/runs/learning_rate=1e-3/metrics.jsonl"), 60);
    let sent = Command::new("kill").args(["-TERM", &asked.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let asked = Ran(asked.wait_with_output().unwrap());
    assert_eq!(asked.code(), Some(143));
    assert!(!place.path("s/runs/learning_rate=1e-3/final").exists(), "the run was too fast to stop");
    place.run("sweep s.toml --jobs 2", &[]).good();
    for run in ["learning_rate=1e-3", "learning_rate=2e-3"] {
        assert!(weights(&place, &format!("s/runs/{run}")) == alone(&place, run), "other bytes in {run}");
    }
}

/// That the runs with these steps end as they would alone, and made so many steps of their own.
fn shared(verb: &str, options: &str, expected: &[(u64, usize)]) {
    let lengths: Vec<String> = expected.iter().map(|(steps, _)| steps.to_string()).collect();
    let space = format!("eval_steps = 6\n{options}\n[space]\nmax_steps = [{}]\n", lengths.join(", "));
    let place = sweep(verb, "", &space);
    place.run("sweep s.toml", &[]).good();
    for (steps, own) in expected {
        let run = format!("max_steps={steps}");
        let folder = place.path(&format!("s/runs/{run}"));
        assert!(weights(&place, &format!("s/runs/{run}")) == alone(&place, &run), "other bytes in {run}");
        let manifest = fs::read_to_string(folder.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&manifest).unwrap();
        let until = manifest["shared"]["until"].as_u64().unwrap_or(0);
        assert_eq!((*steps - until) as usize, *own, "steps of its own in {run}");
        assert_eq!(fs::read_dir(folder.join("checkpoints")).unwrap().count(), 0, "{run} keeps its stops");
        if until > 0 {
            assert_eq!(metrics(&folder), metrics(&place.path(&format!("alone/{run}"))));
        }
    }
}

#[test]
fn runs_that_differ_in_length_share_their_steps_exactly() {
    shared("sft", "lr_scheduler = 'constant'\nwarmup_steps = 3", &[(12, 0), (40, 40), (7, 0), (19, 0)]);
    // The last tenth of the steps decays, from the second step of it on.
    shared("dpo", "lr_scheduler = 'wsd'\nlearning_rate = 1e-3", &[(20, 1), (31, 3), (60, 60)]);
}

#[test]
fn runs_whose_schedules_differ_are_trained_whole() {
    let place = sweep("sft", "", "[space]\nmax_steps = [10, 20]\n");
    let said = place.run("sweep s.toml", &[]).good().stderr();
    assert!(said.contains("not shared") && said.contains("differ after step 1\n"), "{said}");
    assert!(weights(&place, "s/runs/max_steps=10") == alone(&place, "max_steps=10"), "other bytes");
    let place = sweep("sft", "", "lr_scheduler = 'constant'\n[space]\nepochs = [1, 2]\n");
    let said = place.run("sweep s.toml --dry-run", &[]).good().stderr();
    assert!(said.contains("not given as `max_steps`"), "{said}");
}

#[test]
fn halving_stops_the_worse_runs() {
    let space = "max_steps = 40\n[space]\nlearning_rate = [1e-5, 5e-3, 1e-4, 2e-3, 1e-3]\n\
                 [halving]\nfirst = 0.2\nkeep = 0.4\n";
    let place = sweep("sft", "", space);
    let expected = [
        ("5e-3", "finished", "40"),
        ("2e-3", "stopped", "20"),
        ("1e-3", "stopped", "8"),
        ("1e-4", "stopped", "8"),
        ("1e-5", "stopped", "8"),
    ];
    let said = place.run("sweep s.toml", &[]).good();
    let check = || {
        for ([run, state, steps, _], expected) in table(&place).iter().zip(expected) {
            let run = run.strip_prefix("learning_rate=").unwrap();
            assert_eq!((run, state.as_str(), steps.as_str()), expected);
        }
    };
    check();
    assert!(said.stdout().contains("stopped after step 8: 3rd of 5 there, 2 went on"), "{}", said.stdout());
    assert!(weights(&place, "s/runs/learning_rate=5e-3") == alone(&place, "learning_rate=5e-3"));
    // Again: nothing is started.
    let logs = || ["5e-3", "2e-3", "1e-5"].map(|rate| starts(&place, &format!("learning_rate={rate}")));
    assert_eq!(logs(), [3, 2, 1]);
    place.run("sweep s.toml --jobs 2", &[]).good();
    assert_eq!(logs(), [3, 2, 1]);
    check();
}

/// Accuracies are few, and often equal.
#[test]
fn the_loss_decides_between_equals() {
    let top = "metric = 'mean_token_accuracy'\ngoal = 'max'";
    let rates = "max_steps = 4\n[space]\nlearning_rate = [1e-9, 2e-9, 5e-3, 3e-9]\n";
    let halving = "[halving]\nfirst = 0.5\nkeep = 0.5\n";
    let place = sweep("sft", top, &format!("{rates}{halving}"));
    let said = place.run("sweep s.toml", &[]).good();
    assert!(said.stdout().contains("there, by its loss, "), "{}", said.stdout());
    let of_best = |[run, state, ..]: &[String; 4]| run == "learning_rate=5e-3" && state == "finished";
    assert!(table(&place).iter().any(of_best), "{:?}", table(&place));
    let place = sweep("sft", top, "max_steps = 1\n[space]\nlearning_rate = [1e-9, 5e-3, 2e-9]\n");
    let said = place.run("sweep s.toml", &[]).good().stderr();
    let best = "learning_rate=5e-3, of 3 with this mean_token_accuracy by its loss";
    assert!(said.contains(best), "{said}");
    let place = sweep("sft", top, "max_steps = 1\n[space]\nmax_grad_norm = [1000, 2000]\n");
    let said = place.run("sweep s.toml", &[]).good().stderr();
    assert!(said.contains("max_grad_norm=1000, of 2 with this mean_token_accuracy the first"), "{said}");
}

#[test]
fn higher_may_be_better() {
    let top = "metric = 'eval_rewards/margins'\ngoal = 'max'";
    let place = sweep("dpo", top, "max_steps = 10\n[space]\nlearning_rate = [1e-5, 1e-3]\n");
    place.run("sweep s.toml", &[]).good();
    let found = table(&place);
    assert_eq!(found[0][0], "learning_rate=1e-3");
    assert!(found[0][3].parse::<f64>().unwrap() > found[1][3].parse::<f64>().unwrap());
}

#[test]
fn a_dry_run_lists_what_would_run_and_writes_nothing() {
    let listed = |top: &str, rest: &str| {
        let place = sweep("sft", top, rest);
        let said = place.run("sweep s.toml --dry-run", &[]).good().stdout();
        assert!(!place.path("s").exists());
        let names = said.lines().filter_map(|line| line.strip_prefix("# ")).map(str::to_owned);
        (names.collect::<Vec<_>>(), said)
    };
    let (names, said) = listed("", "[space]\nlearning_rate = [1e-5, 2e-5]\norder = ['sequential']\n");
    assert_eq!(names, ["learning_rate=1e-5,order=sequential", "learning_rate=2e-5,order=sequential"]);
    assert!(said.contains("\ntemper sft --model "), "{said}");
    assert!(said.contains(" --learning-rate 2e-5 --order sequential --out s/runs/"), "{said}");

    let space = "[space]\nlearning_rate = { log = [1e-6, 1e-3] }\nbatch_size = { whole = [1, 64] }\n";
    let drawn = |seed: u64, samples: usize| listed(&format!("samples = {samples}\nseed = {seed}"), space).0;
    assert_eq!(drawn(1, 5).len(), 5);
    assert_eq!(drawn(1, 5), drawn(1, 8)[..5], "more samples only add to them");
    assert_ne!(drawn(1, 5), drawn(2, 5));

    let list =
        "[[runs]]\nepochs = 1\n[[runs]]\nlearning_rate = 1e-3\nchat_template = '../a b/x.jinja'\n[[runs]]\n";
    assert_eq!(listed("", list).0, ["epochs=1", "learning_rate=1e-3,chat_template=x.jinja", "base"]);
    let alike = "[space]\neval_data = ['x/m', 'y/m', 'z/m-2', 'w/m']\n";
    assert_eq!(listed("", alike).0, ["eval_data=m", "eval_data=m-2", "eval_data=m-2-2", "eval_data=m-3"]);
}

#[test]
fn what_is_wrong_in_the_file_is_said_before_anything_runs() {
    let refused = |top: &str, rest: &str, words: &[&str]| {
        let place = sweep("sft", top, rest);
        place.run("sweep s.toml", &[]).failed(1, &[&["`s.toml`", "hint: "][..], words].concat());
        assert!(!place.path("s").exists());
    };
    let space = "[space]\nlearning_rate = [1e-5, 2e-5]\n";
    refused("metrik = 'loss'", space, &["line 3", "`metrik`", "the nearest is `metric`"]);
    refused("metric = 'eval_los'", space, &["no run writes the metric `eval_los`", "eval_loss"]);
    refused("metric = 'eval_rewards/margins'", space, &["no run writes the metric"]);
    refused("metric = 'eval_entropy'", space, &["without a goal", "goal = \"max\""]);
    refused("seed = 3", space, &["line 3: `seed` without `samples`"]);
    refused("samples = 3", space, &["3 samples", "2 different points"]);
    refused("", "", &["has no `space`"]);
    refused("", "[space]\n", &["line 11: the space is empty"]);
    refused("", "[space]\nepochs = []\n", &["line 12: the list of `epochs` is empty"]);
    refused("", "[space]\nepochs = 1\n", &["line 12: `epochs` does not vary"]);
    refused("", "[space]\nepochs = { log = [1, 2] }\n", &["`epochs` is a range", "samples"]);
    refused("samples = 2", "[space]\nepochs = { lg = [1, 2] }\n", &["line 12", "kind and the ends"]);
    refused("", "[space]\nlearning_rat = [1e-5]\n", &["line 12", "the nearest is `learning_rate`"]);
    refused("", "[space]\nlearning_rate = [1e-5, -1]\n", &["line 12", "a number from 0"]);
    refused("", "beta = 0.1\n[space]\nepochs = [1]\n", &["line 11", "reads no key `beta`"]);
    refused("", "[space]\nout = ['a', 'b']\n", &["line 12", "the sweep's own"]);
    refused("", "[space]\nkeep = [1, 2]\n", &["line 12", "changes no number"]);
    refused("", "[space]\nepochs = [1, 1.0]\n", &["`epochs=1` and `epochs=1.0` are the same run"]);
    refused("", "[[runs]]\nepochs = 3\n[[runs]]\n", &["`epochs=3` and `base` are the same run"]);
    refused("", "[space]\neval_data = ['s.toml', 'no.jsonl']\n", &["line 12", "does not exist: `no.jsonl`"]);
    refused("", "[space]\nlora_r = [1, 2]\n", &["`lora_r` needs `--method lora`"]);
    refused("", &format!("{space}[halving]\n"), &["number of steps is not given", "max_steps"]);
    refused("", &format!("{space}[halving]\nfirst = 2\n"), &["`first` is no share", "between 0 and 1"]);
    let place = sweep("sft", "", space);
    let text = fs::read_to_string(place.path("s.toml")).unwrap();
    place.file("s.toml", &text.replace("model", "# model"));
    place.run("sweep s.toml", &[]).failed(1, &["`s.toml`", "model", "[base]"]);
    place.file("s.toml", &text.replace("eval_data", "# eval_data"));
    place
        .run("sweep s.toml", &[])
        .failed(1, &["no `eval_data` for the metric `eval_loss`", "metric = \"loss\""]);
    let place = sweep("sft", "", space);
    fs::create_dir(place.path("s")).unwrap();
    place.file("s/notes.txt", "of another matter");
    place.run("sweep s.toml", &[]).failed(1, &["`s` is there and is no folder of a sweep"]);
    assert_eq!(fs::read_dir(place.path("s")).unwrap().count(), 1);
    place.run("sweep nowhere.toml", &[]).failed(1, &["nowhere.toml"]);
}

#[test]
fn runs_that_are_there_with_other_options_are_not_taken_for_these() {
    let place = sweep("sft", "", "max_steps = 3\n[space]\nlearning_rate = [1e-4]\n");
    place.run("sweep s.toml", &[]).good();
    let text = fs::read_to_string(place.path("s.toml")).unwrap();
    place.file("s.toml", &text.replace("max_steps = 3", "max_steps = 4"));
    let words = ["begun with other options", "max_steps = 3 there, max_steps = 4 now", "another `out`"];
    place.run("sweep s.toml", &[]).failed(1, &words);
    // What decides nothing may change, and a run more of other data is no longer compared in silence.
    place.file(
        "s.toml",
        &text.replace("max_steps = 3", "keep = 1\nmax_steps = 3").replace("[1e-4]", "[1e-4, 1e-3]"),
    );
    let data = fs::read_to_string(place.path("chats.jsonl")).unwrap();
    place.file("chats.jsonl", &data.replace("What", "Well, what"));
    let said = place.run("sweep s.toml", &[]).good().stderr();
    assert!(said.contains("are not comparable: ") && said.contains("chats.jsonl` was changed"), "{said}");
    assert!(!said.contains("losses of different"), "{said}");
}

#[test]
fn losses_that_measure_different_things_are_not_compared_in_silence() {
    let place = sweep(
        "sft",
        "",
        "max_steps = 2\n[space]\ntrain_on = [\"assistant\", \"all\"]\nmax_length = [48, 80]\n",
    );
    let said = place.run("sweep s.toml", &[]).good().stderr();
    assert!(said.contains("runs that differ in `max_length`, `train_on` have losses of different"), "{said}");
    assert!(!said.contains("was changed"), "{said}");
}
