//! `--method lora`, `--adapter`, `--quantize` and `merge`.

use std::f64::consts::LN_2;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Place, contents, fixture, lines, parsed};

/// The first loss of a run.
fn first_loss(place: &Place, run: &str) -> f64 {
    lines(&place.path(run).join("metrics.jsonl"))[0]["loss"].as_f64().unwrap()
}

/// Log-probabilities that `score` gives.
fn scores(place: &Place, words: &str, data: &str) -> Vec<f64> {
    let out = place.run(&format!("score --json {words}"), &["--data", data]).good().stdout();
    parsed(&out).iter().filter_map(|line| line["logps/completion"].as_f64()).collect()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f64::total_cmp).unwrap()
}

#[test]
fn an_adapter_is_trained_used_and_merged() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    for (variant, more) in [("lora", ""), ("rslora", "--lora-plus-ratio 4"), ("dora", "--lora-dropout 0.1")] {
        let words = format!(
            "sft --method lora --lora-variant {variant} --lora-r 4 --lora-alpha 8 --epochs 8 --batch-size 4 \
             --learning-rate 1e-2 --out {variant} {more}"
        );
        let ran = place.run(&words, &["--model", &model, "--data", &data]).good();
        assert!(ran.stderr().contains("parameters trained"), "{}", ran.stderr());
        assert!(ran.stderr().contains(&format!("--adapter {variant}/final")), "{}", ran.stderr());
        let metrics = lines(&place.path(variant).join("metrics.jsonl"));
        let loss = |line: &Value| line["loss"].as_f64().unwrap();
        assert!(loss(&metrics[23]) < 0.8 * loss(&metrics[0]), "{variant}: {}", loss(&metrics[23]));
        let files: Vec<String> = contents(&place.path(variant).join("final"))
            .iter()
            .map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        let expected = [
            "DONE",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(files, expected);
        // The merged model is base and adapter.
        let merged = format!("merge --model {model} --adapter {variant}/final --out {variant}-merged");
        let ran = place.run(&merged, &[]).good();
        assert!(ran.stderr().contains("logits differ by at most"), "{}", ran.stderr());
        let base = scores(&place, &format!("--model {model}"), &data);
        let adapted = scores(&place, &format!("--model {model} --adapter {variant}/final"), &data);
        let together = scores(&place, &format!("--model {variant}-merged"), &data);
        assert!(apart(&base, &adapted) > 0.5, "{variant}");
        assert!(apart(&together, &adapted) < 1e-3, "{variant}: {}", apart(&together, &adapted));
    }
    let words = format!("generate --model {model} --adapter lora/final --chat --max-new-tokens 8 --prompt");
    let chat = place.run(&words, &["What comes after 3?"]).good();
    assert!(!chat.stdout().trim().is_empty());
}

/// DPO's reference is the model before the first step: the base, and with a start adapter base and adapter.
#[test]
fn dpo_begins_at_ln_2_with_fresh_and_given_adapters() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    let more = ["--model", &model, "--data", &data];
    place.run("sft --method lora --lora-r 4 --epochs 4 --learning-rate 1e-2 --out sft", &more).good();
    for (out, words) in [
        ("fresh", "--lora-r 4 --lora-variant dora"),
        ("given", "--adapter sft/final"),
        ("nf4", "--quantize nf4"),
        ("int8", "--quantize int8 --lora-target q_proj,v_proj"),
    ] {
        let words = format!("dpo --method lora --epochs 4 --learning-rate 1e-2 --out {out} {words}");
        place.run(&words, &more).good();
        assert!((first_loss(&place, out) - LN_2).abs() < 1e-5, "{out}: {}", first_loss(&place, out));
        let metrics = lines(&place.path(out).join("metrics.jsonl"));
        let last = metrics.iter().rfind(|line| line["loss"].is_f64()).unwrap();
        assert!(last["rewards/margins"].as_f64().unwrap() > 0.01, "{out}: {last}");
    }
    // A quantised model is another one, with adapters and without.
    for adapter in ["", " --adapter nf4/final"] {
        let base = scores(&place, &format!("--model {model}{adapter}"), &place.chats());
        let nf4 = scores(&place, &format!("--model {model}{adapter} --quantize nf4"), &place.chats());
        assert!(apart(&base, &nf4) > 1e-3);
    }
}

#[test]
fn a_head_of_its_own_is_untied() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let words = "sft --method lora --lora-r 2 --modules-to-save lm_head --max-steps 2 --out run";
    place.run(words, &["--model", &model, "--data", &data]).good();
    place.run("merge --adapter run/final --out merged --model", &[&model]).good();
    let config = fs::read(place.path("merged/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn a_config_may_list_names() {
    let place = Place::new();
    let config =
        place.file("c.toml", "method = \"lora\"\nlora_target = [\"q_proj\", \"v_proj\"]\nmax_steps = 1\n");
    let more = ["--config", &config, "--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.run("sft --out run", &more).good();
    let config = fs::read(place.path("run/final/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let mut targets: Vec<&str> =
        config["target_modules"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    targets.sort_unstable();
    assert_eq!(targets, ["q_proj", "v_proj"]);
}

#[test]
fn what_cannot_be_adapted_says_why() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let more = ["--model", &model, "--data", &data];
    for option in [
        "--lora-r 4",
        "--lora-target q_proj",
        "--quantize nf4",
        "--adapter somewhere",
        "--modules-to-save lm_head",
        "--lora-plus-ratio 2",
    ] {
        let said = ["needs `--method lora`", option.split(' ').next().unwrap()];
        place.run(&format!("sft --out o {option}"), &more).failed(2, &said);
    }
    let config = place.file("c.toml", "lora_r = 4\n");
    place.run(&format!("sft --out o --config {config}"), &more).failed(2, &["lora_r", "--method lora"]);
    place.run("sft --out o --method lora --lora-r 0", &more).failed(2, &["whole number from 1"]);
    place.run("sft --out o --method lora --lora-r 4 --adapter a", &more).failed(2, &["cannot be used with"]);
    let lora = |words: &str, said: &[&str]| {
        place.run(&format!("sft --out o --method lora {words}"), &more).failed(1, said);
    };
    lora("--lora-r 4096", &["rank 4096", "_proj", "hint"]);
    lora("--lora-target q_proj,qproj", &["`qproj`", "down_proj", "v_proj"]);
    lora("--modules-to-save head", &["`head`", "lm_head"]);
    lora("--adapter nowhere", &["cannot open `nowhere`", "hint"]);
    let other = fixture("lora/gpt2-lora");
    lora(&format!("--adapter {other}"), &["unexpected", "c_attn.lora_A.weight"]);
    assert!(!place.path("o").exists(), "the right adapter would find a run with other settings");
    let words = format!("plan sft --method lora --adapter {other}");
    place.run(&words, &more).failed(1, &["unexpected", "c_attn.lora_A.weight"]);
    let words = format!("generate --prompt x --model {}", fixture("lora/llama-lora"));
    place.run(&words, &[]).failed(1, &["adapter", "--adapter"]);
    let words = format!("pretrain --config-model {model} --data {data} --out o --method lora");
    place.run(&words, &[]).failed(1, &["fresh weights", "--model"]);
}

#[test]
fn what_is_not_finite_is_not_merged() {
    let place = Place::new();
    let words = "sft --method lora --max-steps 1 --out run --model";
    place.run(words, &[&fixture("chat-tiny"), "--data", &place.chats()]).good();
    fs::create_dir(place.path("broken")).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        fs::copy(Path::new(&fixture("chat-tiny")).join(file), place.path("broken").join(file)).unwrap();
    }
    let weights = place.path("broken/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(weights, bytes).unwrap();
    let ran = place.run("merge --model broken --adapter run/final --out merged", &[]);
    ran.failed(1, &["expected finite logits", "hint:"]);
    assert!(!place.path("merged").exists());
}
