//! The tokenizer: ids as `tokenizers` gives them, GGUF vocabularies, saving and streaming.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use serde_json::{Value, json};
use temper::checkpoint::GgufVocabulary;
use temper::text::{Error, Tokenizer};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/");

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{FIXTURES}{name}")).unwrap()
}

fn json_file(name: &str) -> Value {
    serde_json::from_slice(&file(name)).unwrap()
}

fn tiny() -> Tokenizer {
    Tokenizer::from_json(
        &file("chat-tiny/tokenizer.json"),
        Some(&json_file("chat-tiny/tokenizer_config.json")),
    )
    .unwrap()
}

/// The GGUF form of `chat-tiny`'s vocabulary.
fn vocabulary(pre: &str) -> GgufVocabulary {
    let json = json_file("chat-tiny/tokenizer.json");
    let model = &json["model"];
    let mut tokens = vec![String::new(); model["vocab"].as_object().unwrap().len()];
    for (token, id) in model["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let mut token_types = vec![1; tokens.len()];
    for added in json["added_tokens"].as_array().unwrap() {
        token_types[added["id"].as_u64().unwrap() as usize] = 3;
    }
    let merges = model["merges"].as_array().unwrap().iter();
    let merges = merges.map(|merge| match merge {
        Value::Array(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        merge => merge.as_str().unwrap().to_owned(),
    });
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        merges: merges.collect(),
        tokens,
        token_types,
        bos: Some(1),
        eos: Some(2),
        ..GgufVocabulary::default()
    }
}

#[test]
fn ids_are_those_of_transformers() {
    let tokenizer = tiny();
    for case in json_file("chat-tiny/rendered.json")["encodings"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn special_tokens_come_from_the_configuration() {
    let json = file("chat-tiny/tokenizer.json");
    let bare = Tokenizer::from_json(&json, None).unwrap();
    assert_eq!((bare.bos(), bare.eos(), bare.adds_bos()), (None, None, false));
    let config = json!({ "bos_token": { "content": "<|im_start|>" }, "eos_token": "<|im_end|>", "add_bos_token": true });
    let tokenizer = Tokenizer::from_json(&json, Some(&config)).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true));
    let mut completed = bare;
    completed.complete_eos(Some(2));
    assert_eq!(completed.eos(), Some(2));
}

#[test]
fn tokens_that_the_configuration_lists_are_added() {
    let json = file("chat-tiny/tokenizer.json");
    let size = tiny().vocabulary_size();
    let listing = |id: usize| json!({ "added_tokens_decoder": { id.to_string(): { "content": "[X]", "special": true } } });
    let tokenizer = Tokenizer::from_json(&json, Some(&listing(size))).unwrap();
    let x = size as u32;
    assert_eq!(tokenizer.encode("[X]a").unwrap()[0], x);
    assert!(tokenizer.is_special(x) && tokenizer.vocabulary_size() == size + 1);
    let error = Tokenizer::from_json(&json, Some(&listing(size + 5))).err().unwrap().to_string();
    assert!(error.contains("[X]") && error.contains(&size.to_string()), "{error}");
}

/// The tokenizer of `chat-tiny` with a post-processor that puts `<|im_start|>` before every text, or after it.
fn with_post_processor(before: bool) -> String {
    let mut json = json_file("chat-tiny/tokenizer.json");
    let special = json!({ "SpecialToken": { "id": "<|im_start|>", "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": if before { [special, text] } else { [text, special] },
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<|im_start|>": { "id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"] } }
    });
    json.to_string()
}

#[test]
fn a_post_processor_that_adds_bos_is_noticed() {
    let json = with_post_processor(true);
    let config = json!({ "bos_token": "<|im_start|>" });
    assert!(Tokenizer::from_json(json.as_bytes(), Some(&config)).unwrap().adds_bos());
    // Nobody named it, but it is put there.
    let unnamed = Tokenizer::from_json(json.as_bytes(), None).unwrap();
    assert_eq!((unnamed.bos(), unnamed.adds_bos()), (Some(1), true));
    // What follows a text does not begin one, whatever its name.
    let after = with_post_processor(false);
    assert!(!Tokenizer::from_json(after.as_bytes(), Some(&config)).unwrap().adds_bos());
    let tokenizer = Tokenizer::from_json(json.as_bytes(), Some(&config)).unwrap();
    assert_eq!(tokenizer.encode("a").unwrap().len(), 1, "encode itself adds nothing");
}

/// SentencePiece's way: a text begins as if after a space. A piece of a text does not, but where the text in one has it.
#[test]
fn pieces_of_a_text_get_no_space_that_nobody_wrote() {
    let words = "<unk> <s> </s> ▁ \n a c h n o s t at ▁at on ▁on".split(' ');
    let vocabulary: Value =
        words.zip(0..).map(|(word, id): (&str, u32)| (word.to_owned(), json!(id))).collect();
    let tokenizer = |normalizer: Value, pre_tokenizer: Value| {
        let json = json!({
            "version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "added_tokens": [{ "id": 2, "content": "</s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true }],
            "model": { "type": "BPE", "unk_token": "<unk>", "fuse_unk": false, "byte_fallback": false,
                "vocab": vocabulary, "merges": ["a t", "▁ at", "o n", "▁ on"] },
        });
        Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap()
    };
    let metaspace = |scheme| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme });
    let normalizer = json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "▁" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
    ] });
    for (tokenizer, after_special) in [
        (tokenizer(normalizer, Value::Null), "▁on"),
        (tokenizer(Value::Null, metaspace("always")), "▁on"),
        (tokenizer(Value::Null, metaspace("first")), "on"),
    ] {
        let pieces = |pieces: &[&str]| {
            let (tokens, differ) = tokenizer.encode_pieces(pieces).unwrap();
            let words = |ids: Vec<u32>| -> Vec<String> {
                ids.into_iter().map(|id| tokenizer.token(id).unwrap()).collect()
            };
            (tokens.into_iter().map(words).collect::<Vec<_>>(), differ)
        };
        assert_eq!(pieces(&["at", " on"]), (vec![vec!["▁at".into()], vec!["▁on".into()]], false));
        // In one, the space would belong to the word: a prompt ends with it all the same.
        let apart = vec![vec!["▁at".into(), "▁".into()], vec!["on".into()]];
        assert_eq!(pieces(&["at ", "on"]), (apart, true));
        let answer = ["▁", "c", "h", "at", "</s>"].map(str::to_owned).to_vec();
        let turns = vec![answer, vec![after_special.to_owned(), "▁at".into()]];
        assert_eq!(pieces(&["chat</s>", "on at"]), (turns, false));
    }
}

/// Transformers looks for it in the pipeline alone.
#[test]
fn a_saved_tokenizer_adds_bos_by_its_post_processor() {
    let config = json!({ "bos_token": "<|im_start|>", "add_bos_token": true });
    let tokenizer = Tokenizer::from_json(&file("chat-tiny/tokenizer.json"), Some(&config)).unwrap();
    let saved = tokenizers::Tokenizer::from_bytes(tokenizer.to_json().unwrap()).unwrap();
    let ids = |special| saved.encode_fast("a b", special).unwrap().get_ids().to_vec();
    assert_eq!(ids(true), [&[1], &ids(false)[..]].concat());
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    for tokenizer in [tiny(), Tokenizer::from_gguf(&vocabulary("smollm")).unwrap()] {
        let config = tokenizer.tokenizer_config();
        let again = Tokenizer::from_json(&tokenizer.to_json().unwrap(), Some(&config)).unwrap();
        let text = "<|im_start|>user\n  Grüße 123 🦀\n<|im_end|>";
        assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        assert_eq!((again.bos(), again.eos()), (tokenizer.bos(), tokenizer.eos()));
        assert_eq!(again.adds_bos(), tokenizer.adds_bos());
        assert_eq!(again.vocabulary_size(), tokenizer.vocabulary_size());
    }
}

#[test]
fn every_known_gguf_pre_tokenizer_decodes_what_it_encodes() {
    let llama3 = ["llama-bpe", "llama3", "llama-v3", "smaug-bpe"];
    for pre in ["gpt-2", "smollm", "qwen2", "deepseek-r1-qwen", "tekken"].into_iter().chain(llama3) {
        let tokenizer = Tokenizer::from_gguf(&vocabulary(pre)).unwrap();
        let text = "It's 2024,  a\n\n\tnew é🦀 year<|im_end|>";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{pre}");
        assert_eq!(ids.last(), Some(&2), "{pre}");
        assert_eq!(tokenizer.adds_bos(), pre.starts_with("llama") || pre == "tekken");
    }
}

/// SentencePiece joins by score and not by length, writes spaces as `▁`, one before the text too, and what it does not know
/// in bytes.
#[test]
fn a_sentencepiece_vocabulary_of_gguf_joins_by_score() {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "a", "b", "c", "bc", "ab", "▁a", "[X]"].map(str::to_owned);
    let tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).collect();
    let first = tokens.len() as u32;
    let [space, a, c, bc, ab, space_a, x] = [0, 1, 3, 4, 5, 6, 7].map(|i| first + i);
    let types = [vec![2, 3, 3], vec![6; 256], vec![1; 7], vec![4]].concat();
    let scores = [vec![0.0; 259], vec![-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, 0.0]].concat();
    let vocabulary = GgufVocabulary {
        model: "llama".into(),
        tokens: [tokens, pieces.to_vec()].concat(),
        token_types: types,
        scores,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        ..GgufVocabulary::default()
    };
    let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap();
    assert!(
        tokenizer.adds_bos()
            && tokenizer.is_special(0)
            && tokenizer.is_special(1)
            && !tokenizer.is_special(x)
    );
    for (text, ids) in [
        ("abc", vec![space_a, bc]),
        ("abab", vec![space, ab, ab]),
        ("a c", vec![space_a, space, c]),
        ("é", vec![space, 3 + 0xc3, 3 + 0xa9]),
        ("[X]a", vec![x, space_a]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text.replace("]a", "] a"), "{text}");
    }
    let bare = GgufVocabulary { add_space_prefix: Some(false), add_bos: Some(false), ..vocabulary };
    let tokenizer = Tokenizer::from_gguf(&bare).unwrap();
    assert_eq!((tokenizer.encode("a c").unwrap(), tokenizer.adds_bos()), (vec![a, space, c], false));
    assert_eq!(tokenizer.decode(&[space, a], false).unwrap(), " a");
}

#[test]
fn gguf_tokenizers_of_other_kinds_are_refused() {
    let error = |change: &dyn Fn(&mut GgufVocabulary)| {
        let mut vocabulary = vocabulary("gpt-2");
        change(&mut vocabulary);
        Tokenizer::from_gguf(&vocabulary).err().unwrap()
    };
    let unknown = error(&|vocabulary| vocabulary.pre = Some("falcon".into()));
    assert!(matches!(&unknown, Error::GgufTokenizer { found, .. } if found == "`falcon`"));
    assert!(unknown.hint().is_some());
    assert_eq!(
        error(&|vocabulary| vocabulary.model = "bert".into()).to_string(),
        "the GGUF tokenizer has `tokenizer.ggml.model` = `bert`, \
         expected `gpt2` (byte-level BPE) or `llama` (SentencePiece)"
    );
    let none = error(&|vocabulary| vocabulary.pre = None);
    assert!(none.to_string().contains("`tokenizer.ggml.pre` = nothing"), "{none}");
    let without_scores = error(&|vocabulary| vocabulary.model = "llama".into());
    assert!(matches!(without_scores, Error::GgufVocabulary { .. }));
    assert!(matches!(error(&|vocabulary| vocabulary.merges.push("x".into())), Error::GgufVocabulary { .. }));
    assert!(matches!(
        error(&|vocabulary| vocabulary.merges.push("no such".into())),
        Error::GgufVocabulary { .. }
    ));
    assert!(matches!(error(&|vocabulary| vocabulary.token_types.truncate(3)), Error::GgufVocabulary { .. }));
    assert!(matches!(error(&|vocabulary| vocabulary.tokens[9] = "a".into()), Error::GgufVocabulary { .. }));
}

#[test]
fn a_vocabulary_larger_than_the_model_is_an_error() {
    let mut tokenizer = tiny();
    let size = tokenizer.vocabulary_size();
    tokenizer.fit(size).unwrap();
    assert!(matches!(tokenizer.fit(size - 1), Err(Error::TooManyTokens { .. })));
}

#[test]
fn added_tokens_without_an_embedding_are_errors_where_they_are_written() {
    let json = file("chat-tiny/tokenizer.json");
    let size = tiny().vocabulary_size();
    let token = json!({ size.to_string(): { "content": "[X]", "special": true } });
    let config = |ends: &str| json!({ "added_tokens_decoder": token, "eos_token": ends });
    let mut tokenizer = Tokenizer::from_json(&json, Some(&config("<|im_end|>"))).unwrap();
    tokenizer.fit(size).unwrap();
    assert_eq!(tokenizer.encode("a b").unwrap(), tiny().encode("a b").unwrap());
    let error = tokenizer.encode("a [X] b").unwrap_err();
    assert!(matches!(&error, Error::NoEmbedding { token, .. } if token == "[X]"), "{error}");
    let mut tokenizer = Tokenizer::from_json(&json, Some(&config("[X]"))).unwrap();
    assert!(matches!(tokenizer.fit(size), Err(Error::NoEmbedding { .. })));
    tokenizer.fit(size + 1).unwrap();
}

#[test]
fn a_stream_yields_whole_characters() {
    let tokenizer = tiny();
    let text = "Grüße 👩‍👩‍👧 日本 ok";
    let mut stream = tokenizer.stream(false);
    let mut written = String::new();
    for token in tokenizer.encode(text).unwrap() {
        let piece = stream.push(token).unwrap();
        assert!(!piece.contains('\u{fffd}'));
        written.push_str(&piece);
    }
    written.push_str(&stream.finish().unwrap());
    assert_eq!(written, text);
    // Half a crab at the end is shown as broken, not lost.
    let mut stream = tokenizer.stream(false);
    let crab = tokenizer.encode("🦀").unwrap();
    assert_eq!(stream.push(crab[0]).unwrap(), "");
    assert!(stream.finish().unwrap().contains('\u{fffd}'));
}

/// Where bytes that the vocabulary lacks are tokens of their own, the decoder takes neighbouring ones together.
#[test]
fn a_stream_joins_bytes_that_are_tokens() {
    let bytes = (0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), json!(byte)));
    let words =
        ["▁", "o", "k"].into_iter().zip(256..).map(|(word, id): (&str, u32)| (word.to_owned(), json!(id)));
    let vocabulary: serde_json::Map<String, Value> = bytes.chain(words).collect();
    let json = json!({
        "version": "1.0", "added_tokens": [],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "byte_fallback": true, "vocab": vocabulary, "merges": [] },
    });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
    let written = |ids: &[u32]| {
        let mut stream = tokenizer.stream(false);
        let mut written: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        written.push_str(&stream.finish().unwrap());
        written
    };
    for text in ["王", "王试", "é王试阈東京 ok", "k王🦀🦀é🦀王试阈東京王o王", "ok 王 ok"]
    {
        assert_eq!(written(&tokenizer.encode(text).unwrap()), text);
    }
    // A character that breaks off takes nothing with it.
    let broken = [tokenizer.encode("王").unwrap(), vec![0xe8], tokenizer.encode("ok").unwrap()].concat();
    assert_eq!(written(&broken), "王\u{fffd}ok");
}

/// Behind special tokens, which are skipped, a word still is not the first one, whose space such decoders drop.
#[test]
fn a_stream_keeps_spaces_behind_special_tokens() {
    let json = json!({
        "version": "1.0",
        "added_tokens": [{ "id": 2, "content": "<|x|>", "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false }],
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "BPE", "vocab": { "▁cat": 0, "▁dog": 1, "<|x|>": 2 }, "merges": [] },
    });
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), None).unwrap();
    for specials in [0, 1, 4, 5, 9, 40] {
        let ids = [vec![0], vec![2; specials], vec![1, 0], vec![2; specials], vec![1]].concat();
        let mut stream = tokenizer.stream(true);
        let mut written: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        written.push_str(&stream.finish().unwrap());
        assert_eq!(written, tokenizer.decode(&ids, true).unwrap(), "{specials}");
        assert_eq!(written, "cat dog cat dog");
    }
}

#[test]
fn broken_files_are_errors() {
    for bytes in
        [&b""[..], b"{}", b"[1", b"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[\"a b\"]}}", b"\xff"]
    {
        assert!(matches!(Tokenizer::from_json(bytes, None), Err(Error::Tokenizer { .. })));
    }
    assert_eq!(tiny().decode(&[u32::MAX], false).unwrap(), "");
}

#[test]
fn steps_that_would_panic_or_allocate_without_bound_are_refused() {
    let hostile = [
        ("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "/////wAAAAA=" })),
        ("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ("normalizer", json!({ "type": "Replace", "pattern": { "String": "" }, "content": "x" })),
        (
            "normalizer",
            json!({ "type": "Sequence", "normalizers": [{ "type": "Replace", "pattern": { "Regex": "" }, "content": "x" }] }),
        ),
    ];
    for (part, step) in hostile {
        let mut tokenizer = json_file("chat-tiny/tokenizer.json");
        tokenizer[part] = step.clone();
        let read = Tokenizer::from_json(tokenizer.to_string().as_bytes(), None);
        assert!(matches!(read, Err(Error::Tokenizer { .. })), "{step}");
    }
}
