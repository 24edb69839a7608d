//! `score`, `generate`, `chat`, `inspect` and `selftest`: what stands on stdout.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::support::{Place, Ran, fixture, parsed};

#[test]
fn scores_are_one_object_a_record_and_a_summary() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.pairs()];
    let scored = parsed(&place.run("score --json", &more).good().stdout());
    assert_eq!(scored.len(), 13);
    let keys: Vec<&str> = scored[3].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["row", "logps/chosen", "logps/rejected", "tokens/chosen", "tokens/rejected"]);
    assert!((0..12).all(|row| scored[row]["row"] == row));
    assert_eq!((&scored[12]["summary"], &scored[12]["records"]), (&Value::Bool(true), &12.into()));
    let better = |line: &&Value| line["logps/chosen"].as_f64() > line["logps/rejected"].as_f64();
    let share = scored[..12].iter().filter(better).count() as f64 / 12.0;
    assert_eq!(scored[12]["preference_accuracy"], share);
    // However the records are put together, the numbers are the same.
    let again = parsed(&place.run("score --json --microbatch-tokens 1 --threads 1", &more).good().stdout());
    for (a, b) in scored.iter().zip(&again).take(12) {
        assert!((a["logps/chosen"].as_f64().unwrap() - b["logps/chosen"].as_f64().unwrap()).abs() < 1e-4);
    }
}

#[test]
fn rows_are_numbered_as_in_the_file() {
    let place = Place::new();
    let row = |text: &str| serde_json::json!({ "prompt": "A colour: ", "completion": text });
    let data = place.jsonl("data.jsonl", [row("red"), row(""), row("blue")]);
    let scored = parsed(
        &place.run("score --json", &["--model", &fixture("chat-tiny"), "--data", &data]).good().stdout(),
    );
    assert_eq!(
        (&scored[0]["row"], &scored[1]["row"], &scored[2]["records"]),
        (&0.into(), &2.into(), &2.into())
    );
    let perplexity = scored[2]["perplexity/completion"].as_f64().unwrap();
    let sum = |key: &str| scored[..2].iter().map(|line| line[key].as_f64().unwrap()).sum::<f64>();
    assert!((perplexity - (-sum("logps/completion") / sum("tokens/completion")).exp()).abs() < 1e-9);
}

#[test]
fn scoring_never_cuts() {
    let place = Place::new();
    let data = place.jsonl("long.jsonl", [serde_json::json!({ "text": "word and word ".repeat(200) })]);
    let more = ["--model", &fixture("chat-tiny"), "--data", &data];
    place.run("score", &more).failed(1, &["line 1", "256", "--truncation drop"]);
    let long = serde_json::json!({ "text": "word and word ".repeat(200) });
    place.jsonl("long.jsonl", [long, serde_json::json!({ "text": "word and word" })]);
    let scored = place.run("score --json --truncation drop", &more).good();
    assert!(scored.stderr().contains("1    dropped: longer than allowed"), "{}", scored.stderr());
    let rows = parsed(&scored.stdout());
    assert_eq!((&rows[0]["row"], &rows[1]["records"]), (&1.into(), &1.into()));
}

#[test]
fn rows_count_records_and_no_other_lines() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    let csv = place.file("a.csv", "prompt,completion\nwhat,\"one\ntwo\"\nwhat,\nwhat,three\n");
    let blank = place.file("b.jsonl", "{\"text\":\"one two\"}\n\n{\"text\":\"three\"}\n");
    for (data, expected) in [(csv, [0, 2]), (blank, [0, 1])] {
        let rows = parsed(&place.run("score --json", &["--model", &model, "--data", &data]).good().stdout());
        assert_eq!([&rows[0]["row"], &rows[1]["row"]], expected, "{data}");
    }
}

#[test]
fn rows_of_a_folder_name_their_file() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    for name in ["folder/a.jsonl", "folder/b.jsonl"] {
        place.jsonl(name, [serde_json::json!({ "text": "word and word" })]);
    }
    let more = ["--model", &fixture("chat-tiny"), "--data", "folder"];
    let rows = parsed(&place.run("score --json", &more).good().stdout());
    assert_eq!((rows[0]["row"].as_u64(), rows[1]["row"].as_u64()), (Some(0), Some(0)));
    assert_eq!((&rows[0]["file"], &rows[1]["file"]), (&"folder/a.jsonl".into(), &"folder/b.jsonl".into()));
    assert!(place.run("score", &more).good().stdout().contains("folder/b.jsonl"));
}

/// A place with a copy of the chat model, to be changed, in `model`.
fn with_a_model() -> Place {
    let place = Place::new();
    std::fs::create_dir(place.path("model")).unwrap();
    for entry in std::fs::read_dir(fixture("chat-tiny")).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), place.path("model").join(entry.file_name())).unwrap();
    }
    place
}

/// A model whose own template is none of ours to run serves all that needs no template.
#[test]
fn a_broken_template_stops_only_what_needs_it() {
    let place = with_a_model();
    place.file("model/chat_template.jinja", "{% for message in %}");
    let words = "generate --model model --max-new-tokens 4 --prompt";
    let plain = place.run(words, &["Once"]).good();
    assert!(
        plain.stderr().contains("messages cannot be used with this model: the chat template fails at line 1")
    );
    let texts = place.jsonl("texts.jsonl", [serde_json::json!({ "text": "one two" })]);
    let chats = place.jsonl(
        "chats.jsonl",
        [serde_json::json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }] })],
    );
    place.run("score --model model --data", &[&texts]).good();
    let failure = ["the chat template fails at line 1", "--chat-template"];
    place.run("score --model model --data", &[&chats]).failed(1, &["line 1: ", failure[0], failure[1]]);
    place.run(words, &["Once", "--chat"]).failed(1, &failure);
    place.run("chat --model model", &[]).failed(1, &failure);
    let trained = place.run("sft --model model --out run --max-steps 1 --data", &[&texts]).good();
    assert!(trained.stderr().contains("temper generate --model run/final"), "{}", trained.stderr());
    place.run(words, &["Once", "--chat", "--chat-template", "chatml"]).good();
    assert!(place.run("inspect --model model", &[]).good().stdout().contains("which cannot be used"));
}

#[test]
fn settings_that_are_not_given_are_the_models_own() {
    let place = with_a_model();
    let own = |settings: &str| {
        let ends = "\"eos_token_id\": [2, 0], \"do_sample\": true";
        place.file("model/generation_config.json", &format!("{{{ends}, {settings}}}"));
    };
    let answer = |words: &str| {
        let words = format!("generate --model model --max-new-tokens 12 {words} --prompt");
        place.run(&words, &["What comes after 3?"])
    };
    own("\"top_k\": 1");
    let likeliest = answer("--temperature 0").good().stdout();
    assert_eq!(answer("--temperature 9").good().stdout(), likeliest, "top_k is the model's");
    // Also where the model asks for no drawing and an option does.
    place.file("model/generation_config.json", r#"{"eos_token_id": [2, 0], "do_sample": false, "top_k": 1}"#);
    assert_eq!(answer("--temperature 9").good().stdout(), likeliest);
    own("\"temperature\": 9, \"top_k\": 0");
    assert_ne!(answer("--top-p 0.999").good().stdout(), likeliest, "the temperature is the model's");
    place.file("model/generation_config.json", r#"{"eos_token_id": [2, "x"]}"#);
    answer("").failed(1, &["`model`: generation_config.json: `eos_token_id`", "found [2,\"x\"]", "hint"]);
    own("\"max_new_tokens\": 3");
    let short = place.run("generate --model model --temperature 0 --prompt", &["What comes after 3?"]).good();
    assert!(short.stderr().contains("; 3 written in") && short.stderr().contains("; cut at 3"), "{short:?}");
    assert!(likeliest.starts_with(short.stdout().trim_end()), "{likeliest}");
    assert!(!answer("--temperature 0").good().stderr().contains("cut at 3"));
    own("\"max_new_tokens\": 0");
    let words = "generate --model model --prompt";
    place
        .run(words, &["x"])
        .failed(1, &["`max_new_tokens`", "a whole number from 1, found 0", "--max-new-tokens"]);
    own("\"top_p\": 7");
    answer("--temperature 1").failed(1, &["`top_p`", "from 0 to 1, found 7", "--top-p"]);
    assert_eq!(answer("--top-p 0.5 --top-k 1").good().stdout(), likeliest);
}

#[test]
fn what_changes_nothing_in_a_greedy_answer_is_refused() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    place.run("bench --rows 99999999999", &[]).failed(2, &["from 1 to 65536"]);
    place.run("bench --rows 99999999999999999999", &[]).failed(2, &["from 1 to 65536"]);
    for option in ["--seed 1", "--temperature 0 --top-k 3", "--samples 2"] {
        let words = format!("generate --prompt Once {option}");
        place.run(&words, &["--model", &model]).failed(1, &["likeliest token", "hint"]);
    }
}

#[test]
fn equal_seeds_draw_equal_answers() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    let draw = |seed: &str| {
        let words = "generate --temperature 1 --max-new-tokens 12 --samples 3 --prompt Once --seed";
        let drawn = place.run(words, &[seed, "--model", &model]).good();
        assert!(drawn.stderr().contains(" tokens written in "), "{}", drawn.stderr());
        drawn.stdout()
    };
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
    assert_eq!(draw("1").matches("--- sample ").count(), 3);
    place.run("generate --prompt x --temperature 0 --top-k 4", &["--model", &model]).failed(1, &["--top-k"]);
}

#[test]
fn a_prompt_can_come_from_a_pipe() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    let given = place.run("generate --max-new-tokens 6 --prompt Once", &["--model", &model]).good().stdout();
    let words = ["generate", "--max-new-tokens", "6", "--prompt", "-", "--model", &model];
    for input in ["Once", "Once\n", "Once\r\n"] {
        assert_eq!(piped(&place, &words, input), given);
    }
    assert_ne!(piped(&place, &words, "Once\n\n"), given);
}

#[test]
fn a_chat_can_come_from_a_pipe() {
    let place = Place::new();
    let input = "Hello\n/system Be brief.\n/reset\n\nHello\n/quit\nnever read\n";
    let words = ["chat", "--max-new-tokens", "5", "--temperature", "0", "--model", &fixture("chat-tiny")];
    assert!(!piped(&place, &words, input).is_empty());
    place.run("chat --model", &[&fixture("gpt2-tiny")]).failed(1, &["no tokenizer"]);
}

fn piped(place: &Place, arguments: &[&str], input: &str) -> String {
    let mut command = place.temper(arguments.iter().copied());
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Ran(child.wait_with_output().unwrap()).good().stdout()
}

#[test]
fn inspection_shows_what_is_trained_without_colours() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.pairs()];
    let shown = place.run("inspect --rows 2", &more).good().stdout();
    assert!(!shown.contains('\u{1b}'));
    assert_eq!(shown.matches("chosen: ").count(), 2, "{shown}");
    assert_eq!(shown.matches("rejected: ").count(), 2);
    let trained = shown.split('⟦').nth(2).unwrap().split('⟧').next().unwrap();
    assert_eq!(trained.replace('|', ""), "It is 1.<im_end>\\n");
    let cut = place.run("inspect --max-length 28", &more).good().stdout();
    assert!(cut.matches('~').count() > 2, "{cut}");
    let coloured =
        place.temper(["inspect", more[0], more[1], more[2], more[3]]).env("CLICOLOR_FORCE", "1").output();
    assert!(Ran(coloured.unwrap()).good().stdout().contains('\u{1b}'));
}

#[test]
fn inspection_works_without_a_tokenizer() {
    let shown = Place::new().run("inspect --model", &[&fixture("gpt2-tiny")]).good().stdout();
    assert!(shown.contains("gpt2, 20,192 parameters") && shown.contains("no tokenizer"), "{shown}");
    let smollm3 = Place::new().run("inspect --model", &[&fixture("smollm3-tiny")]).good().stdout();
    for line in ["2 of 4 layers see the last 5 tokens alone", "2 of 4 layers are without rotary positions"] {
        assert!(smollm3.contains(line) && !shown.contains(line), "{smollm3}");
    }
    let every = Place::new().run("inspect --tensors --model", &[&fixture("gpt2-tiny")]).good().stdout();
    assert!(every.contains("transformer.h.1.mlp.c_fc.weight"));
}

/// What is there is shown, and then what keeps it from being a model.
#[test]
fn inspection_fails_where_the_tensors_make_no_model() {
    let place = Place::new();
    fs::create_dir(place.path("model")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(&fixture("gpt2-tiny")).join(name), place.path("model").join(name)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&fs::read(place.path("model/config.json")).unwrap()).unwrap();
    config["n_layer"] = 3.into();
    place.file("model/config.json", &config.to_string());
    let ran = place.run("inspect --model model", &[]).failed(1, &["h.2.attn.c_attn.weight"]);
    assert!(ran.stdout().contains("no tokenizer"));
}

#[test]
fn the_selftest_of_attention_has_its_two_lines() {
    let shown = Place::new().run("selftest attention", &[]).good().stdout();
    let names: Vec<&str> = shown.lines().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(names, ["Absolute error without mask", "Absolute error with mask"]);
    assert!(shown.lines().all(|line| line.split(": ").nth(1).unwrap().parse::<f64>().unwrap() < 1e-6));
    let checks = parsed(&Place::new().run("selftest dpo-identity --json", &[]).good().stdout());
    assert!(
        checks
            .iter()
            .all(|check| check["passed"] == true && check["error"].as_f64() <= check["bound"].as_f64())
    );
}

/// A reader that goes away is no error.
#[test]
#[cfg(unix)]
fn a_closed_pipe_is_success() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    for words in [
        vec!["score", "--json", "--model", &model, "--data", &data],
        vec!["generate", "--prompt", "Once", "--model", &model],
        vec!["inspect", "--model", &model],
        vec!["selftest", "attention"],
        vec!["dpo", "--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = place.temper(words.iter().copied()).stdout(writer).stderr(Stdio::piped()).output();
        let ran = Ran(output.unwrap()).good();
        assert!(!ran.stderr().contains("panicked") && !ran.stderr().contains("error"), "{}", ran.stderr());
    }
}

#[test]
fn a_transcript_keeps_its_first_turn_and_what_stands_before_it() {
    let place = Place::new();
    let pair = |before: &str| {
        let text = |answer: &str| format!("{before}Human: hello there\n\nAssistant: {answer}");
        serde_json::json!({ "chosen": text("good day"), "rejected": text("go away") })
    };
    let data = place.jsonl("hh.jsonl", [pair(""), pair("\n\n"), pair("Be nice.\n\n")]);
    let shown =
        place.run("inspect --rows 3", &["--model", &fixture("chat-tiny"), "--data", &data]).good().stdout();
    let shown = shown.replace('|', "");
    assert_eq!(shown.matches("hello there").count(), 6, "{shown}");
    assert!(shown.contains("Be nice."), "{shown}");
}

#[test]
fn many_or_long_answers_need_no_room_that_they_do_not_fill() {
    let place = Place::new();
    let model = fixture("chat-tiny");
    let longest = "generate --prompt Once --max-new-tokens 18446744073709551615";
    place.run(longest, &["--model", &model]).good();
    let words = "generate --prompt Once --temperature 1 --max-new-tokens 1 --samples 130";
    let samples = place.run(words, &["--model", &model]).good().stdout();
    assert_eq!(samples.matches("--- sample").count(), 130);
    let data = place.jsonl("one.jsonl", [serde_json::json!({ "text": "word" })]);
    place.run("score --microbatch-tokens 1000000000000", &["--model", &model, "--data", &data]).good();
}
