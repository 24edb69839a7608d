//! Records: every schema, and errors that name the place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod data_files;

use std::path::Path;

use serde_json::json;
use temper::data::records::read;
use temper::data::{Answer, Content, Error, Prompt, Reason, Schema};
use temper::text::{Message, Role};

use data_files::{Files, assistant, content, jsonl, message, table, text, user};

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

/// Data to extract and code are no messages, whatever keys they have.
#[test]
fn answers_that_are_json_stay_text() {
    let said = r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]"#;
    for answer in [
        "[]",
        "[1, 2]",
        r#"{"answer": 1}"#,
        r#"{"from": "London", "to": "Paris"}"#,
        r#"[{"role": "baker", "age": 40}]"#,
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
