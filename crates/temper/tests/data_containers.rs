//! Files and tables: every container, what stands in cells, and what is refused.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod data_files;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use temper::data::records::read;
use temper::data::{Answer, Content, Error, Prompt, Reason};

use data_files::{Files, assistant, content, jsonl, table, text, user};

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
    for (prompt, answer) in
        [("p", python), (asked, &conversation[..40]), ("p", r#"[{"role":"assistant","cont"#)]
    {
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
