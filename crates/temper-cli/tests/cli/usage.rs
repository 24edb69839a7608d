//! Wrong usage: exit code 2, and words that help.

use crate::support::{Place, fixture};

#[test]
fn every_verb_has_help_with_an_example() {
    for verb in [
        "sft", "dpo", "pretrain", "score", "generate", "chat", "inspect", "selftest", "plan", "bench",
        "merge", "compare", "report", "watch", "sweep",
    ] {
        let help = Place::new().run(verb, &["--help"]).good().stdout();
        assert!(help.contains(&format!("Example:\n  temper {verb} ")), "{help}");
    }
}

#[test]
fn defaults_are_trls() {
    let help = |verb| {
        Place::new().run(verb, &["--help"]).good().stdout().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for default in
        ["[default: 1e-6]", "[default: linear]", "[default: 0.999]", "[default: 1e-8]", "[default: 0.1]"]
    {
        assert!(help("dpo").contains(default), "{default}");
    }
    assert!(help("sft").contains("[default: 2e-5]"));
    assert!(help("pretrain").contains("[default: cosine]"));
}

#[test]
fn an_option_that_a_verb_does_not_read_is_wrong() {
    for (verb, option) in [
        ("sft", "--beta"),
        ("sft", "--reference"),
        ("dpo", "--train-on"),
        ("pretrain", "--truncation"),
        ("pretrain", "--train-on"),
        ("score", "--learning-rate"),
        ("score", "--max-length"),
        ("generate", "--data"),
        ("chat", "--samples"),
        ("inspect", "--seed"),
        ("selftest", "--model"),
    ] {
        Place::new().run(verb, &[option, "1"]).failed(2, &["unexpected argument", option]);
    }
}

#[test]
fn options_that_need_or_exclude_each_other() {
    let place = Place::new();
    let train = "sft --model m --data d --out o";
    for (words, said) in [
        (format!("{train} --warmup-steps 3 --warmup-ratio 0.1"), "cannot be used with"),
        (format!("{train} --eval-steps 3"), "--eval-data"),
        (format!("{train} --dtype f16"), "bf16"),
        (format!("{train} --batch-size 0"), "whole number from 1"),
        (format!("{train} --learning-rate nan"), "number from 0"),
        (format!("{train} --dropout 1"), "below 1"),
        (format!("{train} --order random"), "shuffled"),
        ("dpo --model m --data d --out o --loss-type ipo".into(), "sigmoid"),
        ("inspect --model m --train-on all".into(), "--data"),
        (format!("{train} --num-train-epochs 3"), "similar argument exists: '--epochs'"),
        ("generate --model m --prompt p --system s".into(), "--chat"),
        ("selftest everything".into(), "dpo-identity"),
        ("sft".into(), "--model"),
        ("".into(), "Usage"),
    ] {
        place.run(&words, &[]).failed(2, &[said]);
    }
}

#[test]
fn keys_of_a_config_file_are_checked() {
    let place = Place::new();
    let refused = |text: &str, words: &[&str]| {
        let config = place.file("run.toml", text);
        place.run("sft --model m --data d --out o --config", &[&config]).failed(2, words);
    };
    refused("epochs = 1\nlearning_rat = 3\n", &["run.toml` line 2", "`learning_rat`", "`learning_rate`"]);
    refused("per_device_train_batch_size = 8\n", &["line 1", "it is `batch_size` here"]);
    refused("beta = 0.1\n", &["line 1", "`temper sft` reads no key `beta`"]);
    refused("config = \"x\"\n", &["`config`"]);
    refused("\n\nepochs = \"many\"\n", &["line 3", "--epochs"]);
    refused("epochs = [1]\n", &["line 1", "`epochs`"]);
    refused("epochs = \n", &["is not TOML"]);
    place.run("sft --model m --data d --out o --config nowhere.toml", &[]).failed(2, &["nowhere.toml"]);
    place.run("score --config run.toml", &[]).failed(2, &["--config"]);
}

#[test]
fn what_cannot_be_opened_is_named() {
    let place = Place::new();
    let data = place.chats();
    place.run("score --model nowhere --data", &[&data]).failed(1, &["`nowhere`", "check that"]);
    place
        .run("score --model owner/name --data", &[&data])
        .failed(1, &["hf download owner/name --local-dir name"]);
    // The folder of a run in place of what the run made.
    let model = fixture("chat-tiny");
    let words = "sft --epochs 1 --quiet --data chats.jsonl --model";
    place.run(&format!("{words} {model} --out run"), &[]).good();
    place.run(&format!("{words} {model} --out lora --method lora"), &[]).good();
    place.run("score --model run --data", &[&data]).failed(1, &["its model is `run/final`"]);
    place.run("score --model lora --data", &[&data]).failed(1, &["`--adapter lora/final`"]);
    place
        .run("score --model run/final --adapter lora --data", &[&data])
        .failed(1, &["its adapter is `lora/final`"]);
    place
        .run("score --model run/final --adapter run/final --data", &[&data])
        .failed(1, &["give it as `--model`"]);
    place.run("score --data nowhere.jsonl --model", &[&fixture("chat-tiny")]).failed(1, &["`nowhere.jsonl`"]);
    let words = "score --chat-template nowhere.jinja --model";
    place.run(words, &[&fixture("chat-tiny"), "--data", &data]).failed(1, &["`nowhere.jinja`"]);
    place.run("sft --out o --model", &[&fixture("gpt2-tiny"), "--data", &data]).failed(1, &["no tokenizer"]);
}
