//! Reading: every schema, every container, and errors that name the place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use temper::data::records::read;
use temper::data::{Answer, Content, Error, Prompt, Reason, Records, Schema};
use temper::text::{Message, Role};
use tempfile::TempDir;

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    }
}

fn jsonl(contents: &str) -> Result<Records, Error> {
    let files = Files::new();
    read(&files.write("data.jsonl", contents))
}

/// The contents of one line.
fn content(line: &str) -> Content {
    jsonl(line).unwrap().records.remove(0).content
}

fn message(line: &str) -> String {
    jsonl(line).unwrap_err().to_string().split_once("data.jsonl` ").unwrap().1.to_owned()
}

fn user(text: &str) -> Message {
    Message::new(Role::User, text)
}

fn assistant(text: &str) -> Message {
    Message::new(Role::Assistant, text)
}

fn text(text: &str) -> Answer {
    Answer::Text(text.into())
}

/// As data sets that were joined have it: the columns of all of them.
#[test]
fn null_is_nothing() {
    let completion = r#"{"prompt":"p","completion":"c","messages":null,"chosen":null,"rejected":null}"#;
    let expected = Content::Completion { prompt: Prompt::Text("p".into()), completion: text("c") };
    assert_eq!(content(completion), expected);
    assert!(jsonl(completion).unwrap().ignored_columns.is_empty());
    assert_eq!(content(r#"{"messages":null,"text":"a"}"#), Content::Text("a".into()));
    let conversations = r#"[{"role":"user","content":"p","from":null},{"role":"assistant","content":"c"}]"#;
    let preference = format!(r#"{{"prompt":null,"chosen":{conversations},"rejected":{conversations}}}"#);
    assert!(matches!(content(&preference), Content::Preference { prompt: Prompt::Messages(_), .. }));
    assert_eq!(
        message(
            r#"{"text":"a"}
{"text":null,"id":1}"#
        ),
        "line 2: expected the field `text` (documents: `text`), found `id`"
    );
}

/// What no template writes may have a column of that name which is another matter.
#[test]
fn only_conversations_have_tools() {
    for line in [r#"{"text":"a","tools":"saw"}"#, r#"{"prompt":"p","completion":"c","tools":"saw"}"#] {
        assert_eq!(jsonl(line).unwrap().ignored_columns, ["tools"]);
    }
    let error = jsonl(r#"{"question":"q","chosen":"a","rejected":"b"}"#).unwrap_err();
    assert!(error.hint().unwrap().contains("what is answered `instruction`"));
    let error =
        jsonl(r#"{"prompt":[{"role":"user","content":"q"}],"chosen":"a","rejected":"b"}"#).unwrap_err();
    assert!(error.to_string().contains("messages, as the prompt is") && error.hint().is_none(), "{error}");
}

#[test]
fn documents() {
    assert_eq!(content(r#"{"text":"a"}"#), Content::Text("a".into()));
    assert_eq!(content(r#""a""#), Content::Text("a".into()));
}

#[test]
fn completions() {
    let expected = Content::Completion { prompt: Prompt::Text("p".into()), completion: text("c") };
    assert_eq!(content(r#"{"prompt":"p","completion":"c"}"#), expected);
    let line =
        r#"{"prompt":[{"role":"user","content":"p"}],"completion":[{"role":"assistant","content":"c"}]}"#;
    let prompt = Prompt::Messages(vec![user("p")]);
    let completion = Answer::Messages(vec![assistant("c")]);
    assert_eq!(content(line), Content::Completion { prompt, completion });
}

#[test]
fn conversations() {
    let expected = Content::Conversation(vec![user("p"), assistant("c")]);
    let line =
        r#"{"messages":[{"role":"user","content":"p"},{"role":"assistant","content":"c","name":null}]}"#;
    assert_eq!(content(line), expected);
    assert_eq!(
        content(r#"{"conversations":[{"from":"human","value":"p"},{"from":"gpt","value":"c"}]}"#),
        expected
    );
    let line = r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"name":"f"}]},{"role":"tool","content":"1","name":"f"}]}"#;
    let Content::Conversation(messages) = content(line) else { panic!() };
    assert_eq!(messages[0].content, "");
    assert_eq!(messages[0].extra["tool_calls"][0]["name"], "f");
    assert_eq!((messages[1].role, messages[1].extra["name"].as_str()), (Role::Tool, Some("f")));
}

#[test]
fn instructions() {
    let alpaca = |prompt: &str| Content::Completion {
        prompt: Prompt::Instruction { system: None, text: prompt.into() },
        completion: text("o"),
    };
    assert_eq!(content(r#"{"instruction":"i","input":"x","output":"o"}"#), alpaca("i\n\nx"));
    assert_eq!(content(r#"{"instruction":"i","input":"","output":"o","text":"whole"}"#), alpaca("i"));
    assert_eq!(content(r#"{"instruction":"i","output":"o","system":""}"#), alpaca("i"));
    let prompt = Prompt::Instruction { system: Some("s".into()), text: "i\n\nx".into() };
    let expected = Content::Completion { prompt: prompt.clone(), completion: text("o") };
    assert_eq!(content(r#"{"system":"s","instruction":"i","input":"x","output":"o"}"#), expected);
    let line = r#"{"system":"s","instruction":"i","input":"x","chosen":"c","rejected":"r"}"#;
    let expected = Content::Preference { prompt, chosen: text("c"), rejected: text("r") };
    assert_eq!(content(line), expected);
}

#[test]
fn a_system_column_is_the_first_message() {
    let system = Message::new(Role::System, "s");
    let turns = r#""conversations":[{"from":"human","value":"p"},{"from":"gpt","value":"c"}]"#;
    let expected = Content::Conversation(vec![system.clone(), user("p"), assistant("c")]);
    assert_eq!(content(&format!(r#"{{"system":"s",{turns}}}"#)), expected);
    let own = r#""messages":[{"role":"system","content":"s"},{"role":"user","content":"p"},{"role":"assistant","content":"c"}]"#;
    assert_eq!(content(&format!(r#"{{"system":"other",{own}}}"#)), expected);
    let line = r#"{"system":"s","conversations":[{"from":"human","value":"p"}],"chosen":{"from":"gpt","value":"c"},"rejected":{"from":"gpt","value":"r"}}"#;
    let expected = Content::Preference {
        prompt: Prompt::Messages(vec![system, user("p")]),
        chosen: Answer::Messages(vec![assistant("c")]),
        rejected: Answer::Messages(vec![assistant("r")]),
    };
    assert_eq!(content(line), expected);
    // Wherever there are messages.
    let (question, answer) =
        (r#"{"role":"user","content":"p"}"#, |text| format!(r#"{{"role":"assistant","content":"{text}"}}"#));
    let (better, worse) = (answer("c"), answer("r"));
    for line in [
        format!(r#"{{"system":"s","prompt":[{question}],"chosen":[{better}],"rejected":[{worse}]}}"#),
        format!(r#"{{"system":"s","prompt":"p","chosen":[{better}],"rejected":[{worse}]}}"#),
        format!(r#"{{"system":"s","chosen":[{question},{better}],"rejected":[{question},{worse}]}}"#),
    ] {
        let records = jsonl(&line).unwrap();
        assert_eq!((&records.records[0].content, &records.ignored_columns[..]), (&expected, &[][..]));
    }
    let text = r#"{"system":"s","prompt":"p","chosen":"c","rejected":"r"}"#;
    assert_eq!(jsonl(text).unwrap().ignored_columns, ["system"]);
}

/// A table of one row.
fn table(fields: &[(&str, &str)]) -> Result<Records, Error> {
    let line = |cells: Vec<&str>| {
        let quoted = cells.iter().map(|cell| format!("\"{}\"", cell.replace('"', "\"\"")));
        quoted.collect::<Vec<_>>().join(",")
    };
    let (names, cells) = fields.iter().copied().unzip();
    let files = Files::new();
    read(&files.write("data.csv", format!("{}\n{}\n", line(names), line(cells))))
}

/// Pandas writes lists into a table as Python prints them, and others as JSON.
#[test]
fn messages_in_tables() {
    let row = |fields: &[(&str, &str)]| table(fields).unwrap().records.remove(0).content;
    let conversation = r#"[{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]"#;
    assert_eq!(row(&[("messages", conversation)]), Content::Conversation(vec![user("p"), assistant("c")]));
    for text in ["[{'role': 'user', 'content': 'p'}]", r#"[{"role": "user", 'content': "p"}]"#, "[broken"] {
        let error = table(&[("messages", text)]).unwrap_err();
        assert!(
            error.to_string().contains("line 2: expected messages in `messages`, found a list"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("to_json"));
    }
    let answer = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
    let expected = Content::Preference {
        prompt: Prompt::Messages(vec![user("p")]),
        chosen: Answer::Messages(vec![assistant("c")]),
        rejected: Answer::Messages(vec![assistant("r")]),
    };
    let list = |message: String| format!("[{message}]");
    let whole = |text: &str| format!(r#"[{{"role": "user", "content": "p"}}, {}]"#, answer(text));
    let asked = r#"[{"from": "human", "value": "p"}]"#;
    for (prompt, chosen, rejected) in [
        (asked, answer("c"), answer("r")),
        ("p", list(answer("c")), list(answer("r"))),
        ("p", whole("c"), whole("r")),
        (asked, whole("c"), whole("r")),
    ] {
        assert_eq!(row(&[("prompt", prompt), ("chosen", &chosen), ("rejected", &rejected)]), expected);
    }
    let python = "[{'role': 'assistant', 'content': 'c'}]";
    for (prompt, answer) in [("p", python), (asked, &conversation[..40])] {
        let error = table(&[("prompt", prompt), ("completion", answer)]).unwrap_err();
        assert!(error.to_string().contains("expected messages in `completion`"), "{error}");
    }
    // As in JSON.
    for (completion, words) in [
        ("c", "messages, as the prompt is"),
        (r#"[{"role": "function", "content": "c"}]"#, "unknown role `function` in `completion[0].role`"),
    ] {
        let error = table(&[("prompt", asked), ("completion", completion)]).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

/// Tables that were joined have the columns of all.
#[test]
fn empty_cells_decide_no_schema() {
    let conversation = r#"[{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]"#;
    let expected = Content::Conversation(vec![user("p"), assistant("c")]);
    for others in [["prompt", "completion"], ["chosen", "rejected"], ["instruction", "output"]] {
        let read = table(&[(others[0], ""), ("messages", conversation), (others[1], "")]).unwrap();
        assert_eq!(read.records[0].content, expected, "{others:?}");
    }
    let files = Files::new();
    for (name, text, reason) in [
        (
            "answer.csv",
            "prompt,chosen,rejected\n\"[{\"\"from\"\":\"\"human\"\",\"\"value\"\":\"\"p\"\"}]\",,\n",
            Reason::EmptyAnswer,
        ),
        (
            "side.jsonl",
            "{\"chosen\":[{\"role\":\"user\",\"content\":\"p\"}],\"rejected\":\"\"}\n",
            Reason::NoAnswer,
        ),
    ] {
        let read = read(&files.write(name, text)).unwrap();
        assert_eq!((read.records.len(), read.dropped.count(reason)), (0, 1), "{name}");
    }
    let read = jsonl("{\"messages\":[]}\n{\"messages\":\"\"}\n").unwrap();
    assert_eq!(read.records[1].content, Content::Conversation(Vec::new()));
    // Where all are empty, what is there counts.
    let empty = Content::Completion { prompt: Prompt::Text(String::new()), completion: text("c") };
    assert_eq!(content(r#"{"prompt":"","completion":"c"}"#), empty);
}

/// Data to extract and code are no messages, whatever keys they have.
#[test]
fn answers_that_are_json_stay_text() {
    let said = r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]"#;
    for answer in [
        "[]",
        "[1, 2]",
        r#"{"answer": 1}"#,
        r#"{"from": "London", "to": "Paris"}"#,
        r#"[{"role": "CEO", "name": "Ann"}]"#,
        r#"{"role": "assistant", "content": "c"}"#,
        "{'value': 3}",
        "[{'value': 3}]",
        "[broken",
        said,
        "[{'role': 'user', 'content': 'hi'}]",
    ] {
        let prompt = Prompt::Text("p".into());
        let completion = Content::Completion { prompt: prompt.clone(), completion: text(answer) };
        let preference = Content::Preference { prompt, chosen: text(answer), rejected: text("no") };
        let line = json!({ "prompt": "p", "completion": answer, "messages": said }).to_string();
        assert_eq!(content(&line), completion);
        assert_eq!(
            content(&json!({ "prompt": "p", "chosen": answer, "rejected": "no" }).to_string()),
            preference
        );
        // A list of messages in a table is one.
        if !answer.starts_with("[{\"role\": \"user") && !answer.contains("'user'") {
            let rows = table(&[("prompt", "p"), ("completion", answer), ("messages", "[{'role': 'user'}]")])
                .unwrap();
            assert_eq!((&rows.records[0].content, &rows.ignored_columns[0][..]), (&completion, "messages"));
            let rows = table(&[("prompt", "p"), ("chosen", answer), ("rejected", "no")]).unwrap();
            assert_eq!(rows.records[0].content, preference);
        }
    }
}

/// A prompt beside whole conversations is not said twice, however each writes it.
#[test]
fn a_prompt_that_the_conversations_repeat() {
    let system = json!({ "role": "system", "content": "s" });
    let asked = json!({ "role": "user", "content": "p" });
    let said = |text: &str| json!({ "role": "assistant", "content": text });
    let expected = |system: Option<&str>| Content::Preference {
        prompt: Prompt::Messages(
            system.map(|text| Message::new(Role::System, text)).into_iter().chain([user("p")]).collect(),
        ),
        chosen: Answer::Messages(vec![assistant("c")]),
        rejected: Answer::Messages(vec![assistant("r")]),
    };
    for (prompt, before, in_prompt) in [
        (json!([asked]), json!([asked]), None),
        (json!([{ "role": "user", "content": "p", "name": null }]), json!([asked]), None),
        (json!([{ "from": "human", "value": "p" }]), json!([asked]), None),
        (json!([system, asked]), json!([asked]), Some("s")),
        (json!([system, asked]), json!([system, asked]), Some("s")),
        (json!([asked]), json!([system, asked]), Some("s")),
        (json!([asked]), json!([]), None),
    ] {
        let side = |text: &str| [before.as_array().unwrap().clone(), vec![said(text)]].concat();
        let row = json!({ "prompt": prompt, "chosen": side("c"), "rejected": side("r") });
        assert_eq!(content(&row.to_string()), expected(in_prompt), "{row}");
    }
    let completion = Answer::Messages(vec![assistant("c")]);
    for (before, prompt) in [
        (json!([asked]), vec![user("p")]),
        (json!([system, asked]), vec![Message::new(Role::System, "s"), user("p")]),
    ] {
        let answer = [before.as_array().unwrap().clone(), vec![said("c")]].concat();
        let row = json!({ "prompt": [asked], "completion": answer });
        let (prompt, completion) = (Prompt::Messages(prompt), completion.clone());
        assert_eq!(content(&row.to_string()), Content::Completion { prompt, completion });
    }
    // Two that contradict each other.
    let other = json!({ "role": "system", "content": "t" });
    let row = json!({ "prompt": [system, asked], "completion": [other, asked, said("c")] });
    assert_eq!(jsonl(&row.to_string()).unwrap().dropped.count(Reason::PromptsDiffer), 1);
    // Transcripts, beside their own beginning.
    let transcript = |text: &str| format!("\n\nHuman: p\n\nAssistant:{text}");
    let row = json!({ "prompt": transcript(""), "chosen": transcript(" c"), "rejected": transcript(" r") });
    let Content::Preference { prompt, chosen, .. } = content(&row.to_string()) else { panic!() };
    assert_eq!((prompt, chosen), (Prompt::Transcript(transcript("")), text(" c")));
    // Answers of several messages after a prompt in text.
    let tool = json!({ "role": "tool", "content": "1" });
    let row = json!({ "prompt": "p", "chosen": [said("a"), tool, said("c")], "rejected": [said("r")] });
    let Content::Preference { chosen: Answer::Messages(chosen), .. } = content(&row.to_string()) else {
        panic!()
    };
    assert_eq!(chosen.len(), 3);
    // One message each, after a conversation beside them.
    let row = json!({ "conversations": [asked], "chosen": [said("c")], "rejected": [said("r")] });
    assert_eq!(content(&row.to_string()), expected(None));
}

/// As TRL (`label`) and LLaMA-Factory (`kto_tag`) have them for KTO.
#[test]
fn answers_are_marked_as_good_or_bad() {
    let bad = |line: &str| {
        let records = jsonl(line).unwrap();
        (records.records[0].bad, records.ignored_columns.is_empty())
    };
    for (mark, expected) in [
        (r#""label":false"#, (true, true)),
        (r#""label":"False""#, (true, true)),
        (r#""kto_tag":false"#, (true, true)),
        (r#""label":true"#, (false, true)),
        // A class, not a judgement.
        (r#""label":0"#, (false, false)),
        (r#""label":"negative""#, (false, false)),
    ] {
        assert_eq!(bad(&format!(r#"{{"prompt":"p","completion":"c",{mark}}}"#)), expected, "{mark}");
    }
    let messages = r#""messages":[{"role":"user","content":"p"},{"role":"assistant","content":"c"}]"#;
    assert_eq!(bad(&format!(r#"{{{messages},"kto_tag":false}}"#)), (true, true));
    assert_eq!(bad(&format!(r#"{{{messages},"label":false}}"#)), (false, false));
    assert_eq!(bad(r#"{"text":"a","label":false}"#), (false, false));
    assert_eq!(bad(r#"{"prompt":"p","chosen":"c","rejected":"r","label":false}"#), (false, false));
}

#[test]
fn parts_that_are_text_are_joined() {
    let line = |parts: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":{parts}}},{{"role":"assistant","content":"c"}}]}}"#
        )
    };
    let parts = r#"[{"type":"text","text":"p"},{"type":"text","text":"q"}]"#;
    assert_eq!(content(&line(parts)), Content::Conversation(vec![user("pq"), assistant("c")]));
    let error = jsonl(&line(r#"[{"type":"text","text":"p"},{"type":"image","image":"x.png"}]"#)).unwrap_err();
    assert!(error.to_string().contains("parts that are all text in `messages[0].content`"), "{error}");
}

#[test]
fn preferences() {
    let prompt = Prompt::Text("p".into());
    let expected = Content::Preference { prompt, chosen: text("c"), rejected: text("r") };
    assert_eq!(content(r#"{"prompt":"p","chosen":"c","rejected":"r"}"#), expected);
    let pair = |prompt: Vec<Message>| Content::Preference {
        prompt: Prompt::Messages(prompt),
        chosen: Answer::Messages(vec![assistant("c")]),
        rejected: Answer::Messages(vec![assistant("r")]),
    };
    let whole = r#""chosen":[{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"r"}]"#;
    assert_eq!(content(&format!("{{{whole}}}")), pair(vec![user("p")]));
    let records = jsonl(&format!("{{\"prompt\":\"p\",{whole}}}")).unwrap();
    assert_eq!(
        (records.schema, records.ignored_columns),
        (Schema::ImplicitPreference, vec!["prompt".to_owned()])
    );
    // Answers alone follow the prompt beside them, as messages do.
    let answer =
        |side: &str, content: &str| format!(r#""{side}":[{{"role":"assistant","content":"{content}"}}]"#);
    let (chosen, rejected, completion) =
        (answer("chosen", "c"), answer("rejected", "r"), answer("completion", "c"));
    let records = jsonl(&format!(r#"{{"prompt":"p",{chosen},{rejected}}}"#)).unwrap();
    assert_eq!(records.records[0].content, pair(vec![user("p")]));
    assert_eq!((records.schema, records.ignored_columns.len()), (Schema::Preference, 0));
    let mixed =
        jsonl(&format!("{{\"prompt\":\"p\",{whole}}}\n{{\"prompt\":\"p\",{chosen},{rejected}}}\n")).unwrap();
    assert!(mixed.records.iter().all(|record| record.content == pair(vec![user("p")])));
    let completed = Content::Completion {
        prompt: Prompt::Messages(vec![user("p")]),
        completion: Answer::Messages(vec![assistant("c")]),
    };
    assert_eq!(content(&format!(r#"{{"prompt":"p",{completion}}}"#)), completed);
}

#[test]
fn transcripts() {
    let line = r#"{"chosen":"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good","rejected":"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"}"#;
    let prompt = Prompt::Transcript("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:".into());
    assert_eq!(content(line), Content::Preference { prompt, chosen: text(" good"), rejected: text(" bad") });
}

/// Columns that are the prompts of other forms do not turn transcripts into them.
#[test]
fn transcripts_may_have_other_columns() {
    for other in [r#""instruction":"i""#, r#""conversations":[]"#] {
        let records = jsonl(&format!(
            r#"{{{other},"chosen":"\n\nHuman: a\n\nAssistant: b","rejected":"\n\nHuman: a\n\nAssistant: c"}}"#
        ));
        assert_eq!(records.unwrap().schema, Schema::Transcripts, "{other}");
    }
}

#[test]
fn useless_preferences_are_dropped_and_counted() {
    let line = |chosen: &str, rejected: &str| {
        let value = serde_json::json!({ "chosen": chosen, "rejected": rejected });
        format!("{value}\n")
    };
    let records = jsonl(
        &[
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"),
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: z\n\nAssistant: c"),
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: "),
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"),
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"),
            line("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"),
        ]
        .concat(),
    )
    .unwrap();
    assert_eq!((records.records.len(), records.duplicates, records.equal_answers), (3, 1, 1));
    for reason in [Reason::PromptsDiffer, Reason::EmptyAnswer, Reason::NoAnswer] {
        assert_eq!(records.dropped.count(reason), 1, "{reason}");
    }
    let places: Vec<usize> = records.dropped.iter().map(|(.., place)| place.number).collect();
    assert_eq!(places, [2, 4, 3]);
}

#[test]
fn conversations_without_an_answer_teach_nothing() {
    let line = |answers: [&str; 2]| {
        let turns = answers.iter().flat_map(|answer| {
            [("user", "a"), ("assistant", answer)]
                .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
        });
        format!("{}\n", serde_json::json!({ "messages": turns.collect::<Vec<_>>() }))
    };
    let records = jsonl(&[line(["", " "]), line(["", "b"]), line(["b", "c"])].concat()).unwrap();
    assert_eq!((records.records.len(), records.dropped.count(Reason::EmptyAnswer)), (2, 1));
    // What is said of an answer does not fill it; a call does.
    let with = |key: &str, value: serde_json::Value| {
        let mut answer = serde_json::json!({ "role": "assistant", "content": "" });
        answer[key] = value;
        let question = serde_json::json!({ "role": "human", "content": "a" });
        format!("{}\n", serde_json::json!({ "messages": [question, answer] }))
    };
    let call = serde_json::json!([{ "function": { "name": "f", "arguments": {} } }]);
    let lines = [
        with("language", "English".into()),
        with("tool_calls", serde_json::json!([])),
        with("weight", 1.0.into()),
        with("tool_calls", call),
    ];
    let records = jsonl(&lines.concat()).unwrap();
    assert_eq!((records.records.len(), records.dropped.count(Reason::EmptyAnswer)), (1, 3));
}

#[test]
fn a_preference_needs_something_before_its_answers() {
    let line = |questions: usize| {
        let side = |text: &str| {
            let question = serde_json::json!({ "role": "user", "content": "a" });
            let answer = serde_json::json!({ "role": "assistant", "content": text });
            [vec![question; questions], vec![answer]].concat()
        };
        format!("{}\n", serde_json::json!({ "chosen": side("b"), "rejected": side("c"), "question": "a" }))
    };
    let records = jsonl(&[line(1), line(0)].concat()).unwrap();
    assert_eq!((records.records.len(), records.dropped.count(Reason::NoPrompt)), (1, 1));
}

#[test]
fn other_columns_are_named() {
    let records = jsonl("{\"text\":\"a\",\"id\":1}\n\n{\"text\":\"b\",\"source\":\"x\"}\n").unwrap();
    assert_eq!(records.ignored_columns, ["id", "source"]);
    assert_eq!(records.records[1].place.number, 3);
    assert_eq!(records.schema.to_string(), "documents: `text`");
}

#[test]
fn errors_name_line_field_and_types() {
    assert_eq!(
        message("{\"text\":\"a\"}\n{\"txt\":1}"),
        "line 2: expected the field `text` (documents: `text`), found `txt`"
    );
    assert_eq!(message(r#"{"text":5}"#), "line 1: expected a string in `text`, found a number");
    assert_eq!(message(r#"{"a":5,"b":1}"#), "line 1: no schema has the fields `a`, `b`");
    assert_eq!(message("[]\n7"), "line 2 column 1: trailing characters");
    assert_eq!(message("7"), "line 1: expected an object or a string, found a number");
    let role = r#"{"messages":[{"role":"user","content":"a"},{"role":"narrator","content":"b"}]}"#;
    assert_eq!(message(role), "line 1: unknown role `narrator` in `messages[1].role`");
    let content = r#"{"messages":[{"role":"user","content":5}]}"#;
    assert_eq!(message(content), "line 1: expected a string in `messages[0].content`, found a number");
    let mixed = r#"{"prompt":"p","completion":1}"#;
    assert_eq!(message(mixed), "line 1: expected a string, as the prompt is in `completion`, found a number");
    let mixed = r#"{"prompt":"p","chosen":[{"role":"assistant","content":"c"}],"rejected":"r"}"#;
    assert_eq!(message(mixed), "line 1: expected messages, as the prompt is in `rejected`, found a string");
    let pair = r#"{"chosen":"a","rejected":"b"}"#;
    assert!(message(pair).starts_with("line 1: expected messages, or turns"));
}

#[test]
fn broken_json_on_line_17() {
    let lines = "{\"text\":\"a\"}\n".repeat(16) + "{\"text\": oops}\n";
    assert_eq!(message(&lines), "line 17 column 10: expected value");
    assert!(
        matches!(jsonl(&lines), Err(Error::Syntax { place, column: Some(10), .. }) if place.number == 17)
    );
}

#[test]
fn broken_utf8() {
    let files = Files::new();
    let path = files.write("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n");
    assert!(matches!(read(&path), Err(Error::NotUtf8 { place, column: 10 }) if place.number == 2));
    let path = files.write("a.txt", b"one\ntwo\xff");
    assert!(matches!(read(&path), Err(Error::NotUtf8 { place, column: 4 }) if place.number == 2));
    let path = files.write("a.csv", b"text\nok\n\xff\n");
    assert!(matches!(read(&path), Err(Error::NotUtf8 { place, .. }) if place.number == 3));
}

#[test]
fn nothing_to_read() {
    let files = Files::new();
    for name in ["a.jsonl", "a.json", "a.csv"] {
        assert!(matches!(read(&files.write(name, "\n")), Err(Error::Empty { .. })), "{name}");
    }
    assert!(matches!(read(&files.write("a.json", "[]")), Err(Error::Empty { .. })));
    assert!(matches!(read(&files.write("a.bin", "x")), Err(Error::UnknownKind { .. })));
    assert!(matches!(read(Path::new("/nonexistent/a.jsonl")), Err(Error::Read { .. })));
    let empty = Files::new();
    assert!(matches!(read(empty.0.path()), Err(Error::Empty { .. })));
}

fn texts(path: &Path) -> Vec<String> {
    let records = read(path).unwrap().records;
    records
        .into_iter()
        .map(|record| match record.content {
            Content::Text(text) => text,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn containers() {
    let files = Files::new();
    let lines = "\u{feff}{\"text\":\"a\"}\r\n{\"text\":\"b\"}";
    for (name, bytes) in [
        ("x.jsonl", lines.as_bytes().to_vec()),
        ("lines.json", lines.as_bytes().to_vec()),
        ("x.json", b" [{\"text\":\"a\"},\n{\"text\":\"b\"}]".to_vec()),
        ("strings.json", "\u{feff}[\"a\",\"b\"]".as_bytes().to_vec()),
        ("x.csv", "\u{feff}id,text\n1,a\n2,\"b\"\n".as_bytes().to_vec()),
        ("x.ndjson", lines.as_bytes().to_vec()),
        ("x.jsonl.gz", gzip(lines.as_bytes())),
        ("two.jsonl.gz", [gzip(b"{\"text\":\"a\"}\n"), gzip(b"{\"text\":\"b\"}\n")].concat()),
        ("x.jsonl.zst", zstd::encode_all(lines.as_bytes(), 3).unwrap()),
        ("x.csv.zst", zstd::encode_all(&b"text\na\nb\n"[..], 3).unwrap()),
    ] {
        assert_eq!(texts(&files.write(name, bytes)), ["a", "b"], "{name}");
    }
    assert_eq!(texts(&files.write("x.txt", "a\nb\n")), ["a\nb\n"]);
}

#[test]
fn a_folder_is_its_files_in_order() {
    let files = Files::new();
    files.write("b.txt", "second");
    files.write("a.jsonl", "{\"text\":\"first\"}");
    files.write("README.md", "# not data");
    files.write("._a.jsonl", "\0\u{5}\u{16}\u{7}");
    fs::create_dir(files.0.path().join("c.txt")).unwrap();
    assert_eq!(texts(files.0.path()), ["first", "second"]);
    // What describes data is none.
    files.write("dataset_infos.json", "{\"default\": {}}");
    assert_eq!(texts(files.0.path()), ["first", "second"]);
    // As `datasets` saves to disk.
    let files = Files::new();
    files.write("state.json", "{}");
    let arrow = files.write("data-00000-of-00001.arrow", "ARROW1");
    let error = read(files.0.path()).unwrap_err();
    assert_eq!(error.to_string(), format!("`{}` is of no known kind", arrow.display()));
    assert!(error.hint().unwrap().contains("to_parquet"));
    files.write("a.jsonl", "{\"text\":\"first\"}");
    assert_eq!(texts(files.0.path()), ["first"]);
    let files = Files::new();
    files.write("dataset_dict.json", "{\"splits\": [\"train\"]}");
    assert!(read(files.0.path()).unwrap_err().hint().unwrap().contains("of each split"));
}

#[test]
fn places_in_arrays_and_tables() {
    let files = Files::new();
    let error = read(&files.write("a.json", "[{\"text\":\"a\"},\n\n{\"text\":1}]")).unwrap_err();
    assert!(error.to_string().ends_with("a.json` item 2: expected a string in `text`, found a number"));
    let error = read(&files.write("b.json", "[{\"text\":\"a\"},\n{\"text\" 1}]")).unwrap_err();
    assert!(error.to_string().ends_with("b.json` line 2 column 9: expected `:`"), "{error}");
    assert!(read(&files.write("c.json", "[\"a\"] x")).is_err());
    assert!(read(&files.write("d.json", "[\"a\"")).is_err());
    let error = read(&files.write("a.csv", "prompt;completion\na;b\n")).unwrap_err();
    assert!(error.hint().unwrap().contains("commas between"), "{error}");
    let error = read(&files.write("a.csv", "text,id\na,1\nb\n")).unwrap_err();
    assert!(error.to_string().contains("a.csv` line 3: "), "{error}");
    let crlf = files.write("crlf.csv", "text,id\r\na,1\r\n\"b\r\nb\",2\r\nc,3\r\n");
    let lines: Vec<usize> = read(&crlf).unwrap().records.iter().map(|record| record.place.number).collect();
    assert_eq!(lines, [2, 3, 5]);
    let error = read(&files.write("crlf.csv", b"text\r\na\r\n\xff\r\n")).unwrap_err().to_string();
    assert!(error.contains("line 3"), "{error}");
    // Quotes that nobody closes would make one answer of all rows behind them.
    for (text, line) in [("text,id\na,1\n\"b,2\nc,3\n", 3), ("text\n\"a\nb", 2), ("id,\"text\n1,a\n", 1)] {
        let error = read(&files.write("open.csv", text)).unwrap_err().to_string();
        assert!(error.contains(&format!("line {line}: the quotes of ")), "{error}");
        assert!(error.ends_with("are never closed"), "{error}");
    }
}

#[test]
fn bombs_are_refused() {
    let files = Files::new();
    let zeros = vec![b' '; 200 << 20];
    let bomb = files.write("bomb.jsonl.gz", gzip(&zeros));
    assert!(
        matches!(read(&bomb), Err(Error::Expansion { .. } | Error::TooLong { .. })),
        "{:?}",
        read(&bomb).err()
    );
    let lines = [&zeros[..1 << 20], b"\n"].concat().repeat(200);
    let bomb = files.write("bomb.jsonl.zst", zstd::encode_all(&lines[..], 3).unwrap());
    assert!(matches!(read(&bomb), Err(Error::Expansion { .. })), "{:?}", read(&bomb).err());
    let long = files.write("long.jsonl", [&b"\""[..], &zeros].concat());
    assert!(matches!(read(&long), Err(Error::TooLong { .. })), "{:?}", read(&long).err());
    let long = files.write("long.json", [&b"[\""[..], &zeros].concat());
    assert!(matches!(read(&long), Err(Error::TooLong { .. })), "{:?}", read(&long).err());
    let long = files.write("long.csv", [&b"text\n\""[..], &zeros].concat());
    assert!(matches!(read(&long), Err(Error::TooLong { .. })), "{:?}", read(&long).err());
    let cut = gzip(b"{\"text\":\"a\"}\n");
    let cut = files.write("cut.jsonl.gz", &cut[..cut.len() - 6]);
    assert!(matches!(read(&cut), Err(Error::Read { .. })));
    let nested = files.write("deep.jsonl", "[".repeat(100_000));
    assert!(read(&nested).is_err());
}

/// The bytes of a Parquet file of one row group.
#[cfg(feature = "parquet")]
fn parquet_file(
    schema: &str,
    fill: impl FnOnce(&mut parquet::file::writer::SerializedRowGroupWriter<'_, &mut Vec<u8>>),
) -> Vec<u8> {
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer =
        parquet::file::writer::SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    fill(&mut group);
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_files() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    let schema = "message rows { required binary text (UTF8); required binary id (UTF8); }";
    let bytes = parquet_file(schema, |group| {
        while let Some(mut column) = group.next_column().unwrap() {
            let values = [ByteArray::from("a"), ByteArray::from("b")];
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
        }
    });
    let files = Files::new();
    let path = files.write("x.parquet", &bytes);
    assert_eq!(texts(&path), ["a", "b"]);
    assert_eq!(read(&path).unwrap().ignored_columns, ["id"]);
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 0x55;
        let _ = read(&files.write("broken.parquet", broken));
    }
    assert!(read(&files.write("broken.parquet", &bytes[..bytes.len() / 2])).is_err());
}

/// Every struct of a column has the fields of all others, null where it has none.
#[cfg(feature = "parquet")]
#[test]
fn nulls_of_parquet_are_left_away() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    let schema = "message rows {
        optional binary text (UTF8);
        required group messages (LIST) { repeated group list { required group element {
            required binary role (UTF8); required binary content (UTF8);
            required group tool { optional binary city (UTF8); optional binary day (UTF8); }
        } } }
    }";
    let bytes = parquet_file(schema, |group| {
        // A value, the definition levels and the repetition levels of each column: one row of two messages.
        let columns: [(&[&str], &[i16], &[i16]); 5] = [
            (&[], &[0], &[0]),
            (&["user", "assistant"], &[1, 1], &[0, 1]),
            (&["q", "a"], &[1, 1], &[0, 1]),
            (&["Rome"], &[2, 1], &[0, 1]),
            (&["3"], &[1, 2], &[0, 1]),
        ];
        for (values, definition, repetition) in columns {
            let values: Vec<ByteArray> = values.iter().map(|&value| ByteArray::from(value)).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(definition), Some(repetition)).unwrap();
            column.close().unwrap();
        }
    });
    let records = read(&Files::new().write("x.parquet", &bytes)).unwrap();
    let Content::Conversation(messages) = &records.records[0].content else { panic!("{records:?}") };
    let tools: Vec<String> = messages.iter().map(|message| message.extra["tool"].to_string()).collect();
    assert_eq!(tools, [r#"{"city":"Rome"}"#, r#"{"day":"3"}"#]);
    assert!(records.ignored_columns.is_empty());
}

/// Text that is not declared as text, bytes that are none, and times that no calendar has.
#[cfg(feature = "parquet")]
#[test]
fn undeclared_fields_of_parquet() {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
    let schema = "message rows {
        required binary prompt; required binary completion; required binary picture;
        required int32 day (DATE); required int64 time (TIMESTAMP_MILLIS);
    }";
    let bytes = parquet_file(schema, |group| {
        for value in ["What is it?", "A river.", "\u{0}"] {
            let mut column = group.next_column().unwrap().unwrap();
            let value = if value == "\u{0}" { vec![0xff, 0xfe] } else { value.into() };
            column.typed::<ByteArrayType>().write_batch(&[ByteArray::from(value)], None, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[i32::MAX], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[1 << 62], None, None).unwrap();
        column.close().unwrap();
    });
    let records = read(&Files::new().write("x.parquet", &bytes)).unwrap();
    let expected =
        Content::Completion { prompt: Prompt::Text("What is it?".into()), completion: text("A river.") };
    assert_eq!(records.records[0].content, expected);
    assert_eq!(records.ignored_columns, ["day", "picture", "time"]);
}
