//! Checkpoints that are as they should be: the committed models, both formats of one model, and GGUF's
//! number formats against ggml's own decoding.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod checkpoint_files;

use std::collections::BTreeSet;

use checkpoint_files::{Field, Gguf, fixture, folder, open_gguf, refusal, safetensors};
use serde_json::{Value, json};
use temper::checkpoint::{self, Checkpoint, Format, TokenizerFiles};
use temper::model::Config;
use temper::model::config::Family;
use temper::model::layers::Layer;
use temper::model::rotary::{RopeScaling, Rotary};

fn names(checkpoint: &Checkpoint) -> BTreeSet<String> {
    checkpoint.tensors().map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn every_committed_model_opens() {
    let models = [
        ("gpt2-tiny", Family::Gpt2),
        ("gpt2-hub", Family::Gpt2),
        ("llama-tiny", Family::Llama),
        ("llama3-tiny", Family::Llama),
        ("llama-linear", Family::Llama),
        ("bf16-tiny", Family::Llama),
        ("f16-tiny", Family::Llama),
        ("mistral-tiny", Family::Mistral),
        ("qwen2-tiny", Family::Qwen2),
        ("qwen3-tiny", Family::Qwen3),
        ("smollm3-tiny", Family::SmolLm3),
        ("gemma3-tiny", Family::Gemma3),
    ];
    for (name, family) in models {
        let checkpoint = checkpoint::open(&fixture(name)).unwrap();
        let config = Config::from_json(&checkpoint.config).unwrap();
        assert_eq!((config.family, config.vocabulary), (family, 96), "{name}");
        assert_eq!(Config::from_json(&config.to_json(&checkpoint.config)).unwrap(), config, "{name}");
        assert_eq!(checkpoint.contains("lm_head.weight"), !config.tied, "{name}");
        for (tensor, shape) in checkpoint.tensors() {
            let values = checkpoint.read(tensor).unwrap();
            assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}: {tensor}");
            assert!(values.iter().all(|value| value.is_finite()), "{name}: {tensor}");
        }
    }
}

#[test]
fn configs_say_what_the_models_are() {
    let config = |name| Config::from_json(&checkpoint::open(&fixture(name)).unwrap().config).unwrap();
    let layer = |window: Option<usize>, theta: Option<f64>| {
        let rotary = theta.map(|theta| Rotary { theta, scaling: RopeScaling::None });
        Layer { window, rotary }
    };
    assert_eq!(config("mistral-tiny").layers, [layer(Some(5), Some(1e4)); 2]);
    let [turned, unturned] = [layer(None, Some(2e6)), layer(Some(5), None)];
    assert_eq!(config("smollm3-tiny").layers, [turned, unturned, turned, unturned]);
    let scaling = RopeScaling::Linear { factor: 4.0 };
    let full = Layer { window: None, rotary: Some(Rotary { theta: 1e6, scaling }) };
    let local = layer(Some(5), Some(1e4));
    assert_eq!(config("gemma3-tiny").layers, [local, local, full, local]);
    // As the published ones say it.
    let mut hub = checkpoint::open(&fixture("gemma3-tiny")).unwrap().config;
    hub.as_object_mut().unwrap().remove("rope_parameters");
    hub.as_object_mut().unwrap().remove("layer_types");
    hub["rope_theta"] = 1e6.into();
    hub["rope_local_base_freq"] = 1e4.into();
    hub["rope_scaling"] = json!({ "rope_type": "linear", "factor": 4.0 });
    hub["sliding_window_pattern"] = 3.into();
    assert_eq!(Config::from_json(&hub).unwrap(), config("gemma3-tiny"));
    assert_eq!(config("qwen3-tiny").head_width, 16);
    assert!(config("qwen3-tiny").qk_norm);
    assert!(config("qwen2-tiny").qkv_bias && !config("qwen2-tiny").output_bias);
    assert_eq!(config("llama-tiny").eos, [95]);
    let scaling = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(config("llama-linear").rotaries(), [Rotary { theta: 10_000.0, scaling }]);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_context: 16,
    };
    assert_eq!(config("llama3-tiny").rotaries(), [Rotary { theta: 500_000.0, scaling }]);
}

#[test]
fn old_names_and_buffers_are_put_right() {
    let hub = checkpoint::open(&fixture("gpt2-hub")).unwrap();
    assert_eq!(names(&hub), names(&checkpoint::open(&fixture("gpt2-tiny")).unwrap()));
    let sharded = checkpoint::open(&fixture("llama-linear")).unwrap();
    assert_eq!(names(&sharded), names(&checkpoint::open(&fixture("llama-tiny")).unwrap()));
}

#[test]
fn a_gguf_file_is_the_folder_it_was_made_from() {
    let gguf = checkpoint::open(&fixture("gguf/llama.gguf")).unwrap();
    let folder = checkpoint::open(&fixture("gguf/llama-f32")).unwrap();
    assert_eq!(gguf.format, Format::Gguf { version: 3 });
    assert_eq!(Config::from_json(&gguf.config).unwrap(), Config::from_json(&folder.config).unwrap());
    assert_eq!(names(&gguf), names(&folder));
    for (name, shape) in folder.tensors() {
        assert_eq!(gguf.shape(name), Some(shape), "{name}");
        assert_eq!(gguf.read(name).unwrap(), folder.read(name).unwrap(), "{name}");
    }
    let TokenizerFiles::Gguf(vocabulary) = &gguf.tokenizer else { panic!("no vocabulary") };
    assert_eq!(vocabulary.tokens.len(), 400);
    assert_eq!((vocabulary.bos, vocabulary.eos), (Some(1), Some(2)));
}

#[test]
fn blocks_decode_as_ggml_decodes_them() {
    let cases: Value = serde_json::from_slice(&std::fs::read(fixture("gguf/quant.json")).unwrap()).unwrap();
    let mut seen = BTreeSet::new();
    for case in cases.as_array().unwrap() {
        let hex = case["bytes"].as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let expected: Vec<f32> =
            case["values"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
        let mut gguf = Gguf::tiny("llama");
        let kind = case["ggml_type"].as_u64().unwrap() as u32;
        gguf.tensors = vec![("token_embd.weight".into(), vec![expected.len() as u64, 1], kind, bytes)];
        let found = gguf.open().unwrap().read("model.embed_tokens.weight").unwrap();
        assert_eq!(found, expected, "{}", case["type"]);
        seen.insert(case["type"].as_str().unwrap().to_owned());
    }
    for kind in [
        "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "IQ4_NL", "IQ4_XS",
    ] {
        assert!(seen.contains(kind), "no case for {kind}");
    }
}

#[test]
fn rows_of_llama_heads_come_back_in_halves() {
    for architecture in ["llama", "smollm3"] {
        let mut gguf = Gguf::tiny(architecture);
        gguf.f32("blk.0.attn_q.weight", &[1, 8]);
        gguf.f32("blk.0.attn_k.weight", &[1, 4]);
        let llama = gguf.open().unwrap();
        let read = |name| llama.read(&format!("model.layers.0.self_attn.{name}.weight")).unwrap();
        // In the file each head alternates between its halves: rows 0, 2 | 1, 3.
        assert_eq!(read("q_proj"), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0], "{architecture}");
        assert_eq!(read("k_proj"), [0.0, 2.0, 1.0, 3.0], "{architecture}");
    }
    let mut gguf = Gguf::tiny("qwen2");
    gguf.f32("blk.0.attn_k.weight", &[1, 4]);
    let qwen = gguf.open().unwrap();
    assert_eq!(qwen.read("model.layers.0.self_attn.k_proj.weight").unwrap(), [0.0, 1.0, 2.0, 3.0]);
}

/// gemma3-tiny's tensors under llama.cpp's names, norms larger by one, are gemma3-tiny.
#[test]
fn a_gguf_gemma3_is_the_folder_it_was_made_from() {
    let folder = checkpoint::open(&fixture("gemma3-tiny")).unwrap();
    let mut gguf = Gguf::default();
    gguf.field("general.architecture", Field::Text("gemma3"));
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 56),
        ("block_count", 4),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 8),
        ("attention.value_length", 8),
        ("attention.sliding_window", 5),
        ("attention.sliding_window_pattern", 3),
    ] {
        gguf.field(&format!("gemma3.{key}"), Field::U32(value));
    }
    gguf.field("gemma3.rope.freq_base", Field::F32(1e6));
    gguf.field("gemma3.rope.scaling.type", Field::Text("linear"));
    gguf.field("gemma3.rope.scaling.factor", Field::F32(4.0));
    for (name, shape) in folder.tensors() {
        let added = if name.contains("norm") { 1.0 } else { 0.0 };
        let values = folder.read(name).unwrap();
        let bytes = values.iter().flat_map(|value| (value + added).to_le_bytes()).collect();
        let mut theirs = name.to_owned();
        for (ours, llama_cpp) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("model.layers", "blk"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
        ] {
            theirs = theirs.replace(ours, llama_cpp);
        }
        let dimensions = shape.iter().rev().map(|&size| size as u64).collect();
        gguf.tensors.push((theirs, dimensions, 0, bytes));
    }
    let gguf = gguf.open().unwrap();
    let config = Config::from_json(&gguf.config).unwrap();
    let expected = Config::from_json(&folder.config).unwrap();
    assert_eq!(config.layers, expected.layers);
    assert_eq!((config.family, config.head_width, config.tied), (Family::Gemma3, 8, true));
    assert_eq!(names(&gguf), names(&folder));
    for (name, _) in folder.tensors() {
        for (found, expected) in gguf.read(name).unwrap().iter().zip(folder.read(name).unwrap()) {
            assert!((found - expected).abs() < 2e-7, "{name}: {found} for {expected}");
        }
    }
}

#[test]
fn a_gguf_gemma3_may_lack_a_window_and_not_be_the_largest() {
    let with = |layers: u32| {
        let mut gguf = Gguf::tiny("gemma3");
        let count = gguf.fields.iter_mut().find(|(key, _)| key == "gemma3.block_count");
        count.unwrap().1 = Field::U32(layers);
        gguf.open()
    };
    let config = Config::from_json(&with(8).unwrap().config).unwrap();
    assert!(config.layers.iter().all(|layer| layer.window.is_none()));
    assert!(refusal(with(62)).contains("`gemma3.block_count`: expected fewer layers"));
}

#[test]
fn a_gguf_smollm3_turns_three_of_four_layers() {
    let mut gguf = Gguf::tiny("smollm3");
    let layers = gguf.fields.iter_mut().find(|(key, _)| key == "smollm3.block_count");
    layers.unwrap().1 = Field::U32(8);
    let config = Config::from_json(&gguf.open().unwrap().config).unwrap();
    let unturned: Vec<usize> = (0..8).filter(|&layer| config.layers[layer].rotary.is_none()).collect();
    assert_eq!(unturned, [3, 7]);
}

#[test]
fn gpt2_matrices_come_back_with_inputs_in_rows() {
    let mut gguf = Gguf::tiny("gpt2");
    gguf.f32("blk.0.attn_output.weight", &[3, 2]);
    gguf.f32("output.weight", &[8, 6]);
    let gpt2 = gguf.open().unwrap();
    let name = "transformer.h.0.attn.c_proj.weight";
    assert_eq!(gpt2.shape(name).unwrap(), [3, 2]);
    assert_eq!(gpt2.read(name).unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    // The head repeats the embedding, as older converters wrote it.
    assert!(!gpt2.contains("lm_head.weight"));
    assert!(Config::from_json(&gpt2.config).unwrap().tied);
}

#[test]
fn llama3_scaling_is_found_in_its_factors() {
    let factors = |theta: f64, factor: f64, context: f64| -> Vec<u8> {
        let divisor = |i: usize| {
            let turns = context / (std::f64::consts::TAU * theta.powf(i as f64 / 32.0));
            let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        (0..32).flat_map(|i| (divisor(i) as f32).to_le_bytes()).collect()
    };
    let with = |bytes: Vec<u8>| {
        let mut gguf = Gguf::tiny("llama");
        gguf.field("llama.attention.key_length", Field::U32(64));
        gguf.field("llama.rope.freq_base", Field::F32(500_000.0));
        gguf.tensors.push(("rope_freqs.weight".into(), vec![32], 0, bytes));
        gguf.open()
    };
    for (factor, original_context) in [(8.0, 8192), (32.0, 8192), (32.0, 16)] {
        let checkpoint = with(factors(500_000.0, factor, original_context as f64)).unwrap();
        let scaling = RopeScaling::Llama3 {
            factor,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context,
        };
        let config = Config::from_json(&checkpoint.config).unwrap();
        assert_eq!(config.rotaries(), [Rotary { theta: 500_000.0, scaling }]);
        assert!(!checkpoint.contains("rope_freqs.weight"));
    }
    let mut wrong = factors(500_000.0, 8.0, 8192.0);
    wrong[0..4].copy_from_slice(&1.01f32.to_le_bytes());
    assert!(refusal(with(wrong)).contains("the factors of Llama 3's formula"));
}

#[test]
fn the_end_of_a_turn_ends_an_answer() {
    let mut gguf = Gguf::tiny("llama");
    gguf.field("tokenizer.ggml.model", Field::Text("gpt2"));
    gguf.field("tokenizer.ggml.tokens", Field::Texts((0..6).map(|i| format!("t{i}")).collect()));
    gguf.field("tokenizer.ggml.eos_token_id", Field::U32(2));
    gguf.field("tokenizer.ggml.eot_token_id", Field::U32(4));
    let checkpoint = gguf.open().unwrap();
    assert_eq!(checkpoint.config["eos_token_id"], 2);
    assert_eq!(checkpoint.generation_config.unwrap()["eos_token_id"], json!([2, 4]));
}

#[test]
fn a_head_in_a_tied_folder_must_repeat_the_embedding() {
    let header = json!({
        "model.embed_tokens.weight": { "dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8] },
        "lm_head.weight": { "dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16] },
    });
    let mut weights = safetensors(&header, 16);
    let mut config = checkpoint_files::llama_config();
    config["tie_word_embeddings"] = true.into();
    let open = |weights: &[u8]| {
        let config = config.to_string();
        checkpoint::open(folder(&[("config.json", config.as_bytes()), ("model.safetensors", weights)]).path())
    };
    assert!(refusal(open(&weights)).contains("a copy of `model.embed_tokens.weight`"));
    let start = weights.len() - 16;
    weights.copy_within(start..start + 8, start + 8);
    assert_eq!(names(&open(&weights).unwrap()).len(), 1);
}

#[test]
fn a_head_alone_is_a_tied_models_embedding() {
    let header = json!({ "lm_head.weight": { "dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8] } });
    let mut config = checkpoint_files::llama_config();
    config["tie_word_embeddings"] = true.into();
    let (config, weights) = (config.to_string(), safetensors(&header, 8));
    let folder = folder(&[("config.json", config.as_bytes()), ("model.safetensors", &weights)]);
    let found = checkpoint::open(folder.path()).unwrap();
    assert_eq!(names(&found), BTreeSet::from(["model.embed_tokens.weight".to_owned()]));
}

#[test]
fn older_folders_name_special_tokens_in_a_file_of_their_own() {
    let config = json!({ "bos_token": "<s>", "eos_token": null }).to_string();
    let older = json!({ "bos_token": "<b>", "eos_token": { "content": "</s>" } }).to_string();
    let weights = safetensors(&json!({}), 0);
    let llama = checkpoint_files::llama_config().to_string();
    let mut files = vec![
        ("config.json", llama.as_bytes()),
        ("model.safetensors", weights.as_slice()),
        ("tokenizer.json", b"{}".as_slice()),
        ("special_tokens_map.json", older.as_bytes()),
    ];
    let read = |files: &[(&str, &[u8])]| match checkpoint::open(folder(files).path()).unwrap().tokenizer {
        TokenizerFiles::HuggingFace { tokenizer_config, .. } => tokenizer_config.unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&files)["bos_token"], "<b>");
    files.push(("tokenizer_config.json", config.as_bytes()));
    assert_eq!(read(&files), json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" } }));
}

#[test]
fn a_template_file_wins_over_the_tokenizer_config() {
    let weights = safetensors(&json!({}), 0);
    let template = |files: &[(&str, &str)]| {
        let mut all = vec![("model.safetensors", weights.as_slice()), ("tokenizer.json", b"{}".as_slice())];
        all.extend(files.iter().map(|(name, text)| (*name, text.as_bytes())));
        match checkpoint::open(folder(&all).path()).unwrap().tokenizer {
            TokenizerFiles::HuggingFace { chat_template, .. } => chat_template,
            other => panic!("{other:?}"),
        }
    };
    let named =
        json!({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]});
    let named = named.to_string();
    assert_eq!(template(&[]), None);
    assert_eq!(template(&[("tokenizer_config.json", r#"{"chat_template":"c"}"#)]).unwrap(), "c");
    assert_eq!(template(&[("tokenizer_config.json", &named)]).unwrap(), "d");
    assert_eq!(template(&[("tokenizer_config.json", &named), ("chat_template.jinja", "f")]).unwrap(), "f");
}

#[test]
fn the_hash_knows_every_bit() {
    let gguf = Gguf::tiny("llama").bytes();
    let hash = |bytes: &[u8]| open_gguf(bytes).unwrap().content_hash().unwrap();
    let mut other = gguf.clone();
    *other.last_mut().unwrap() ^= 1;
    assert_eq!(hash(&gguf), hash(&gguf));
    assert_ne!(hash(&gguf), hash(&other));
    assert_eq!(hash(&gguf).len(), 64);
}
