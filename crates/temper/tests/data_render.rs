//! Rendering: spans cover what they must, truncation shifts them, and the ledger balances.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::PathBuf;

use chrono::DateTime;
use proptest::prelude::*;
use serde_json::{Value, json};
use temper::data::{
    Dataset, Error, Kind, Ledger, Purpose, Reason, Renderer, Sequence, TrainOn, Truncation, prompts,
};
use temper::text::{ChatTemplate, Processor, Tokenizer, Variables};
use tempfile::TempDir;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/");

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{FIXTURES}{name}")).unwrap()
}

/// A tokenizer whose beginning of text is `b`, of which some models have one before every text.
fn tokenizer(add_bos: bool) -> Tokenizer {
    let config = json!({ "eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "add_bos_token": add_bos });
    Tokenizer::from_json(&file("chat-tiny/tokenizer.json"), Some(&config)).unwrap()
}

fn chatml(tokenizer: &Tokenizer) -> ChatTemplate {
    ChatTemplate::new(ChatTemplate::built_in("chatml").unwrap(), tokenizer, DateTime::UNIX_EPOCH).unwrap()
}

/// A template of the fixture `templates.json`.
fn template(name: &str, tokenizer: &Tokenizer) -> ChatTemplate {
    let fixture: Value = serde_json::from_slice(&file("templates.json")).unwrap();
    let entry = fixture["templates"].as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap();
    ChatTemplate::new(entry["template"].as_str().unwrap(), tokenizer, DateTime::UNIX_EPOCH).unwrap()
}

fn renderer<'text>(tokenizer: &'text Tokenizer, template: Option<&'text ChatTemplate>) -> Renderer<'text> {
    Renderer { tokenizer, template, max_length: 1024, truncation: Truncation::KeepStart, train_on: None }
}

struct Data {
    _folder: TempDir,
    path: PathBuf,
}

fn data(rows: &[Value]) -> Data {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data.jsonl");
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(&path, lines).unwrap();
    Data { _folder: folder, path }
}

fn load(rows: &[Value], renderer: &Renderer<'_>, purpose: Purpose) -> Result<Dataset, Error> {
    let dataset = Dataset::load(&data(rows).path, renderer, purpose)?;
    assert!(dataset.ledger.balance(), "{}", dataset.ledger);
    for sequence in dataset.examples.iter().flat_map(|example| &example.sequences) {
        check(sequence);
    }
    Ok(dataset)
}

/// What every sequence keeps.
fn check(sequence: &Sequence) {
    let mut end = 1;
    for span in &sequence.trained {
        assert!(
            span.start >= end && span.start < span.end && span.end <= sequence.tokens.len(),
            "{sequence:?}"
        );
        end = span.end;
    }
}

fn sft(rows: &[Value], renderer: &Renderer<'_>) -> Dataset {
    load(rows, renderer, Purpose::Sft).unwrap()
}

/// The sequence's text, the trained parts in brackets.
fn shown(tokenizer: &Tokenizer, sequence: &Sequence) -> String {
    let decode = |tokens: &[u32]| tokenizer.decode(tokens, false).unwrap();
    let mut text = String::new();
    let mut end = 0;
    for span in &sequence.trained {
        text += &decode(&sequence.tokens[end..span.start]);
        text += &format!("[{}]", decode(&sequence.tokens[span.clone()]));
        end = span.end;
    }
    text + &decode(&sequence.tokens[end..])
}

fn all_shown(tokenizer: &Tokenizer, dataset: &Dataset) -> Vec<String> {
    let sequences = dataset.examples.iter().flat_map(|example| &example.sequences);
    sequences.map(|sequence| shown(tokenizer, sequence)).collect()
}

fn turns(turns: &[(&str, &str)]) -> Value {
    turns.iter().map(|(role, content)| json!({ "role": role, "content": content })).collect()
}

#[test]
fn a_completion_is_trained_with_its_end() {
    let tokenizer = tokenizer(false);
    let plain = renderer(&tokenizer, None);
    let row = json!({ "prompt": "What?", "completion": " That." });
    let dataset = sft(std::slice::from_ref(&row), &plain);
    assert_eq!(all_shown(&tokenizer, &dataset), ["What?[ That.<|im_end|>]"]);
    assert_eq!(dataset.examples[0].sequences[0].prompt, tokenizer.encode("What?").unwrap().len());
    let all = Renderer { train_on: Some(TrainOn::All), ..plain };
    assert_eq!(all_shown(&tokenizer, &sft(&[row], &all)), ["W[hat? That.<|im_end|>]"]);
}

#[test]
fn an_end_that_is_there_is_not_doubled() {
    let tokenizer = tokenizer(false);
    let row = json!({ "prompt": "a", "completion": "b<|im_end|>" });
    assert_eq!(all_shown(&tokenizer, &sft(&[row], &renderer(&tokenizer, None))), ["a[b<|im_end|>]"]);
}

#[test]
fn a_document_is_trained_but_for_its_first_token() {
    let plain = tokenizer(false);
    assert_eq!(all_shown(&plain, &sft(&[json!("xyz")], &renderer(&plain, None))), ["x[yz<|im_end|>]"]);
    let begins = tokenizer(true);
    let shown = all_shown(&begins, &sft(&[json!("xyz"), json!("<|im_start|>xyz")], &renderer(&begins, None)));
    assert_eq!(shown, ["<|im_start|>[xyz<|im_end|>]", "<|im_start|>[xyz<|im_end|>]"]);
}

#[test]
fn answers_are_trained_with_what_the_template_writes_after_them() {
    let tokenizer = tokenizer(false);
    let chatml = chatml(&tokenizer);
    let chat = renderer(&tokenizer, Some(&chatml));
    let messages =
        turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]);
    let row = json!({ "messages": messages });
    let dataset = sft(std::slice::from_ref(&row), &chat);
    let before = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n";
    let between = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(all_shown(&tokenizer, &dataset), [format!("{before}[b<|im_end|>\n]{between}[d<|im_end|>\n]")]);
    assert_eq!(dataset.ledger.unanswered, 1);
    let last = Renderer { train_on: Some(TrainOn::Completion), ..chat };
    let expected = format!("{before}b<|im_end|>\n{between}[d<|im_end|>\n]");
    assert_eq!(all_shown(&tokenizer, &sft(std::slice::from_ref(&row), &last)), [expected]);
    let all = Renderer { train_on: Some(TrainOn::All), ..chat };
    let whole = format!("{before}b<|im_end|>\n{between}d<|im_end|>\n<|im_start|>user\ne<|im_end|>\n");
    let expected = whole.replacen("<|im_start|>", "<|im_start|>[", 1) + "]";
    assert_eq!(all_shown(&tokenizer, &sft(&[row], &all)), [expected]);
}

/// OpenAI's and Axolotl's ways to leave an answer out.
#[test]
fn answers_that_are_not_to_be_learnt_are_context() {
    let tokenizer = tokenizer(false);
    let chatml = chatml(&tokenizer);
    let chat = renderer(&tokenizer, Some(&chatml));
    let shown = |mark: (&str, Value)| {
        let mut messages = turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        messages[1][mark.0] = mark.1;
        let dataset = sft(&[json!({ "messages": messages })], &chat);
        all_shown(&tokenizer, &dataset).concat().contains("[b")
    };
    for mark in [
        ("weight", json!(0)),
        ("weight", json!("0")),
        ("weight", json!(false)),
        ("train", json!(false)),
        ("train", json!(0)),
        ("training", json!("False")),
    ] {
        assert!(!shown(mark.clone()), "{mark:?}");
    }
    for mark in [("weight", json!(1)), ("train", json!(true)), ("name", json!("x"))] {
        assert!(shown(mark.clone()), "{mark:?}");
    }
}

/// As TRL has it: the column `tools`, in tables as text, and whatever `chat_template_kwargs` names.
#[test]
fn templates_read_the_tools_of_a_record() {
    let tokenizer = tokenizer(false);
    let source = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{{ mood }}\
        {% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>{% endif %}";
    let template = ChatTemplate::new(source, &tokenizer, chrono::DateTime::UNIX_EPOCH).unwrap();
    let chat = renderer(&tokenizer, Some(&template));
    let shown = |more: Value| {
        let mut row = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]) });
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let dataset = sft(&[row], &chat);
        assert!(dataset.unread_columns.is_empty());
        all_shown(&tokenizer, &dataset).concat()
    };
    let plain = "<|im_start|>a<|im_end|><|im_start|>[b<|im_end|>]";
    assert_eq!(shown(json!({})), plain);
    assert_eq!(shown(json!({ "tools": null, "chat_template_kwargs": {} })), plain);
    assert_eq!(shown(json!({ "tools": "" })), plain);
    for tools in [json!([{ "name": "f" }]), json!(r#"[{"name": "f"}]"#)] {
        let row = json!({ "tools": tools, "chat_template_kwargs": { "mood": "calm" } });
        assert_eq!(shown(row), format!("f calm{plain}"));
    }
    let row = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]), "tools": "none" });
    let error = load(&[row], &chat, Purpose::Sft).unwrap_err().to_string();
    assert!(error.ends_with("expected a list of tools in `tools`, found a string"), "{error}");
    // What the template does not read is said.
    let row = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]), "tools": [1] });
    let chatml = chatml(&tokenizer);
    assert_eq!(sft(&[row], &renderer(&tokenizer, Some(&chatml))).unread_columns, ["tools"]);
}

#[test]
fn a_rewritten_history_makes_a_sequence_of_each_answer() {
    let tokenizer = tokenizer(false);
    let qwen3 = template("qwen3", &tokenizer);
    let chat = renderer(&tokenizer, Some(&qwen3));
    let think = |thought: &str, answer: &str| format!("<think>\n{thought}\n</think>\n\n{answer}");
    let (first, second) = (think("x", "No."), think("y", "Yes."));
    let messages = turns(&[("user", "a"), ("assistant", &first), ("user", "b"), ("assistant", &second)]);
    let dataset = sft(&[json!({ "messages": messages })], &chat);
    let user = |text: &str| format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    let expected = [
        format!("{}[{first}<|im_end|>\n]", user("a")),
        format!("{}No.<|im_end|>\n{}[{second}<|im_end|>\n]", user("a"), user("b")),
    ];
    assert_eq!(all_shown(&tokenizer, &dataset), expected);
    assert_eq!((dataset.examples.len(), dataset.ledger.sequences), (1, 2));
}

#[test]
fn an_answer_after_another_beginning_is_an_error() {
    let tokenizer = tokenizer(false);
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}";
    let template = ChatTemplate::new(source, &tokenizer, DateTime::UNIX_EPOCH).unwrap();
    let row = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]) });
    let error = load(&[row], &renderer(&tokenizer, Some(&template)), Purpose::Sft).unwrap_err();
    assert!(matches!(&error, Error::NotAPrefix { place, message: 1 } if place.number == 1));
    assert!(error.hint().is_some());
}

/// As Transformers has it: `apply_chat_template` adds no token, and a text gets it from the tokenizer.
#[test]
fn bos_comes_from_the_tokenizer_before_texts_and_from_the_template_in_conversations() {
    let tokenizer = tokenizer(true);
    let bos = tokenizer.bos().unwrap();
    let without = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    let without = ChatTemplate::new(without, &tokenizer, DateTime::UNIX_EPOCH).unwrap();
    let text = json!({ "text": "a" });
    let conversation = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]) });
    for (row, template, expected) in [
        (&text, None, 1),
        (&conversation, Some(&template("gemma", &tokenizer)), 1),
        (&conversation, Some(&without), 0),
    ] {
        let dataset = sft(std::slice::from_ref(row), &renderer(&tokenizer, template));
        let tokens = &dataset.examples[0].sequences[0].tokens;
        assert_eq!(tokens.iter().take_while(|&&token| token == bos).count(), expected);
    }
}

#[test]
fn pairs_share_their_prompt() {
    let tokenizer = tokenizer(false);
    let row = json!({ "prompt": "p:", "chosen": " yes", "rejected": " no" });
    let dataset = load(std::slice::from_ref(&row), &renderer(&tokenizer, None), Purpose::Preference).unwrap();
    assert_eq!(all_shown(&tokenizer, &dataset), ["p:[ yes<|im_end|>]", "p:[ no<|im_end|>]"]);
    assert_eq!(dataset.examples[0].sequences.len(), 2);
    let dataset = load(&[row], &renderer(&tokenizer, None), Purpose::Sft).unwrap();
    assert_eq!(all_shown(&tokenizer, &dataset), ["p:[ yes<|im_end|>]"]);
}

#[test]
fn transcripts_are_messages_with_a_template_and_text_without() {
    let tokenizer = tokenizer(false);
    let history = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:";
    let row = json!({ "chosen": format!("{history} good "), "rejected": format!("{history} bad") });
    let dataset = load(std::slice::from_ref(&row), &renderer(&tokenizer, None), Purpose::Preference).unwrap();
    let expected = [format!("{history}[ good <|im_end|>]"), format!("{history}[ bad<|im_end|>]")];
    assert_eq!(all_shown(&tokenizer, &dataset), expected);
    let chatml = chatml(&tokenizer);
    let dataset = load(&[row], &renderer(&tokenizer, Some(&chatml)), Purpose::Preference).unwrap();
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let prompt =
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), "<|im_start|>assistant\n".into()];
    let prompt = prompt.concat();
    assert_eq!(
        all_shown(&tokenizer, &dataset),
        [format!("{prompt}[good<|im_end|>\n]"), format!("{prompt}[bad<|im_end|>\n]")]
    );
}

#[test]
fn instructions_are_messages_with_a_template_and_text_without() {
    let tokenizer = tokenizer(false);
    let row = json!({ "instruction": "i", "input": "x", "output": "o" });
    assert_eq!(
        all_shown(&tokenizer, &sft(std::slice::from_ref(&row), &renderer(&tokenizer, None))),
        ["i\n\nx\n\n[o<|im_end|>]"]
    );
    let chatml = chatml(&tokenizer);
    let expected = "<|im_start|>user\ni\n\nx<|im_end|>\n<|im_start|>assistant\n[o<|im_end|>\n]";
    assert_eq!(all_shown(&tokenizer, &sft(&[row], &renderer(&tokenizer, Some(&chatml)))), [expected]);
}

#[test]
fn truncation() {
    let tokenizer = tokenizer(false);
    let row = json!({ "prompt": "abcd", "completion": "efgh" });
    let at = |max_length, truncation| Renderer { max_length, truncation, ..renderer(&tokenizer, None) };
    let keep = |max_length, truncation| {
        all_shown(&tokenizer, &sft(std::slice::from_ref(&row), &at(max_length, truncation)))
    };
    let whole = sft(std::slice::from_ref(&row), &at(100, Truncation::Error)).examples[0].sequences[0].clone();
    let (length, prompt) = (whole.tokens.len(), whole.prompt);
    for max_length in prompt + 1..length {
        let kept = sft(std::slice::from_ref(&row), &at(max_length, Truncation::KeepStart));
        let sequence = &kept.examples[0].sequences[0];
        assert_eq!(sequence.tokens, whole.tokens[..max_length]);
        assert_eq!((&sequence.trained, sequence.prompt), (&vec![prompt..max_length], prompt));
        assert_eq!((kept.ledger.tokens.cut, kept.ledger.shortened), (length - max_length, 1));
    }
    for max_length in 2..length {
        let kept = sft(std::slice::from_ref(&row), &at(max_length, Truncation::KeepEnd));
        let sequence = &kept.examples[0].sequences[0];
        assert_eq!(sequence.tokens, whole.tokens[length - max_length..]);
        let start = prompt.saturating_sub(length - max_length);
        assert_eq!(sequence.trained, vec![start.max(1)..max_length], "the first token has none before it");
    }
    assert!(keep(length, Truncation::Error)[0].ends_with("<|im_end|>]"));
    let error =
        load(std::slice::from_ref(&row), &at(length - 1, Truncation::Error), Purpose::Sft).unwrap_err();
    assert!(
        matches!(error, Error::OverLong { tokens, limit, .. } if tokens == length && limit == length - 1)
    );
    let error =
        load(std::slice::from_ref(&row), &at(length - 1, Truncation::Drop), Purpose::Sft).unwrap_err();
    assert!(matches!(&error, Error::NothingToTrain { dropped, .. } if dropped.count(Reason::TooLong) == 1));
    let error =
        load(std::slice::from_ref(&row), &at(prompt, Truncation::KeepStart), Purpose::Sft).unwrap_err();
    assert!(error.to_string().contains("has nothing to train: 1 no token to train (first: "), "{error}");
    let error =
        load(std::slice::from_ref(&row), &at(length - 1, Truncation::KeepStart), Purpose::Score).unwrap_err();
    assert!(matches!(error, Error::OverLong { .. }), "scores are never cut");
    let short = json!({ "prompt": "ab", "completion": "ef" });
    let scored = load(&[row, short], &at(length - 1, Truncation::Drop), Purpose::Score).unwrap();
    assert_eq!((scored.examples.len(), scored.examples[0].record), (1, 1));
}

#[test]
fn keep_end_keeps_the_first_token_of_all_texts_and_one_prompt() {
    // What opens a message is no such token.
    let unbegun = tokenizer(false);
    let chatml = chatml(&unbegun);
    let row = json!({ "messages": turns(&[("user", "wxyz"), ("assistant", "q")]) });
    let chat = renderer(&unbegun, Some(&chatml));
    let length = sft(std::slice::from_ref(&row), &chat).examples[0].sequences[0].tokens.len();
    let cut = Renderer { max_length: length - 1, truncation: Truncation::KeepEnd, ..chat };
    let shown = all_shown(&unbegun, &sft(&[row], &cut)).concat();
    assert!(!shown.starts_with("<|im_start|>"), "{shown}");
    let tokenizer = tokenizer(true);
    let at =
        |max_length| Renderer { max_length, truncation: Truncation::KeepEnd, ..renderer(&tokenizer, None) };
    let row = json!({ "prompt": "wxyz", "chosen": "qqqq", "rejected": "q" });
    let whole = load(std::slice::from_ref(&row), &at(100), Purpose::Preference).unwrap();
    let length = whole.examples[0].sequences[0].tokens.len();
    let cut = load(std::slice::from_ref(&row), &at(length - 2), Purpose::Preference).unwrap();
    assert_eq!(
        all_shown(&tokenizer, &cut),
        ["<|im_start|>yz[qqqq<|im_end|>]", "<|im_start|>yz[q<|im_end|>]"]
    );
    let error = load(&[row], &at(length - 5), Purpose::Preference).unwrap_err();
    assert!(matches!(&error, Error::NothingToTrain { dropped, .. } if dropped.count(Reason::NoRoom) == 1));
}

#[test]
fn pretraining_joins_documents() {
    let tokenizer = tokenizer(false);
    let rows = [json!("xyz"), json!("qx"), json!("f")];
    let at = |max_length| Renderer { max_length, ..renderer(&tokenizer, None) };
    let dataset = load(&rows, &at(4), Purpose::Pretrain).unwrap();
    assert_eq!(all_shown(&tokenizer, &dataset), ["x[yz<|im_end|>]", "q[x<|im_end|>f]"]);
    let records: Vec<usize> = dataset.examples.iter().map(|example| example.record).collect();
    assert_eq!(records, [0, 1]);
    assert_eq!(dataset.ledger.tokens.cut, 1, "the last end is alone");
    let error = load(&[json!({ "prompt": "a", "completion": "b" })], &at(4), Purpose::Pretrain).unwrap_err();
    assert!(matches!(error, Error::WrongSchema { .. }));
}

#[test]
fn what_the_data_cannot_be() {
    let tokenizer = tokenizer(false);
    let plain = renderer(&tokenizer, None);
    let messages = json!({ "messages": turns(&[("user", "a"), ("assistant", "b")]) });
    let error = load(std::slice::from_ref(&messages), &plain, Purpose::Sft).unwrap_err();
    assert!(matches!(error, Error::NoTemplate { .. }));
    assert!(error.hint().unwrap().contains("--chat-template chatml"));
    let error = load(&[messages], &plain, Purpose::Preference).unwrap_err();
    assert!(error.to_string().ends_with("has conversations: `messages`"), "{error}");
    let nameless = Tokenizer::from_json(&file("chat-tiny/tokenizer.json"), None).unwrap();
    let error = load(&[json!("a")], &renderer(&nameless, None), Purpose::Sft).unwrap_err();
    assert!(matches!(error, Error::NoEndOfText));
    let chatml = chatml(&tokenizer);
    let question = json!({ "messages": turns(&[("user", "a")]) });
    let error = load(&[question], &renderer(&tokenizer, Some(&chatml)), Purpose::Sft).unwrap_err();
    assert!(matches!(&error, Error::NothingToTrain { dropped, .. } if dropped.count(Reason::NoTarget) == 1));
    let gemma = template("gemma", &tokenizer);
    let system = json!({ "messages": turns(&[("system", "a"), ("user", "b"), ("assistant", "c")]) });
    let error = load(&[system], &renderer(&tokenizer, Some(&gemma)), Purpose::Sft).unwrap_err();
    assert!(error.to_string().contains("line 1: the chat template refuses the conversation"), "{error}");
}

#[test]
fn joint_tokenisation_is_compared() {
    let tokenizer = tokenizer(false);
    // `the` is one token, which prompt and completion split.
    let rows = [json!({ "prompt": " t", "completion": "he" }), json!({ "prompt": "a", "completion": " b" })];
    let dataset = sft(&rows, &renderer(&tokenizer, None));
    assert_eq!(dataset.ledger.joint_differs, 1);
}

#[test]
fn inspection_shows_what_is_cut() {
    let tokenizer = tokenizer(false);
    let renderer = Renderer { max_length: 4, ..renderer(&tokenizer, None) };
    let dataset = sft(&[json!({ "prompt": "a\u{1b}", "completion": "bcd" })], &renderer);
    let shown = renderer.inspect(&dataset.records[0], Purpose::Sft).unwrap();
    let pieces: Vec<(&str, Kind)> = shown[0].iter().map(|piece| (piece.text.as_str(), piece.kind)).collect();
    use Kind::{Context, Cut, Trained};
    let expected = [
        ("a", Context),
        ("\\u{1b}", Context),
        ("b", Trained),
        ("c", Trained),
        ("d", Cut),
        ("<|im_end|>", Cut),
    ];
    assert_eq!(pieces, expected);
}

/// A bad answer is not imitated; what it scores may be asked.
#[test]
fn bad_answers_are_left_out() {
    let tokenizer = tokenizer(false);
    let renderer = renderer(&tokenizer, None);
    let rows = [true, false].map(|label| json!({ "prompt": "a", "completion": "b", "label": label }));
    let dataset = sft(&rows, &renderer);
    assert_eq!((dataset.ledger.used, dataset.ledger.dropped.count(Reason::BadAnswer)), (1, 1));
    assert!(dataset.ledger.balance());
    let pieces = renderer.inspect(&dataset.records[1], Purpose::Sft).unwrap().concat();
    assert!(pieces.iter().all(|piece| piece.kind == Kind::Cut));
    assert_eq!(load(&rows, &renderer, Purpose::Score).unwrap().ledger.used, 2);
}

#[test]
fn the_ledger_reads_well() {
    let tokenizer = tokenizer(false);
    let rows = [json!({ "prompt": "a", "completion": "b" }), json!({ "prompt": "a", "completion": "" })];
    let dataset = sft(&rows, &renderer(&tokenizer, None));
    let ledger = Ledger { joint_differs: 12_345, ..dataset.ledger };
    let text = ledger.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "     2  records read");
    assert_eq!(lines[1], "     1    used");
    assert!(lines[2].starts_with("     1    dropped: empty answer (first: `"));
    assert!(text.contains("12,345    other tokens if tokenised in one\n"));
}

/// Plain words, so that a turn's text is found again in what was rendered; nothing is trained where all are blank.
fn words() -> impl Strategy<Value = String> {
    "[a-zéß🦀 ,.0-9]{1,24}".prop_filter("blank", |words| !words.trim().is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exactly_the_answers_are_trained(
        questions in prop::collection::vec((words(), words()), 1..5),
        name in prop::sample::select(vec!["chatml", "generation", "llama3", "mistral"]),
    ) {
        let tokenizer = tokenizer(false);
        let template = template(name, &tokenizer);
        let list = questions.iter().flat_map(|(question, answer)| [("user", question), ("assistant", answer)]);
        let list: Vec<(&str, &str)> = list.map(|(role, text)| (role, text.as_str())).collect();
        let row = json!({ "messages": turns(&list) });
        let dataset = sft(&[row], &renderer(&tokenizer, Some(&template)));
        let sequence = &dataset.examples[0].sequences[0];
        prop_assert_eq!(sequence.trained.len(), questions.len());
        for (span, (_, answer)) in sequence.trained.iter().zip(&questions) {
            let text = tokenizer.decode(&sequence.tokens[span.clone()], false).unwrap();
            let answer = if name == "llama3" { answer.trim() } else { answer };
            prop_assert!(text.trim_start_matches(' ').starts_with(answer.trim_start_matches(' ')), "{:?} {:?}", text, answer);
        }
        let messages: Vec<_> = dataset.records.iter().flat_map(|record| match &record.content {
            temper::data::Content::Conversation(messages) => messages.clone(),
            _ => Vec::new(),
        }).collect();
        let whole = tokenizer.decode(&sequence.tokens, false).unwrap();
        prop_assert_eq!(whole, template.render(&messages, &Variables::new(), false).unwrap());
    }

    #[test]
    fn the_ledger_balances(
        rows in prop::collection::vec((words(), "[a-z ]{0,12}", "[a-z ]{0,12}"), 1..12),
        max_length in 1usize..40,
        truncation in prop::sample::select(vec![Truncation::KeepStart, Truncation::KeepEnd, Truncation::Drop]),
        purpose in prop::sample::select(vec![Purpose::Sft, Purpose::Preference]),
        add_bos in any::<bool>(),
    ) {
        let tokenizer = tokenizer(add_bos);
        let rows: Vec<Value> = rows.iter().map(|(prompt, chosen, rejected)| {
            json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected })
        }).collect();
        let renderer = Renderer { max_length, truncation, ..renderer(&tokenizer, None) };
        match load(&rows, &renderer, purpose) {
            Ok(dataset) => {
                for example in &dataset.examples {
                    prop_assert!(example.sequences.iter().all(|sequence| sequence.tokens.len() <= max_length && sequence.targets() > 0));
                    if let [chosen, rejected] = &example.sequences[..] {
                        prop_assert_eq!(&chosen.tokens[..chosen.prompt], &rejected.tokens[..rejected.prompt]);
                    }
                }
                prop_assert_eq!(dataset.ledger.read, rows.len());
            }
            Err(Error::NothingToTrain { dropped, .. }) => prop_assert_eq!(dropped.total(), rows.len()),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
fn pairs_that_cutting_makes_equal_are_counted() {
    let tokenizer = tokenizer(false);
    let row = json!({ "prompt": "ab", "chosen": "qqqqqqqx", "rejected": "qqqqqqqy" });
    for (max_length, equal) in [(100, 0), (5, 1)] {
        let renderer = Renderer { max_length, ..renderer(&tokenizer, None) };
        let dataset = load(std::slice::from_ref(&row), &renderer, Purpose::Preference).unwrap();
        assert_eq!(dataset.ledger.equal_answers, equal);
    }
}

/// Samples of a run ask what its training shows.
#[test]
fn prompts_are_asked_as_they_are_trained() {
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let rows = [
        json!({ "prompt": "ab", "completion": "cd" }),
        json!({ "prompt": "ab", "chosen": "cd", "rejected": "ef" }),
        json!({ "instruction": "ab", "input": "x", "output": "cd" }),
        json!({ "prompt": [said("user", "ab")], "completion": [said("assistant", "cd")] }),
        json!({ "prompt": "ab", "chosen": [said("assistant", "cd")], "rejected": [said("assistant", "ef")] }),
        json!({ "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c" }),
        json!({ "messages": [said("user", "ab"), said("assistant", "cd")] }),
    ];
    for templated in [false, true] {
        let tokenizer = tokenizer(true);
        let template = templated.then(|| chatml(&tokenizer));
        let processor = Processor { template, stop: Vec::new(), tokenizer };
        for row in &rows {
            let file = data(std::slice::from_ref(row));
            let rendered = Renderer {
                train_on: Some(TrainOn::Completion).filter(|_| row["chosen"].is_null()),
                ..renderer(&processor.tokenizer, processor.template.as_ref())
            };
            let trained = match Dataset::load(&file.path, &rendered, Purpose::Score) {
                Err(Error::NoTemplate { .. }) if !templated => continue,
                dataset => dataset.unwrap().examples[0].sequences[0].clone(),
            };
            let asked = prompts::read(&file.path).unwrap()[0].tokens(&processor).unwrap();
            assert_eq!(asked, trained.tokens[..trained.trained[0].start], "{templated} {row}");
        }
    }
}
