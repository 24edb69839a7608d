//! Reports of runs: whole ones, broken ones, hostile ones, and many long ones.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Place, fixture, parsed};

/// A run directory with a manifest and these lines of metrics.
fn run_directory(place: &Place, name: &str, learning_rate: &str, metrics: &str) {
    let folder = place.path(name);
    fs::create_dir_all(&folder).unwrap();
    let manifest = json!({
        "temper": "0.1.0",
        "verb": "dpo",
        "run": { "verb": "dpo", "model": "ab".repeat(32) },
        "settings": {
            "model": { "value": "base", "origin": "flag" },
            "learning_rate": { "value": learning_rate, "origin": "config file" },
            "beta": { "value": 0.1, "origin": "default" },
        },
        "steps": 4,
    });
    fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(folder.join("metrics.jsonl"), metrics).unwrap();
}

/// Lines of a step each, as a run of DPO writes them.
fn steps(count: usize) -> String {
    let mut text = String::new();
    for step in 1..=count {
        let value = (step as f64 * 12.9898).sin();
        writeln!(
            text,
            "{{\"step\":{step},\"epoch\":{value},\"loss\":{value},\"grad_norm\":{value},\"learning_rate\":{value},\
             \"mean_token_accuracy\":{value},\"entropy\":{value},\"rewards/chosen\":{value},\
             \"rewards/rejected\":{value},\"rewards/accuracies\":{value},\"rewards/margins\":{value},\
             \"logps/chosen\":{value},\"logps/rejected\":{value},\"num_tokens\":{step}000,\"seconds\":0.5,\
             \"tokens_per_second\":{value},\"computed_tokens\":900,\"peak_rss_bytes\":123456789}}"
        )
        .unwrap();
    }
    text
}

/// The page, and what its script reads.
fn page(path: &Path) -> (String, Value) {
    let page = fs::read_to_string(path).unwrap();
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data = serde_json::from_str(data).unwrap();
    (page, data)
}

#[test]
fn real_runs_side_by_side() {
    let place = Place::new();
    let (model, chats, pairs) = (fixture("chat-tiny"), place.chats(), place.pairs());
    let train = ["--batch-size", "4", "--max-steps", "3", "--model", &model];
    place
        .run(
            "sft --out sft --eval-steps 1 --eval-data chats.jsonl --data",
            &[&[chats.as_str()], &train[..]].concat(),
        )
        .good();
    let dpo = [&[pairs.as_str()], &train[..]].concat();
    place.run("dpo --out dpo --learning-rate 3e-4 --data", &dpo).good();
    let ran = place.run("report sft dpo", &[]).good();
    assert!(ran.stderr().contains("report.html"), "{}", ran.stderr());
    let (page, data) = page(&place.path("report.html"));
    assert!(!page.contains("://") && !page.contains("@import") && !page.contains("src="));
    assert!(page.contains("default-src 'none'") && page.contains("script-src 'sha256-"));
    for part in ["2 runs, finished", "3 of 3", "learning_rate", "0.0003", "records read", "tokens trained"] {
        assert!(page.contains(part), "`{part}` is not on the page");
    }
    let runs = data["runs"].as_array().unwrap();
    assert_eq!([&runs[0]["name"], &runs[1]["name"]], ["sft", "dpo"]);
    assert_eq!(runs[0]["columns"]["loss"]["x"], json!([1, 2, 3]));
    assert_eq!(runs[0]["columns"]["eval_loss"]["x"], json!([0, 1, 2, 3]));
    assert_eq!(runs[0]["tokens"].as_array().unwrap().len(), 3);
    let first_loss = runs[1]["columns"]["loss"]["y"][0].as_f64().unwrap();
    assert!((first_loss - std::f64::consts::LN_2).abs() < 1e-6, "{first_loss}");
    let differing = page.split("What differs").nth(1).unwrap().split("<details>").next().unwrap();
    assert!(differing.contains("learning_rate") && !differing.contains("batch_size"), "{differing}");
    assert!(runs[1]["columns"]["logps/chosen"]["y"][2].as_f64().unwrap() < 0.0);
    let manifest: Value =
        serde_json::from_slice(&fs::read(place.path("dpo/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["ledger"]["data"]["records"]["used"], 12);
}

#[test]
fn hostile_words_stay_words() {
    let place = Place::new();
    let hostile = "</script><script>alert(1)</script><!--\u{2028}<img src=x onerror=alert(2)>";
    let name = "<script>alert(3)<";
    run_directory(&place, name, "</td><script>alert(4)</script>", &steps(3));
    let sample = json!({ "step": 1, "prompt": hostile, "answer": hostile, "more": 1 });
    fs::write(place.path(name).join("samples.jsonl"), format!("{sample}\nnonsense\n")).unwrap();
    let ran = place.run("report", &[name]).good();
    assert!(ran.stderr().contains("samples.jsonl: 1 line damaged"), "{}", ran.stderr());
    let (page, data) = page(&place.path("report.html"));
    assert_eq!(page.matches("<script").count(), 2, "the data and the page's own");
    assert!(!page.contains("<img") && !page.contains("<!--") && !page.contains("alert(4)</script>"));
    assert!(page.contains("&lt;img src=x onerror=alert(2)&gt;"));
    assert_eq!(data["runs"][0]["name"], name);
}

#[test]
fn broken_runs_show_what_is_left() {
    let place = Place::new();
    run_directory(&place, "broken", "1e-6", "");
    let broken = "{\"step\":1,\"loss\":2.5}\n\u{0}\u{1}garbage\n{\"step\":2,\"loss\":null}\n{\"step\":3,\"loss\":1.5}\n\
                  {\"step\":4,\"lo";
    fs::write(place.path("broken/metrics.jsonl"), broken).unwrap();
    fs::write(place.path("broken/manifest.json"), "{\"verb\":").unwrap();
    run_directory(&place, "empty", "1e-6", "");
    run_directory(&place, "begun", "1e-6", "");
    fs::remove_file(place.path("begun/metrics.jsonl")).unwrap();
    let said = place.run("report broken empty begun", &[]).good().stderr();
    for part in [
        "1 line damaged",
        "half a last line",
        "1 value not finite",
        "manifest.json is damaged",
        "begun: there is no metrics.jsonl",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let (page, data) = page(&place.path("report.html"));
    assert!(page.contains("half a last line") && page.contains("3 runs, unfinished"));
    assert_eq!(data["runs"][0]["columns"]["loss"], json!({ "x": [1, 3], "y": [2.5, 1.5] }));
    assert_eq!(data["runs"][1]["columns"], json!({}));
    place.run("report empty", &[]).good();
    for format in ["csv", "json"] {
        place.run("report empty begun --format", &[format]).good();
    }
    place.run("report empty begun --format svg", &[]).failed(1, &["no run has a point of `loss`", "hint"]);
}

#[test]
fn a_folder_stands_for_the_runs_in_it() {
    let place = Place::new();
    run_directory(&place, "runs/b", "1e-6", &steps(2));
    run_directory(&place, "runs/a", "1e-5", &steps(2));
    place.file("runs/a.log", "step 1");
    let names = |arguments: &[&str]| {
        place.run("report --format json --out all.json", arguments).good();
        let runs: Value = serde_json::from_str(&fs::read_to_string(place.path("all.json")).unwrap()).unwrap();
        let runs = runs["runs"].as_array().unwrap();
        runs.iter().map(|run| run["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&["runs"]), ["a", "b"]);
    assert_eq!(names(&["runs/b", "runs", "runs/b"]), ["b", "a"]);
    let said = place.run("report runs/a runs/a.log runs/b", &[]).good().stderr();
    assert!(said.contains("left out, as files are no runs: runs/a.log"), "{said}");
}

#[test]
fn what_is_no_run_is_refused() {
    let place = Place::new();
    run_directory(&place, "runs/a", "1e-6", &steps(2));
    fs::create_dir_all(place.path("runs/a/final")).unwrap();
    place.run("report runs/a nowhere", &[]).failed(1, &["`nowhere` does not exist", "hint"]);
    let log = place.file("a.log", "step 1");
    place.run("report", &[&log]).failed(1, &["a.log` is no run", "hint"]);
    fs::create_dir_all(place.path("none")).unwrap();
    place.run("report none", &[]).failed(1, &["`none` is no run", "hint"]);
    place.run("report runs/a/final", &[]).failed(1, &["hint", "runs/a`"]);
    place.run("report runs/a --out runs", &[]).failed(1, &["expected a file", "hint"]);
    place.run("report runs/a --plot loss", &[]).failed(1, &["--plot", "hint"]);
    place.run("report runs/a --format csv --out a.svg", &[]).failed(1, &["a.svg", "hint", "svg"]);
    place
        .run("report runs/a --plot eval-loss --out a.png", &[])
        .failed(1, &["no run has", "eval-loss", "hint", "loss"]);
    place.run("report runs/a --out a.pdf", &[]).failed(1, &["`a.pdf`", "`.pdf`", "hint"]);
    place.run("report runs/a --format svg --plot lots", &[]).failed(2, &["logps", "grad-norm"]);
    place.run("report", &[]).failed(2, &["RUN"]);
    assert!(!place.path("report.html").exists());
}

#[test]
fn twenty_long_runs_stay_small() {
    let place = Place::new();
    let metrics = steps(10_000).replacen("\"grad_norm\":", "\"grad_norm\":98765,\"x\":", 1);
    let names: Vec<String> = (0..20).map(|at| format!("run-{at}")).collect();
    names.iter().for_each(|name| run_directory(&place, name, name, &metrics));
    place.run("report --out r.html", &names.iter().map(String::as_str).collect::<Vec<_>>()).good();
    let size = fs::metadata(place.path("r.html")).unwrap().len();
    assert!(size < 8_000_000, "{size}");
    let (_, data) = page(&place.path("r.html"));
    assert!(data["colours"].as_array().unwrap().len() < names.len());
    for run in data["runs"].as_array().unwrap() {
        let loss = run["columns"]["loss"]["x"].as_array().unwrap();
        assert!((500..1100).contains(&loss.len()), "{}", loss.len());
        assert_eq!(run["columns"]["grad_norm"]["y"][0], 98765, "the spike");
    }
}

#[test]
fn pictures_and_data() {
    let place = Place::new();
    run_directory(&place, "a", "1e-6", &steps(3));
    run_directory(&place, "other/a", "2e-6", &steps(400));
    place.run("report a other/a --format svg --plot logps --out plots.svg", &[]).good();
    let svg = fs::read_to_string(place.path("plots.svg")).unwrap();
    for part in ["<svg", "Log-probs", "nats per answer", "other/a, chosen", "other/a, rejected"] {
        assert!(svg.contains(part), "`{part}` is not in the picture");
    }
    place.run("report a other/a --format png", &[]).good();
    assert!(fs::read(place.path("report.png")).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    place.run("report a other/a a ./a --format csv --plot loss", &[]).good();
    let csv = fs::read_to_string(place.path("report.csv")).unwrap();
    assert_eq!(csv.lines().count(), 404);
    assert!(
        csv.starts_with("run,step,name,value\n") && csv.lines().all(|line| line.matches(',').count() == 3)
    );
    place.run("report a other/a --format json", &[]).good();
    let json: Value = serde_json::from_slice(&fs::read(place.path("report.json")).unwrap()).unwrap();
    let written = parsed(&steps(400));
    assert_eq!(json["runs"][1]["columns"]["loss"][399], json!([400.0, written[399]["loss"]]));
    assert_eq!(json["runs"][0]["manifest"]["settings"]["learning_rate"]["value"], "1e-6");
}
