//! `temper compare`: what several models say to the same prompts.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Place, fixture, lines, parsed};

/// A place with a model trained in `run/final`, an adapter in `lora/final`, and prompts.
fn place() -> (Place, String) {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    let words = "sft --epochs 8 --learning-rate 3e-3 --batch-size 4 --dtype f32 --quiet";
    place.run(&format!("{words} --out run"), &more).good();
    place.run(&format!("{words} --out lora --method lora --lora-r 4"), &more).good();
    let prompts = place.file("prompts.txt", "What comes after 3?\nWhat <b>comes</b> after 7?\n");
    (place, prompts)
}

#[test]
fn answers_and_scores_are_those_of_generate_and_score() {
    let (place, prompts) = place();
    let (model, pairs) = (fixture("chat-tiny"), place.pairs());
    let adapted = format!("{model}+lora/final");
    let words = "compare --json --max-new-tokens 9 --dtype f32 --prompts";
    let more = [&prompts, "--data", &pairs, "--html", "compare.html", &model, "run/final", &adapted];
    let said = parsed(&place.run(words, &more).good().stdout());
    assert_eq!(said.len(), 2 * 3 + 3);
    let options = [
        vec!["--model", &model],
        vec!["--model", "run/final"],
        vec!["--model", &model, "--adapter", "lora/final"],
    ];
    for ((name, options), (line, summary)) in
        [&model[..], "run/final", &adapted].into_iter().zip(&options).zip(said.iter().zip(&said[6..]))
    {
        let generate = "generate --chat --max-new-tokens 9 --dtype f32 --prompt";
        let answer = place.run(generate, &[&["What comes after 3?"], &options[..]].concat()).good().stdout();
        assert_eq!(
            line,
            &json!({ "prompt": "What comes after 3?", "model": name, "answer": answer.trim_end_matches('\n'), "tokens": line["tokens"] })
        );
        let scored = place
            .run("score --json --dtype f32 --data", &[&[&pairs[..]], &options[..]].concat())
            .good()
            .stdout();
        let mut expected = parsed(&scored).pop().unwrap();
        expected["model"] = json!(name);
        assert_eq!(summary, &expected);
    }
    let html = fs::read_to_string(place.path("compare.html")).unwrap();
    for word in ["What &lt;b&gt;comes&lt;/b&gt; after 7?", "preference_accuracy", "run/final", &adapted] {
        assert!(html.contains(word), "{word}");
    }
}

#[test]
fn models_are_asked_with_the_same_seeds() {
    let (place, prompts) = place();
    let words = "compare run/final run/final --max-new-tokens 12 --temperature 1 --json --seed";
    let answers = |seed: &str| -> Vec<Value> {
        let said = parsed(&place.run(words, &[seed, "--prompts", &prompts]).good().stdout());
        said.iter().map(|line| line["answer"].clone()).collect()
    };
    let [first, other] = ["3", "4"].map(answers);
    assert_eq!((&first[0], &first[2]), (&first[1], &first[3]));
    assert_ne!(first, other);
    let text = place.run("compare run/final --prompts", &[&prompts]).good().stdout();
    assert!(text.starts_with("What comes after 3?\n  run/final\n    "), "{text}");
}

#[test]
fn the_smallest_limit_holds_for_all() {
    let (place, prompts) = place();
    let own = place.path("run/final/generation_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&own).unwrap()).unwrap();
    config["max_new_tokens"] = json!(2);
    fs::write(&own, config.to_string()).unwrap();
    let lengths = |words: &str| -> Vec<u64> {
        let more = ["--prompts", &prompts, &fixture("chat-tiny"), "run/final"];
        let said = parsed(&place.run(words, &more).good().stdout());
        said.iter().filter_map(|line| line["tokens"].as_u64()).collect()
    };
    assert_eq!(lengths("compare --json"), [2; 4]);
    assert!(lengths("compare --json --max-new-tokens 9").iter().any(|&tokens| tokens > 2));
}

#[test]
fn what_cannot_be_compared_is_named() {
    let (place, prompts) = place();
    place.run("compare --prompts", &[&prompts]).failed(2, &["<MODEL[+ADAPTER]>"]);
    place.run("compare run/final", &[]).failed(2, &["--prompts"]);
    place.run("compare run/final+nowhere --prompts", &[&prompts]).failed(1, &["nowhere"]);
    place.run("compare run/final nowhere --prompts", &[&prompts]).failed(1, &["`nowhere`"]);
    let gone = place.path("prompts.jsonl");
    fs::write(&gone, lines(&place.path("chats.jsonl"))[0].to_string()).unwrap();
    // A model with room for fewer records than the other.
    fs::create_dir(place.path("narrow")).unwrap();
    for entry in fs::read_dir(place.path("run/final")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), place.path("narrow").join(entry.file_name())).unwrap();
    }
    let config = fs::read_to_string(place.path("narrow/config.json")).unwrap();
    fs::write(place.path("narrow/config.json"), config.replace("256", "40")).unwrap();
    let long = json!({ "text": "word and ".repeat(60) });
    place.jsonl("lengths.jsonl", [long, json!({ "text": "word" })]);
    let words = "compare run/final narrow --data lengths.jsonl --prompts";
    place.run(words, &[&prompts]).failed(1, &["lengths.jsonl", "--truncation drop"]);
    place
        .run(&format!("{words} {prompts} --truncation drop"), &[])
        .failed(1, &["2 in `run/final`, 1 in `narrow`"]);
    place.run("compare run/final --html no/where.html --prompts", &["prompts.jsonl"]).failed(1, &["no/"]);
}
