//! `sft`, `dpo` and `pretrain`: what they learn, write, say and refuse.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Place, Ran, contents, fixture, lines, manifest, parsed};

#[test]
fn sft_learns_and_its_model_generates() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let words = "sft --out run --epochs 12 --learning-rate 3e-3 --batch-size 4";
    let ran = place.run(words, &["--model", &model, "--data", &data, "--eval-data", &data]).good();
    let metrics = lines(&place.path("run/metrics.jsonl"));
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert_eq!(metrics.len(), 38, "36 steps between two evaluations");
    assert!(loss(&metrics[36]) < 0.7 * loss(&metrics[1]));
    assert!(metrics[37]["eval_loss"].as_f64() < metrics[0]["eval_loss"].as_f64());
    let said = ran.stderr();
    for word in [
        "`messages`",
        "learning_rate 3e-3 (flag)",
        "max_length 256 (default)",
        "temper chat --model run/final",
    ] {
        assert!(said.contains(word), "`{word}` is not in:\n{said}");
    }
    assert!(ran.stdout().is_empty());
    let chat =
        place.run("generate --model run/final --chat --max-new-tokens 8 --prompt", &["What comes after 3?"]);
    assert!(!chat.good().stdout().trim().is_empty());
}

#[test]
fn dpo_begins_at_ln_2_and_raises_the_margin() {
    let place = Place::new();
    let words = "dpo --out run --epochs 6 --learning-rate 2e-3 --batch-size 4 --order sequential";
    let ran = place.run(words, &["--model", &fixture("chat-tiny"), "--data", &place.pairs()]).good();
    let metrics = lines(&place.path("run/metrics.jsonl"));
    assert!((metrics[0]["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-5);
    assert!(metrics[17]["rewards/margins"].as_f64().unwrap() > 0.01);
    assert!(ran.stderr().contains("from ln 2"));
    // Another run finds the reference in the cache.
    let words = words.replace("--out run", "--out again");
    let again = place.run(&words, &["--model", &fixture("chat-tiny"), "--data", &place.pairs()]).good();
    assert!(again.stderr().contains("from the cache"), "{}", again.stderr());
    assert_eq!(
        fs::read(place.path("run/final/model.safetensors")).unwrap(),
        fs::read(place.path("again/final/model.safetensors")).unwrap(),
    );
}

#[test]
fn a_cache_that_cannot_be_written_does_not_end_a_run() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    let words = ["dpo", "--out", "run", "--max-steps", "1", "--model", &model, "--data", &data];
    let mut command = place.temper(words);
    let said = Ran(command.env("XDG_CACHE_HOME", "/dev/null").output().unwrap()).good().stderr();
    assert!(said.contains("the reference will be computed again"), "{said}");
    assert!(place.path("run/final/DONE").exists());
}

#[test]
fn the_reference_can_be_another_model() {
    let place = Place::new();
    let (model, pairs) = (fixture("chat-tiny"), place.pairs());
    place.run("sft --out sft --epochs 4 --learning-rate 3e-3", &["--model", &model, "--data", &pairs]).good();
    let words = "dpo --out run --model sft/final --max-steps 1 --reference";
    let ran = place.run(words, &[&model, "--data", &pairs]).good();
    assert!(!ran.stderr().contains("ln 2"));
    let loss = lines(&place.path("run/metrics.jsonl"))[0]["loss"].as_f64().unwrap();
    assert!((loss - std::f64::consts::LN_2).abs() > 1e-3, "{loss}");
    assert!(manifest(&place.path("run"))["run"]["reference"].is_string());
}

#[test]
fn pretraining_begins_with_fresh_or_given_weights() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.documents());
    let words = "pretrain --max-length 32 --epochs 2 --batch-size 2";
    for config in [model.clone(), format!("{model}/config.json")] {
        let out = format!("fresh{}", config.len());
        let more = ["--config-model", &config, "--data", &data, "--out", &out];
        let ran = place.run(words, &more).good();
        assert!(ran.stderr().contains("fresh weights"));
        let loss = lines(&place.path(&out).join("metrics.jsonl"))[0]["loss"].as_f64().unwrap();
        assert!((loss - 400f64.ln()).abs() < 0.3, "a fresh model knows nothing: {loss}");
    }
    place.run(words, &["--model", &model, "--data", &data, "--out", "given"]).good();
    assert!(place.path("given/final/DONE").exists());
    place.run(words, &["--data", &data, "--out", "none"]).failed(2, &["--config-model"]);
}

#[test]
fn flags_win_over_the_config_file_and_every_origin_is_kept() {
    let place = Place::new();
    let config = place.file(
        "run.toml",
        &format!(
            "# a comment\nmodel = {:?}\nlearning_rate = 1e-4\nepochs = 1\nbatch_size = 4\ntrain_on = \"all\"\n",
            fixture("chat-tiny"),
        ),
    );
    let ran =
        place.run("sft --out run --batch-size 6", &["--config", &config, "--data", &place.chats()]).good();
    assert!(ran.stderr().contains("learning_rate 1e-4 (config file)"), "{}", ran.stderr());
    let manifest = manifest(&place.path("run"));
    let setting = |key: &str| {
        let setting = &manifest["settings"][key];
        (setting["value"].clone(), setting["origin"].as_str().unwrap().to_owned())
    };
    assert_eq!(setting("learning_rate"), (1e-4.into(), "config file".into()));
    assert_eq!(setting("batch_size"), (6.into(), "flag".into()));
    assert_eq!(setting("seed"), (42.into(), "default".into()));
    assert_eq!(manifest["run"]["train_on"], "all");
    assert_eq!(lines(&place.path("run/metrics.jsonl")).len(), 2);
}

#[test]
fn equal_numbers_are_equal_settings() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.run("sft --out run --max-steps 1 --learning-rate 1e-5 --max-grad-norm 1", &more).good();
    let again =
        place.run("sft --out run --max-steps 1 --learning-rate 0.00001 --max-grad-norm 1.0", &more).good();
    assert!(again.stderr().contains("nothing was changed"));
    // A number of 17 digits is read from the manifest as it was written.
    let words = "sft --out digits --max-steps 2 --learning-rate 0.00019357097937073138";
    place.run(&format!("{words} --stop-after 1"), &more).good();
    place.run(words, &more).good();
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    let words = "sft --out run --epochs 1 --save-steps 1";
    place.run(words, &more).good();
    let before = contents(&place.path("run"));
    let again = place.run(&format!("{words} --threads 1 --keep 5"), &more).good();
    assert!(again.stderr().contains("nothing was changed"), "{}", again.stderr());
    assert_eq!(before, contents(&place.path("run")));
}

#[test]
fn other_settings_are_refused_by_name() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.run("sft --out run --epochs 1", &more).good();
    let differing = ["learning_rate: 0.00002 there, 0.001 now", "seed: 42 there, 7 now", "hint:"];
    place.run("sft --out run --epochs 1 --seed 7 --learning-rate 1e-3", &more).failed(1, &differing);
    // What the data holds counts, not its name.
    let renamed = place.jsonl("renamed.jsonl", lines(&place.path("chats.jsonl")));
    let more = ["--model", &fixture("chat-tiny"), "--data", &renamed];
    place.run("sft --out run --epochs 1", &more).good();
    let shorter = place.jsonl("other.jsonl", lines(&place.path("chats.jsonl")).into_iter().take(3));
    let more = ["--model", &fixture("chat-tiny"), "--data", &shorter];
    place.run("sft --out run --epochs 1", &more).failed(1, &["data: "]);
}

#[test]
fn a_run_directory_has_one_process() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.run("sft --out run --epochs 1", &more).good();
    let lock = fs::File::open(place.path("run/.lock")).unwrap();
    lock.lock().unwrap();
    place.run("sft --out run --epochs 1", &more).failed(1, &["another process", "hint:"]);
}

#[test]
fn an_output_path_that_cannot_be_is_an_error() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.file("file", "");
    place.run("sft --out file/run", &more).failed(1, &["file/run", "hint:"]);
    fs::create_dir(place.path("mine")).unwrap();
    fs::write(place.path("mine/thesis.tex"), "").unwrap();
    place.run("sft --out mine", &more).failed(1, &["thesis.tex", "hint:"]);
    assert_eq!(contents(&place.path("mine")).len(), 1);
}

/// `ulimit -f` counts blocks of 512 or 1024 bytes; the model has about 120 kB, all else less.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_nothing_half_written() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let script = "ulimit -f 30; exec \"$0\" \"$@\"";
    let words = ["sft", "--out", "run", "--epochs", "1", "--model", &model, "--data", &data];
    let limited = std::process::Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_temper")])
        .args(words)
        .current_dir(place.path(""))
        .output();
    let ran = crate::support::Ran(limited.unwrap()).failed(1, &["cannot write", "run/.final"]);
    assert_eq!(ran.stderr().matches("run/.final").count(), 1, "{}", ran.stderr());
    assert!(!place.path("run/final").exists());
    let left: Vec<_> =
        fs::read_dir(place.path("run")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        left.iter().map(|name| name.to_str().unwrap()).all(|name| {
            ["manifest.json", "metrics.jsonl", "ended.json", ".lock"].contains(&name)
                || name.starts_with("events.out.")
        }),
        "{left:?}"
    );
    let ended = fs::read_to_string(place.path("run/ended.json")).unwrap();
    assert!(ended.contains("failed") && ended.contains("cannot write"), "{ended}");
    // With room, the same command finishes.
    place.run("sft --out run --epochs 1", &["--model", &model, "--data", &data]).good();
    assert!(!place.path("run/ended.json").exists());
}

#[test]
fn broken_and_empty_data_are_named() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    let mut rows: Vec<String> =
        fs::read_to_string(place.chats()).unwrap().lines().map(str::to_owned).collect();
    rows = rows.iter().cycle().take(30).cloned().collect();
    rows[16] = "{\"messages\": [".into();
    let broken = place.file("broken.jsonl", &rows.join("\n"));
    place.run("sft --out run", &["--model", &model, "--data", &broken]).failed(1, &["broken.jsonl` line 17"]);
    let empty = place.file("empty.jsonl", "");
    place.run("sft --out run", &["--model", &model, "--data", &empty]).failed(1, &["holds no records"]);
    place
        .run("dpo --out run", &["--model", &model, "--data", &place.chats()])
        .failed(1, &["expected preferences"]);
    assert!(!place.path("run").exists());
}

#[test]
fn options_that_the_data_cannot_obey_are_refused() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.documents()];
    place.run("sft --out run --train-on assistant", &more).failed(1, &["--train-on", "hint:"]);
    place.run("sft --out run --max-length 9999", &more).failed(1, &["context of 256"]);
    place.run("sft --out run --epochs 0", &more).failed(1, &["no step"]);
}

#[test]
fn the_final_model_has_the_asked_number_format() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    place.run("sft --out run --max-steps 1 --save-dtype bf16", &more).good();
    let shown = place.run("inspect --model run/final", &[]).good().stdout();
    assert!(shown.contains("BF16") && !shown.contains("F32"), "{shown}");
}

#[test]
fn of_a_folder_it_is_said_what_was_read() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    let text = |words: &str| json!({ "text": words });
    place.jsonl("folder/train.jsonl", [text("one two"), text("three four")]);
    place.jsonl("folder/test-0.jsonl", [text("five six")]);
    place.file("folder/more.yaml", "{}");
    let model = fixture("chat-tiny");
    let more = ["--model", &model, "--data", "folder"];
    let said = place.run("sft --out run --max-steps 1", &more).good().stderr();
    for words in ["test-0.jsonl 1, train.jsonl 2", "not read: more.yaml", "looks held back: test-0.jsonl"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    fs::remove_file(place.path("folder/train.jsonl")).unwrap();
    let said = place.run("sft --out alone --max-steps 1", &more).good().stderr();
    assert!(!said.contains("held back"), "{said}");
}

/// Whoever loads the saved model must stop at the end of a turn that training taught.
#[test]
fn the_end_of_a_turn_is_saved_as_an_end_of_answers() {
    let place = Place::new();
    let data = place.chats();
    fs::create_dir(place.path("base")).unwrap();
    for entry in fs::read_dir(fixture("chat-tiny")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), place.path("base").join(entry.file_name())).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&fs::read(place.path("base/config.json")).unwrap()).unwrap();
    config["eos_token_id"] = 0.into();
    place.file("base/config.json", &config.to_string());
    let generation = |eos: &str| format!("{{\"bos_token_id\": 1, \"eos_token_id\": {eos}}}");
    place.file("base/tokenizer_config.json", "{\"eos_token\": \"<|endoftext|>\"}");
    for (given, saved) in [(generation("0"), json!([0, 2])), (generation("[2, 0]"), json!([2, 0]))] {
        place.file("base/generation_config.json", &given);
        let _ = fs::remove_dir_all(place.path("run"));
        let words = "sft --model base --out run --max-steps 1 --chat-template chatml --data";
        place.run(words, &[&data]).good();
        let written = fs::read(place.path("run/final/generation_config.json")).unwrap();
        let written: Value = serde_json::from_slice(&written).unwrap();
        assert_eq!((&written["eos_token_id"], &written["bos_token_id"]), (&saved, &json!(1)));
    }
}

#[test]
fn a_reference_that_reads_other_tokens_is_refused() {
    let place = Place::new();
    let data = place.pairs();
    for reference in ["llama-tiny", "gpt2-tiny"] {
        let (model, reference) = (fixture("chat-tiny"), fixture(reference));
        let more = ["--model", &model, "--data", &data, "--reference", &reference];
        place.run("dpo --out run --max-steps 1", &more).failed(1, &["cannot be the reference", "hint"]);
        assert!(!place.path("run").exists());
    }
    let (model, adapter) = (fixture("chat-tiny"), fixture("lora/llama-lora"));
    let with = |reference: &str| {
        let more = ["--model", &model, "--data", &data, "--reference", reference];
        place.run("dpo --out run --max-steps 1", &more)
    };
    with(&adapter).failed(1, &["is an adapter", "temper merge"]);
    with(&model).good();
}

#[test]
fn a_model_that_diverged_is_not_saved() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let more = ["--model", &model, "--data", &data];
    let half = format!("sft --out half --max-steps 1 --learning-rate 1e6 --eval-data {data}");
    place.run("sft --out run --max-steps 1 --learning-rate 3e38", &more).failed(1, &["cannot save", "hint"]);
    place.run(&format!("{half} --save-dtype f16"), &more).failed(1, &["F16", "bf16"]);
    assert!(!place.path("run/final").exists() && !place.path("half/final").exists());
    // Its steps are kept, and another type has room for it.
    let said = place.run(&format!("{half} --save-dtype f32"), &more).good().stderr();
    assert!(said.contains("after step 1") && place.path("half/final").exists(), "{said}");
    assert_eq!(lines(&place.path("half/metrics.jsonl")).len(), 3, "one evaluation of each end");
    place.run("sft --out zero --adam-epsilon 0", &more).failed(2, &["a number above 0"]);
}

#[test]
fn numbers_of_a_config_file_keep_their_radix_and_flags_win_over_keys_that_exclude_them() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let file = place.file("run.toml", "max_steps = 0x3\nwarmup_steps = 1\n");
    let more = ["--model", &model, "--data", &data, "--config", &file, "--warmup-ratio", "0.1"];
    let said = place.run("sft --out run", &more).good().stderr();
    assert!(
        said.contains("warmup_steps 0 (default)") && said.contains("max_steps 3 (config file)"),
        "{said}"
    );
    assert!(said.contains("`warmup_steps` does not count beside --warmup-ratio"), "{said}");
    assert_eq!(lines(&place.path("run/metrics.jsonl")).len(), 3);
    let file = place.file("other.toml", "max_steps = 2\nwarmup_ratio = 0.5\n");
    let more = ["--model", &model, "--data", &data, "--config", &file, "--warmup-steps", "1"];
    let said = place.run("sft --out other", &more).good().stderr();
    assert!(
        said.contains("warmup_steps 1 (flag)") && said.contains("`warmup_ratio` does not count"),
        "{said}"
    );
}

#[test]
fn surprising_tables_and_objects_are_errors() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    for (name, text, words) in [
        ("twice.csv", "text,text\nhello,world\n", ["two columns", "`text`"]),
        ("one.json", "{\n  \"text\": \"hello\"\n}\n", ["one.json", "an array of records"]),
    ] {
        let data = place.file(name, text);
        place.run("sft --out run", &["--model", &model, "--data", &data]).failed(1, &words);
    }
}

/// A model of this shape beside a tokenizer.
fn config_of(place: &Place, shape: Value) -> String {
    let mut config: Value = serde_json::from_str(
        &fs::read_to_string(Path::new(&fixture("chat-tiny")).join("config.json")).unwrap(),
    )
    .unwrap();
    for (key, value) in shape.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::create_dir_all(place.path("large")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(&fixture("chat-tiny")).join(file), place.path("large").join(file)).unwrap();
    }
    place.file("large/config.json", &config.to_string())
}

/// A model large enough that its parameters, not the program, fill the memory.
fn large_config(place: &Place) -> String {
    config_of(place, json!({ "intermediate_size": 40_000 }))
}

#[test]
fn the_plan_is_what_the_run_takes_and_leaves_nothing() {
    let place = Place::new();
    let more = ["--config-model", &large_config(&place), "--data", &place.documents(), "--out", "run"];
    for dtype in ["f32", "bf16"] {
        let words = format!("pretrain --max-length 32 --max-steps 1 --batch-size 4 --dtype {dtype}");
        let planned = place.run(&format!("plan {words}"), &more).good().stdout();
        assert!(!place.path("run").exists(), "a plan writes nothing");
        let together = planned.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
        let ["together", size, "MB"] = together[..] else { panic!("{planned}") };
        let planned: f64 = size.parse().unwrap();
        place.run(&words, &more).good();
        let measured = lines(&place.path("run/metrics.jsonl"))[0]["peak_rss_bytes"].as_f64().unwrap() / 1e6;
        assert!(measured > 100.0, "large enough to mean something: {measured} MB");
        let error = (planned - measured).abs() / measured;
        assert!(error < 0.1, "{dtype}: planned {planned} MB, measured {measured} MB");
        fs::remove_dir_all(place.path("run")).unwrap();
    }
}

#[test]
fn the_plan_of_adapters_counts_the_frozen_model_as_it_is_kept() {
    let place = Place::new();
    let (config, data) = (large_config(&place), place.documents());
    let words =
        "pretrain --max-length 32 --max-steps 1 --batch-size 1 --save-dtype bf16 --out base --config-model";
    place.run(words, &[&config, "--data", &data]).good();
    for (dtype, quantize) in [("f32", "none"), ("bf16", "none"), ("f32", "nf4"), ("bf16", "int8")] {
        let words = format!(
            "pretrain --method lora --quantize {quantize} --dtype {dtype} --max-length 32 --max-steps 1 --batch-size 4"
        );
        let out = format!("{quantize}-{dtype}");
        let more = ["--model", "base/final", "--data", &data, "--out", &out];
        let planned = place.run(&format!("plan {words}"), &more).good().stdout();
        let size = planned.split_whitespace().rev().nth(1).unwrap();
        let planned: f64 = size.parse().unwrap();
        place.run(&words, &more).good();
        let line = &lines(&place.path(&out).join("metrics.jsonl"))[0];
        let measured = line["peak_rss_bytes"].as_f64().unwrap() / 1e6;
        let error = (planned - measured).abs() / measured;
        assert!(error < 0.1, "{out}: planned {planned} MB, measured {measured} MB");
    }
}

/// Nothing comes on top of what was planned: no table as its file has it, no tile of logits, no rows without what was dropped.
#[test]
fn the_plan_of_a_large_vocabulary_counts_what_operations_take() {
    let place = Place::new();
    let config = config_of(&place, json!({ "vocab_size": 200_000, "intermediate_size": 600 }));
    let text = |i: usize| format!("Document {i} says that the sky is blue. ").repeat(40);
    let data = place.jsonl("documents.jsonl", (0..8).map(|i| json!({ "text": text(i) })));
    let words =
        "pretrain --max-length 32 --max-steps 1 --batch-size 1 --save-dtype bf16 --out base --config-model";
    place.run(words, &[&config, "--data", &data]).good();
    let words = "pretrain --method lora --lora-r 4 --lora-dropout 0.1 --quantize int8 --dtype bf16 --max-length 256 \
                 --microbatch-tokens 1024 --batch-size 8 --max-steps 1 --model base/final --out run --data";
    let planned = place.run(&format!("plan {words}"), &[&data]).good().stdout();
    let planned: f64 = planned.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    place.run(words, &[&data]).good();
    let measured = lines(&place.path("run/metrics.jsonl"))[0]["peak_rss_bytes"].as_f64().unwrap() / 1e6;
    assert!((planned - measured).abs() / measured < 0.1, "planned {planned} MB, measured {measured} MB");
}

/// The prompts of chat models go through the template, those of others as they are.
#[test]
fn samples_are_what_generate_says() {
    let place = Place::new();
    let data = place.chats();
    let prompts = place.jsonl(
        "prompts.jsonl",
        [
            json!({ "prompt": "What comes after 3?" }),
            json!({ "messages": [{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": "x" }] }),
        ],
    );
    let words = "sft --out run --epochs 12 --learning-rate 3e-3 --batch-size 4 --dtype f32 --sample-prompts";
    let ran = place.run(words, &[&prompts, "--model", &fixture("chat-tiny"), "--data", &data]).good();
    let samples = lines(&place.path("run/samples.jsonl"));
    assert!(ran.stderr().contains("step 36  “What comes after 3?” →"), "{}", ran.stderr());
    let planned = place.run(
        "plan sft --out no --sample-prompts",
        &[&prompts, "--model", &fixture("chat-tiny"), "--data", &data],
    );
    assert!(planned.good().stdout().contains("answers to prompts"));
    assert_eq!(samples.len(), 4);
    for (sample, prompt) in samples[2..].iter().zip(["What comes after 3?", "Hello"]) {
        assert_eq!(sample["prompt"], prompt);
        let words = "generate --model run/final --chat --max-new-tokens 64 --dtype f32 --prompt";
        assert_eq!(
            sample["answer"].as_str().unwrap(),
            place.run(words, &[prompt]).good().stdout().trim_end_matches('\n')
        );
    }
}

#[test]
fn prompts_that_cannot_be_answered_are_named() {
    let place = Place::new();
    let data = place.chats();
    let more = ["--model", &fixture("chat-tiny"), "--data", &data, "--sample-prompts"];
    let refused = |file: &str, words: &[&str]| {
        place.run("sft --out run --max-steps 1", &[&more[..], &[file]].concat()).failed(1, words);
        assert!(!place.path("run").exists());
    };
    refused("nowhere.txt", &["`nowhere.txt`"]);
    refused(&place.file("empty.txt", "\n"), &["holds no records", "hint:"]);
    refused(
        &place.file("other.jsonl", "{\"prompt\": \"a\"}\n{\"answer\": \"b\"}\n"),
        &["line 2", "`answer`", "hint:"],
    );
    refused(
        &place.file("long.txt", &format!("\nshort\n{}\n", "word ".repeat(400))),
        &["line 3", "context is 256", "hint:"],
    );
    place.run("sft --out run --sample-prompts", &[]).failed(2, &["--sample-prompts <FILE>"]);
    place.run("sft --out run --sample-steps 3", &more[..4]).failed(2, &["--sample-prompts"]);
}

#[test]
fn quiet_says_nothing_of_a_good_run() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.pairs()];
    let ran = place.run("dpo --out run --max-steps 2 --quiet", &more).good();
    assert_eq!(ran.stderr() + &ran.stdout(), "");
    place.run("dpo --out run --max-steps 3 --quiet", &more).failed(1, &["max_steps", "hint:"]);
    let config = place.file("run.toml", "quiet = true\njson = false\n");
    let ran = place.run("sft --out sft --max-steps 1 --config", &[&[&config[..]], &more[..]].concat()).good();
    assert_eq!(ran.stderr() + &ran.stdout(), "");
    let config = place.file("run.toml", "quiet = 1\n");
    place.run("sft --out sft --config", &[&[&config[..]], &more[..]].concat()).failed(2, &["true or false"]);
}

#[test]
fn events_as_json_have_what_the_metrics_have() {
    let place = Place::new();
    let data = place.pairs();
    let more = ["--model", &fixture("chat-tiny"), "--data", &data, "--eval-data", &data];
    let words = "dpo --out run --batch-size 6 --max-steps 2 --save-steps 1 --json";
    let events = parsed(&place.run(words, &more).good().stdout());
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let after: Vec<&&str> = names.iter().skip_while(|name| **name == "reference").collect();
    assert_eq!(after, [&"evaluated", &"step", &"saved", &"step", &"evaluated", &"saved", &"done"]);
    assert_eq!(events[names.len() - 1]["path"], "run/final");
    let metrics = lines(&place.path("run/metrics.jsonl"));
    let measured =
        events.iter().filter(|event| ["step", "evaluated"].contains(&event["event"].as_str().unwrap()));
    for (event, line) in measured.zip(&metrics) {
        for (key, value) in line.as_object().unwrap().iter().filter(|(key, _)| *key != "peak_rss_bytes") {
            assert_eq!(&event[key], value, "{key}");
        }
    }
    let again = parsed(&place.run(words, &more).good().stdout());
    assert_eq!(again, [json!({ "event": "done", "path": "run/final", "before": true })]);
    let planned = parsed(&place.run(&format!("plan {words}"), &more).good().stdout());
    assert!(planned[0]["together_bytes"].as_u64() > planned[0]["gradients_bytes"].as_u64());
}

#[test]
fn a_plan_reads_the_same_options() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.pairs(), "--out", "run"];
    place.run("plan dpo --batch-size 2", &more).good();
    place.run("plan dpo --train-on all", &more).failed(2, &["unexpected argument"]);
    let config = place.file("run.toml", "batch_size = 2\nbeta = 0.3\n");
    place.run(&format!("plan dpo --config {config}"), &more).good();
    place.run(&format!("plan sft --config {config}"), &more).failed(2, &["beta", "line 2"]);
    place.run(&format!("plan --ranks 2 sft --config {config}"), &more).failed(2, &["beta", "line 2"]);
    place.run("plan --ranks=2 dpo --lora-r 4", &more).failed(2, &["--lora-r needs `--method lora`"]);
    place.run(&format!("plan --ranks 2 --bandwidth 5 dpo --config {config}"), &more).good();
    place
        .run(&format!("plan --bandwidth 5 dpo --config {config}"), &more)
        .failed(1, &["--bandwidth", "--ranks", "hint"]);
    place.run("plan dpo --parallel fsdp", &more).failed(1, &["no effect", "--ranks"]);
    place.run("plan", &[]).failed(2, &["sft"]);
    place.run("plan score", &more).failed(2, &["score"]);
}
