//! Chat templates: as Transformers renders them, and bounded whatever they do.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use chrono::{DateTime, NaiveDateTime, Utc};
use serde_json::{Value, json};
use temper::text::{ChatTemplate, Error, Message, Role, Tokenizer, Variables};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/");

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(format!("{FIXTURES}{name}")).unwrap()).unwrap()
}

fn tokenizer(bos: &str, eos: &str) -> Tokenizer {
    let json = std::fs::read(format!("{FIXTURES}chat-tiny/tokenizer.json")).unwrap();
    let config = serde_json::json!({ "bos_token": bos, "eos_token": eos });
    Tokenizer::from_json(&json, Some(&config)).unwrap()
}

fn template(source: &str) -> Result<ChatTemplate, Error> {
    ChatTemplate::new(source, &tokenizer("<s>", "</s>"), DateTime::UNIX_EPOCH)
}

fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
    template(source)?.render(messages, &Variables::new(), false)
}

/// Messages of a fixture; none when a role is unknown to us.
fn messages(list: &Value) -> Option<Vec<Message>> {
    let message = |message: &Value| {
        let extra = message.as_object().unwrap().iter();
        let extra = extra.filter(|(key, _)| !["role", "content"].contains(&key.as_str()));
        Some(Message {
            role: Role::from_name(message["role"].as_str().unwrap())?,
            content: message["content"].as_str().unwrap().to_owned(),
            extra: extra.map(|(key, value)| (key.clone(), value.clone())).collect(),
        })
    };
    list.as_array().unwrap().iter().map(message).collect()
}

#[test]
fn renders_as_transformers_does() {
    let fixture = fixture("templates.json");
    let now: NaiveDateTime = fixture["now"].as_str().unwrap().parse().unwrap();
    let now: DateTime<Utc> = now.and_utc();
    let mut compared = 0;
    for entry in fixture["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let tokenizer = tokenizer(entry["bos_token"].as_str().unwrap(), entry["eos_token"].as_str().unwrap());
        let template = ChatTemplate::new(entry["template"].as_str().unwrap(), &tokenizer, now).unwrap();
        for case in entry["cases"].as_array().unwrap() {
            let Some(messages) = messages(&case["messages"]) else { continue };
            if case.get("variables").is_some() {
                continue;
            }
            let rendered = template.render(
                &messages,
                &Variables::new(),
                case["add_generation_prompt"].as_bool().unwrap(),
            );
            match case.get("error") {
                None => assert_eq!(rendered.unwrap(), case["text"].as_str().unwrap(), "{name}"),
                Some(expected) => match rendered.unwrap_err() {
                    Error::Refused { reason, line: Some(_) } => {
                        assert_eq!(reason, expected.as_str().unwrap())
                    }
                    other => panic!("{name}: {other}"),
                },
            }
            compared += 1;
        }
    }
    assert!(compared > 25, "{compared}");
}

#[test]
fn conversations_have_the_ids_of_transformers() {
    let fixture = fixture("chat-tiny/rendered.json");
    let config = self::fixture("chat-tiny/tokenizer_config.json");
    let json = std::fs::read(format!("{FIXTURES}chat-tiny/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_json(&json, Some(&config)).unwrap();
    let source = config["chat_template"].as_str().unwrap();
    let template = ChatTemplate::new(source, &tokenizer, DateTime::UNIX_EPOCH).unwrap();
    for case in fixture["conversations"].as_array().unwrap() {
        let messages = messages(&case["messages"]).unwrap();
        let text = template
            .render(&messages, &Variables::new(), case["add_generation_prompt"].as_bool().unwrap())
            .unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), ids);
    }
    let end = template.end_of_turn(&tokenizer).unwrap().unwrap();
    assert_eq!(tokenizer.token(end).unwrap(), "<|im_end|>");
}

#[test]
fn the_end_of_a_turn_is_found_where_a_system_message_must_come_first() {
    let json = std::fs::read(format!("{FIXTURES}chat-tiny/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_json(&json, None).unwrap();
    let chatml = ChatTemplate::built_in("chatml").unwrap();
    let end = |refused: &str| {
        let source = format!("{{% if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{chatml}");
        let template = ChatTemplate::new(&source, &tokenizer, DateTime::UNIX_EPOCH).unwrap();
        template.end_of_turn(&tokenizer).map(|end| tokenizer.token(end.unwrap()).unwrap())
    };
    for refused in ["messages[0].role != 'system'", "messages[0].role == 'system'"] {
        assert_eq!(end(refused).unwrap(), "<|im_end|>");
    }
    assert!(matches!(end("true"), Err(Error::Refused { .. })));
}

#[test]
fn generation_tags_leave_the_white_space_as_it_is() {
    let with = "{% for m in messages %}a\n  {%- generation -%}\n  {{ m.content }}\n  {% endgeneration %}\n b{% endfor %}";
    let as_block =
        "{% for m in messages %}a\n  {%- if true -%}\n  {{ m.content }}\n  {% endif %}\n b{% endfor %}";
    let messages = [Message::new(Role::Assistant, "x")];
    assert_eq!(render(with, &messages).unwrap(), render(as_block, &messages).unwrap());
    assert_eq!(render(with, &messages).unwrap(), "ax\n b");
}

#[test]
fn tojson_is_pythons() {
    let source = r#"{{ {"b": [1, 2.0, 1e16, 1e-5, none, true], "a": "é\n<'&"} | tojson }}
{{ {"b": [], "a": {"x": [1]}} | tojson(indent=2, sort_keys=true) }}
{{ ["é😀"] | tojson(ensure_ascii=true, separators=[",", ":"]) }}"#;
    let expected = "{\"b\": [1, 2.0, 1e+16, 1e-05, null, true], \"a\": \"é\\n<'&\"}
{\n  \"a\": {\n    \"x\": [\n      1\n    ]\n  },\n  \"b\": []\n}
[\"\\u00e9\\ud83d\\ude00\"]";
    assert_eq!(render(source, &[]).unwrap(), expected);
}

#[test]
fn python_words_and_methods() {
    assert_eq!(
        render("{{ true }} {{ none }} {{ 'a b'.split() | join('-') }}", &[]).unwrap(),
        "True None a-b"
    );
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap(), "01 Jan 1970");
    assert!(matches!(render("{{ strftime_now('%Q') }}", &[]), Err(Error::Template { .. })));
}

/// As Python and Jinja2 answer.
#[test]
fn what_the_engine_lacks_is_pythons_too() {
    for (source, expected) in [
        ("'a.b.c'.rsplit('.', 1)", "['a.b', 'c']"),
        ("'a.b.c'.rsplit('.')", "['a', 'b', 'c']"),
        ("'  a b  c '.rsplit(none, 1)", "['  a b', 'c']"),
        ("'  a b  c '.rsplit()", "['a', 'b', 'c']"),
        ("''.rsplit() | length", "0"),
        ("'a.b.c'.rsplit('.', maxsplit=1)", "['a.b', 'c']"),
        ("'a=b=c'.partition('=') | join(' ')", "a = b=c"),
        ("'a=b=c'.rpartition('=') | join(' ')", "a=b = c"),
        ("'abc'.partition('=') | join(' ')", "abc  "),
        ("'abc'.rpartition('=') | join(' ')", "  abc"),
        ("'<think>a'.removeprefix('<think>') ~ 'b.'.removesuffix('.')", "ab"),
        ("none is iterable", "False"),
        ("[] is iterable and 'a' is iterable", "True"),
        ("1 is iterable", "False"),
        ("'a' is sequence and {} is sequence and [] is sequence", "True"),
        ("[1, 2][1:] is sequence and range(2) is sequence", "True"),
        ("1 is sequence or none is sequence", "False"),
    ] {
        let found = render(&format!("{{{{ {source} }}}}"), &[]).unwrap();
        assert_eq!(found.replace('"', "'"), expected, "{source}");
    }
    for source in ["rsplit", "partition", "rpartition"] {
        let error = render(&format!("{{{{ 'ab'.{source}('') }}}}"), &[]).unwrap_err();
        assert!(error.to_string().contains("empty separator"), "{error}");
    }
}

/// As Transformers 5.24 has it.
#[test]
fn reasoning_goes_by_every_name() {
    let source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}|{{ messages[0].reasoning }}";
    let with = |fields: Value| {
        let extra = fields.as_object().unwrap().clone();
        render(source, &[Message { extra, ..Message::new(Role::Assistant, "a") }]).unwrap()
    };
    assert_eq!(with(json!({ "reasoning": "r" })), "r|r|r");
    assert_eq!(with(json!({ "thinking": "t" })), "t|t|");
    assert_eq!(with(json!({ "reasoning_content": "c", "thinking": "t" })), "c|t|");
    assert_eq!(with(json!({ "reasoning_content": null, "reasoning": "r" })), "r|r|r");
    assert_eq!(with(json!({})), "||");
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(forever, &[]), Err(Error::Endless { line: Some(1) })));
    let recursion = "{% macro again() %}{{ again() }}{% endmacro %}\n{{ again() }}";
    assert!(matches!(render(recursion, &[]), Err(Error::Template { .. } | Error::Endless { .. })));
}

#[test]
fn a_template_that_writes_without_end_is_stopped() {
    let much = "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}";
    assert!(matches!(render(much, &[]), Err(Error::OutputTooLong { .. })), "{:?}", render(much, &[]).err());
    let grows =
        "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
    assert!(matches!(render(grows, &[]), Err(Error::Endless { .. })), "{:?}", render(grows, &[]).err());
    let deep = "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% set n.x = [n.x] %}{% endfor %}";
    for end in ["", "{{ n.x }}", "{{ n.x | tojson }}", "{{ n.x == [n.x] }}", "{{ 1 + n }}"] {
        assert!(!matches!(render(&format!("{deep}{end}"), &[]), Err(Error::Endless { line: None })), "{end}");
    }
}

#[test]
fn errors_name_the_line() {
    let Err(Error::Template { line, .. }) = template("a\nb {{ oops( }}\n") else { panic!() };
    assert_eq!(line, Some(2));
    let error = render("a\nb\n{{ messages[0].content.nope.nope }}", &[Message::new(Role::User, "x")]);
    let Err(Error::Template { line, .. }) = error else { panic!() };
    assert_eq!(line, Some(3));
    let error = render("\n{{ raise_exception('no system') }}", &[]).unwrap_err();
    assert_eq!(error.to_string(), "the chat template refuses the conversation at line 2: no system");
    assert!(matches!(render("{% include 'etc/passwd' %}", &[]), Err(Error::Template { .. })));
}

#[test]
fn built_in_chatml_and_its_markers() {
    let tokenizer = tokenizer("<s>", "</s>");
    let source = ChatTemplate::built_in("chatml").unwrap();
    let chatml = ChatTemplate::new(source, &tokenizer, DateTime::UNIX_EPOCH).unwrap();
    chatml.check_markers(&tokenizer).unwrap();
    let turns = [Message::new(Role::User, "Hi"), Message::new(Role::Assistant, "Ho")];
    let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n";
    assert_eq!(chatml.render(&turns, &Variables::new(), false).unwrap(), text);
    let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(chatml.render(&turns[..1], &Variables::new(), true).unwrap(), text);
    let other = ChatTemplate::new("{{ '<|begin|>' + '<|' + 'x' + '|>' }}", &tokenizer, DateTime::UNIX_EPOCH);
    let Err(Error::UnknownMarkers { markers }) = other.unwrap().check_markers(&tokenizer) else { panic!() };
    assert_eq!(markers, ["<|begin|>"]);
    assert!(ChatTemplate::built_in("alpaca").is_none());
}
