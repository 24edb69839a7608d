//! Files from strangers: each flaw is an error that names the file and the flaw, and nothing panics.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod checkpoint_files;

use std::path::Path;

use checkpoint_files::{Field, Gguf, fixture, folder, llama_config, open_gguf, refusal, safetensors};
use proptest::prelude::*;
use serde_json::{Value, json};
use temper::checkpoint;
use temper::model::Config;

/// Opens a folder whose `model.safetensors` holds these bytes.
fn open_weights(bytes: &[u8]) -> String {
    refusal(checkpoint::open(folder(&[("model.safetensors", bytes)]).path()))
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

#[test]
fn safetensors_that_end_too_early() {
    let whole = std::fs::read(fixture("llama-tiny/model.safetensors")).unwrap();
    for length in [whole.len() - 1, whole.len() / 2] {
        assert_says(&open_weights(&whole[..length]), &["model.safetensors", "length: expected"]);
    }
    assert_says(&open_weights(&whole[..100]), &["header length", "at most 92 in a file of 100 bytes"]);
    assert_says(&open_weights(&whole[..7]), &["at least 8 bytes, found 7 bytes"]);
    assert_says(&open_weights(b""), &["found 0 bytes"]);
}

#[test]
fn pointers_of_git_lfs_are_named_as_such() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for name in ["model.safetensors", "tokenizer.json"] {
        let folder = folder(&[("model.safetensors", &safetensors(&json!({}), 0)), (name, pointer)]);
        assert_says(&refusal(checkpoint::open(folder.path())), &[name, "pointer of Git LFS", "git lfs pull"]);
    }
    assert_says(&refusal(open_gguf(pointer)), &["pointer of Git LFS"]);
}

#[test]
fn safetensors_with_a_wrong_header() {
    assert_says(&open_weights(&[255; 16]), &["header length", "found 18446744073709551615"]);
    assert_says(&open_weights(b"\x02\0\0\0\0\0\0\0[]"), &["valid safetensors header"]);
    let entry =
        |begin: usize, end: usize| json!({"dtype": "F32", "shape": [2], "data_offsets": [begin, end]});
    let file = |a: Value, b: Value, bytes| safetensors(&json!({ "a": a, "b": b }), bytes);
    assert_says(&open_weights(&file(entry(0, 8), entry(4, 12), 12)), &["header", "invalid offset"]);
    assert_says(&open_weights(&file(entry(0, 8), entry(12, 20), 20)), &["header", "invalid offset"]);
    assert_says(&open_weights(&file(entry(0, 8), entry(8, 12), 12)), &["header", "invalid shape"]);
    assert_says(&open_weights(&file(entry(0, 8), entry(8, 16), 20)), &["16 of tensors"]);
    let huge = json!({ "dtype": "F32", "shape": [1u64 << 40, 1u64 << 40], "data_offsets": [0, 8] });
    assert_says(&open_weights(&safetensors(&json!({ "a": huge }), 8)), &["header", "overflow"]);
    let whole = json!({ "dtype": "I32", "shape": [2], "data_offsets": [0, 8] });
    assert_says(&open_weights(&safetensors(&json!({ "a": whole }), 8)), &["tensor `a`", "found I32"]);
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let weights = std::fs::read(fixture("llama-tiny/model.safetensors")).unwrap();
    let folder = folder(&[("model.safetensors", &weights)]);
    let checkpoint = checkpoint::open(folder.path()).unwrap();
    let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(5000).unwrap();
    let message = checkpoint.read("model.norm.weight").unwrap_err().to_string();
    assert_says(&message, &["cannot read", "model.safetensors"]);
    assert!(checkpoint.content_hash().is_err());
}

#[test]
fn shards_stay_in_their_folder() {
    for name in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b"] {
        let index = json!({ "weight_map": { "a": name } }).to_string();
        let folder = folder(&[("model.safetensors.index.json", index.as_bytes())]);
        let message = refusal(checkpoint::open(folder.path()));
        assert_says(&message, &["shard name", "a plain file name inside the folder"]);
    }
}

#[test]
fn an_index_must_be_true() {
    let open = |index: Value, shard: Option<&[u8]>| {
        let index = index.to_string();
        let mut files = vec![("model.safetensors.index.json", index.as_bytes())];
        files.extend(shard.map(|bytes| ("s.safetensors", bytes)));
        refusal(checkpoint::open(folder(&files).path()))
    };
    let map = |tensor: &str| json!({ "weight_map": { tensor: "s.safetensors" } });
    let empty = safetensors(&json!({}), 0);
    assert_says(&open(map("a"), Some(&empty)), &["index.json", "tensor `a`", "`s.safetensors`"]);
    assert_says(&open(map("a"), None), &["s.safetensors", "hint: check that"]);
    assert_says(&open(json!({}), None), &["`weight_map`", "found none"]);
}

#[test]
fn folders_that_are_no_checkpoints() {
    let open = |files: &[(&str, &[u8])]| {
        let folder = folder(files);
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        refusal(checkpoint::open(folder.path()))
    };
    assert_says(&open(&[]), &["expected a folder with `config.json`", "found a folder without"]);
    assert_says(&open(&[("model.gguf", b"")]), &["give the GGUF file itself", "model.gguf"]);
    assert_says(&open(&[("adapter_config.json", b"{}")]), &["adapter", "base model"]);
    let pickled = folder(&[("pytorch_model.bin", b"")]);
    assert_says(&refusal(checkpoint::open(pickled.path())), &["pickled", "save_pretrained"]);
    let missing = refusal(checkpoint::open(Path::new("/no/such/model")));
    assert_says(&missing, &["`/no/such/model` is no checkpoint", "found nothing", "hint: check that"]);
    let inside = refusal(checkpoint::open(&fixture("llama-tiny/model.safetensors")));
    assert_says(&inside, &["another file", "give the folder"]);
    let broken = folder(&[("config.json", b"{"), ("model.safetensors", b"")]);
    assert_says(&refusal(checkpoint::open(broken.path())), &["config.json", "not valid JSON"]);
}

/// The tiny GGUF file with `bytes` written at `at`.
fn patched(at: usize, bytes: &[u8]) -> String {
    let mut file = Gguf::tiny("llama").bytes();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    refusal(open_gguf(&file))
}

#[test]
fn gguf_with_wild_counts() {
    let wild = u64::MAX.to_le_bytes();
    assert_says(&patched(8, &wild), &["number of tensors", "found 18446744073709551615"]);
    assert_says(&patched(16, &wild), &["number of metadata keys", "bytes that are left"]);
    assert_says(&patched(24, &wild), &["metadata key", "bytes that are left"]);
    assert_says(&patched(24, &0u64.to_le_bytes()), &["metadata key", "1 to 65535 bytes"]);
    // Behind the first key: its type, then the length of its string.
    let key_end = 32 + "general.architecture".len();
    assert_says(&patched(key_end, &99u32.to_le_bytes()), &["general.architecture", "value type 99"]);
    assert_says(&patched(key_end + 4, &wild), &["general.architecture", "bytes that are left"]);
    let array: Vec<u8> = [&9u32.to_le_bytes()[..], &0u32.to_le_bytes(), &(1u64 << 40).to_le_bytes()].concat();
    assert_says(&patched(key_end, &array), &["number of elements", "general.architecture"]);
    let nested: Vec<u8> = [&9u32.to_le_bytes()[..], &9u32.to_le_bytes(), &1u64.to_le_bytes()].concat();
    assert_says(&patched(key_end, &nested), &["general.architecture", "value type 9"]);
}

#[test]
fn gguf_of_another_kind() {
    assert_says(&patched(0, b"GGML"), &["magic number", "`GGUF`"]);
    assert_says(&patched(4, &1u32.to_le_bytes()), &["version", "2 or 3", "found 1"]);
    assert_says(&patched(4, &3u32.to_be_bytes()), &["big-endian"]);
    assert_says(&refusal(Gguf::tiny("mamba").open()), &["general.architecture", "`llama`", "`mamba`"]);
    let mut split = Gguf::tiny("llama");
    split.field("split.count", Field::U32(3));
    assert_says(&refusal(split.open()), &["split.count", "expected `1`, found `3`"]);
    let mut merged = Gguf::tiny("llama");
    merged.field("split.count", Field::U32(0));
    merged.open().unwrap();
    let mut experts = Gguf::tiny("llama");
    experts.field("llama.expert_count", Field::U32(8));
    assert_says(&refusal(experts.open()), &["llama.expert_count", "expected `0`, found `8`"]);
    let mut unknown = Gguf::tiny("llama");
    unknown.field("llama.logit_scale", Field::F32(0.5));
    assert_says(&refusal(unknown.open()), &["llama.logit_scale", "temper does not know it"]);
}

#[test]
fn gguf_with_wrong_tensors() {
    let with = |name: &str, dimensions: &[u64], kind: u32, bytes: usize| {
        let mut gguf = Gguf::tiny("llama");
        gguf.tensors.push((name.into(), dimensions.to_vec(), kind, vec![0; bytes]));
        refusal(gguf.open())
    };
    assert_says(&with("blk.0.attn_z.weight", &[1], 0, 4), &["attn_z", "a name of the architecture"]);
    assert_says(&with("blk.00.attn_q.weight", &[1], 0, 4), &["blk.00", "a name of the architecture"]);
    assert_says(&with("token_embd.weight", &[1], 0, 4), &["token_embd.weight", "a second one"]);
    assert_says(
        &with("output.weight", &[1], 16, 4),
        &["output.weight", "F32, F16", "an IQ type (number 16)"],
    );
    assert_says(&with("output.weight", &[33], 8, 68), &["whole blocks of 32 values", "[33]"]);
    assert_says(&with("output.weight", &[0], 0, 0), &["dimensions of at least 1"]);
    assert_says(&with("output.weight", &[], 0, 4), &["1 to 4 dimensions", "found 0"]);
    assert_says(&with("output.weight", &[u64::MAX, u64::MAX], 0, 0), &["output.weight"]);
    assert_says(&with("output.weight", &[1 << 20], 0, 4), &["place of tensor", "inside the file's"]);
    assert_says(&with("blk.0.attn_q.weight", &[8, 7], 0, 224), &["two halves of 2 heads"]);
}

#[test]
fn gguf_tensors_may_not_overlap() {
    let mut gguf = Gguf::tiny("llama");
    gguf.f32("output.weight", &[8, 6]);
    let mut bytes = gguf.bytes();
    let name = bytes.windows(13).position(|window| window == b"output.weight").unwrap();
    // Behind the name: number of dimensions, two dimensions, type, offset.
    let offset = name + 13 + 4 + 16 + 4;
    bytes[offset..offset + 8].copy_from_slice(&32u64.to_le_bytes());
    assert_says(&refusal(open_gguf(&bytes)), &["output.weight", "after the end of `token_embd.weight`"]);
    bytes[offset..offset + 8].copy_from_slice(&33u64.to_le_bytes());
    assert_says(&refusal(open_gguf(&bytes)), &["output.weight", "a multiple of 32, found 33"]);
    bytes[offset..offset + 8].copy_from_slice(&(u64::MAX - 31).to_le_bytes());
    assert_says(&refusal(open_gguf(&bytes)), &["output.weight", "inside the file's"]);
}

#[test]
fn gguf_vocabularies_fit_their_model() {
    let with = |count: usize, eos: u32| {
        let mut gguf = Gguf::tiny("llama");
        gguf.field("tokenizer.ggml.model", Field::Text("gpt2"));
        gguf.field("tokenizer.ggml.tokens", Field::Texts(vec!["t".into(); count]));
        gguf.field("tokenizer.ggml.eos_token_id", Field::U32(eos));
        refusal(gguf.open())
    };
    assert_says(&with(7, 0), &["tokenizer.ggml.tokens", "1 to 6 tokens", "found 7"]);
    assert_says(&with(5, 5), &["eos_token_id", "one of 5 tokens", "found `5`"]);
}

/// What [`Config::from_json`] says to the tiny config with these changes.
fn config_error(changes: &Value) -> String {
    let mut config = llama_config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    Config::from_json(&config).unwrap_err().to_string()
}

#[test]
fn configs_that_ask_for_something_else() {
    for (changes, key) in [
        (json!({ "num_attention_heads": 0 }), "num_attention_heads"),
        (json!({ "num_attention_heads": 3 }), "num_attention_heads"),
        (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
        (json!({ "head_dim": 3 }), "head_dim"),
        (json!({ "hidden_size": -8 }), "hidden_size"),
        (json!({ "hidden_size": 8.5 }), "hidden_size"),
        (json!({ "vocab_size": u64::MAX }), "vocab_size"),
        (json!({ "vocab_size": null }), "vocab_size"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "model_type": "mamba" }), "model_type"),
        (json!({ "frobnicate": 1 }), "frobnicate"),
        (json!({ "quantization_config": { "bits": 4 } }), "quantization_config"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (json!({ "rms_norm_eps": 0 }), "rms_norm_eps"),
        (json!({ "attention_dropout": 1.0 }), "attention_dropout"),
        (json!({ "rope_scaling": { "type": "yarn", "factor": 2.0 } }), "rope_scaling.type"),
        (json!({ "rope_scaling": { "type": "linear" } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": { "type": "linear", "rope_type": "llama3" } }), "rope_scaling.type"),
        (json!({ "rope_parameters": { "rope_type": "dynamic" } }), "rope_parameters.rope_type"),
        (json!({ "rope_parameters": { "extra": 1 } }), "rope_parameters.extra"),
        (
            json!({ "rope_theta": 1e4, "rope_parameters": { "rope_theta": 1e5 } }),
            "rope_parameters.rope_theta",
        ),
        (json!({ "layer_types": ["sliding_attention"] }), "layer_types"),
        (json!({ "layer_types": [] }), "layer_types"),
        (json!({ "eos_token_id": "</s>" }), "eos_token_id"),
        (json!({ "bos_token_id": [1, 2] }), "bos_token_id"),
        (json!({ "sliding_window": 4 }), "sliding_window"),
        (json!({ "model_type": "mistral" }), "num_key_value_heads"),
    ] {
        assert_says(&config_error(&changes), &[&format!("config key `{key}`: expected ")]);
    }
    let huge = 1 << 24;
    // Each layer would have names before any of its tensors is missed.
    assert_says(&config_error(&json!({ "num_hidden_layers": huge })), &["at most 4096 layers"]);
    let changes = json!({
        "vocab_size": huge, "hidden_size": huge, "intermediate_size": huge, "num_hidden_layers": 4096,
        "num_attention_heads": huge, "head_dim": huge, "max_position_embeddings": huge,
    });
    assert_says(&config_error(&changes), &["parameters fit in memory"]);
}

#[test]
fn configs_of_gpt2_that_ask_for_something_else() {
    let good = json!({ "model_type": "gpt2", "vocab_size": 6, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4 });
    assert!(Config::from_json(&good).unwrap().tied);
    for (key, value) in [
        ("activation_function", json!("relu")),
        ("scale_attn_weights", json!(false)),
        ("scale_attn_by_inverse_layer_idx", json!(true)),
        ("reorder_and_upcast_attn", json!(true)),
        ("add_cross_attention", json!(true)),
        ("n_ctx", json!(5)),
        ("n_head", json!(3)),
        ("resid_pdrop", json!(-0.1)),
        ("hidden_act", json!("silu")),
    ] {
        let mut config = good.clone();
        config[key] = value;
        let message = Config::from_json(&config).unwrap_err().to_string();
        assert_says(&message, &[&format!("config key `{key}`: expected ")]);
    }
}

/// The windows of four layers and which of them know positions, or what is wrong.
fn layers(model_type: &str, changes: &Value) -> Result<(Vec<Option<usize>>, Vec<bool>), String> {
    let mut config = llama_config();
    config["model_type"] = model_type.into();
    config["num_key_value_heads"] = 2.into();
    config["num_hidden_layers"] = 4.into();
    config["sliding_window"] = 7.into();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config = Config::from_json(&config).map_err(|error| error.to_string())?;
    Ok(config.layers.iter().map(|layer| (layer.window, layer.rotary.is_some())).unzip())
}

/// As gemma-3-1b-it says it, made small.
#[test]
fn configs_of_gemma3_that_ask_for_something_else() {
    let good = json!({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 5], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 8, "initializer_range": 0.02,
        "intermediate_size": 12, "max_position_embeddings": 64, "model_type": "gemma3_text",
        "num_attention_heads": 2, "num_hidden_layers": 7, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 5, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 6,
    });
    let config = Config::from_json(&good).unwrap();
    let windows: Vec<Option<usize>> = config.layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows, [Some(5), Some(5), Some(5), Some(5), Some(5), None, Some(5)]);
    assert_eq!((config.tied, config.embedding_scale), (true, 8f64.sqrt()));
    // What these keys say is also what their absence says.
    let mut short = good.clone();
    for key in [
        "head_dim",
        "hidden_activation",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "rope_theta",
        "sliding_window_pattern",
    ] {
        short.as_object_mut().unwrap().remove(key);
    }
    assert_eq!(Config::from_json(&short).unwrap(), config);
    for (key, value) in [
        ("attn_logit_softcapping", json!(50.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("hidden_activation", json!("silu")),
        ("hidden_act", json!("silu")),
        ("query_pre_attn_scalar", json!(168)),
        ("sliding_window", json!(null)),
        ("sliding_window_pattern", json!(0)),
        ("use_bidirectional_attention", json!(true)),
        ("rope_local_base_freq", json!(-1)),
    ] {
        let mut config = good.clone();
        config[key] = value;
        let message = Config::from_json(&config).unwrap_err().to_string();
        assert_says(&message, &[&format!("config key `{key}`: expected ")]);
    }
    let mut nested = good.clone();
    nested["rope_parameters"] = json!({ "full_attention": { "rope_theta": 1e6, "extra": 1 } });
    let message = Config::from_json(&nested).unwrap_err().to_string();
    assert_says(&message, &["`rope_parameters.full_attention.extra`"]);
    nested["rope_parameters"] = json!({ "full_attention": { "rope_theta": 2e6 } });
    nested["rope_theta"] = 1e6.into();
    let message = Config::from_json(&nested).unwrap_err().to_string();
    assert_says(&message, &["`rope_parameters.full_attention.rope_theta`: expected `1000000`"]);
    // Every layer sees everything: no window is needed.
    let mut full = good;
    (full["sliding_window"], full["sliding_window_pattern"]) = (json!(null), 1.into());
    assert!(Config::from_json(&full).unwrap().layers.iter().all(|layer| layer.window.is_none()));
}

#[test]
fn windows_of_some_layers() {
    let windows = |model_type: &str, changes: Value| layers(model_type, &changes).map(|(windows, _)| windows);
    let (w, used) = (Some(7), |full: u64| json!({ "use_sliding_window": true, "max_window_layers": full }));
    assert_eq!(windows("qwen2", json!({})), Ok(vec![None; 4]));
    assert_eq!(windows("qwen2", used(4)), Ok(vec![None; 4]));
    assert_eq!(windows("qwen2", used(0)), Ok(vec![w; 4]));
    assert_eq!(windows("qwen3", used(3)), Ok(vec![None, None, None, w]));
    let types = |kinds: [&str; 4]| json!({ "use_sliding_window": true, "layer_types": kinds });
    let [full, sliding] = ["full_attention", "sliding_attention"];
    assert_eq!(windows("qwen2", types([sliding, full, sliding, full])), Ok(vec![w, None, w, None]));
    assert_eq!(windows("qwen2", types([full; 4])), Ok(vec![None; 4]));
    assert_says(&windows("qwen2", types(["chunked_attention"; 4])).unwrap_err(), &["`layer_types`"]);
    let unused = json!({ "layer_types": [full, full, full, sliding] });
    assert_says(&windows("qwen2", unused).unwrap_err(), &["as `use_sliding_window` gives no window"]);
    // Mistral slides in every layer.
    assert_eq!(windows("mistral", json!({})), Ok(vec![w; 4]));
    let some = json!({ "layer_types": [sliding, sliding, sliding, full] });
    assert_says(&windows("mistral", some).unwrap_err(), &["as there is a window"]);
}

#[test]
fn layers_without_positions() {
    let rotary = |changes: Value| layers("smollm3", &changes);
    assert_eq!(rotary(json!({})), Ok((vec![None; 4], vec![true, true, true, false])));
    let every_other = json!({ "no_rope_layer_interval": 2 });
    assert_eq!(rotary(every_other), Ok((vec![None; 4], vec![true, false, true, false])));
    // What the published model says: the list counts, and a window there is where positions are not.
    let listed = json!({
        "no_rope_layers": [0, 1, 1, 0, 1], "no_rope_layer_interval": 4, "use_sliding_window": true, "max_window_layers": 28,
    });
    assert_eq!(rotary(listed), Ok((vec![Some(7), None, None, Some(7)], vec![false, true, true, false])));
    for wrong in [json!([1, 1, 1]), json!([1, 1, 2, 1]), json!(4)] {
        assert_says(
            &rotary(json!({ "no_rope_layers": wrong })).unwrap_err(),
            &["0 or 1 for each of 4 layers"],
        );
    }
    assert_says(&rotary(json!({ "no_rope_layer_interval": 0 })).unwrap_err(), &["`no_rope_layer_interval`"]);
    assert_says(
        &layers("llama", &json!({ "sliding_window": null, "no_rope_layers": [1, 1, 1, 1] })).unwrap_err(),
        &["`no_rope_layers`"],
    );
}

/// Opens what may be a checkpoint and reads all of it, errors welcome.
fn read_all(path: &Path) {
    if let Ok(checkpoint) = checkpoint::open(path) {
        let _ = Config::from_json(&checkpoint.config);
        for (name, shape) in checkpoint.tensors() {
            if let Ok(values) = checkpoint.read(name) {
                assert_eq!(values.len(), shape.iter().product::<usize>());
            }
        }
    }
}

/// Up to four bytes of a file changed, then its end cut off.
fn damaged(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = original.len();
    // Flaws in the head, where the structure is, are the interesting ones.
    let place = prop_oneof![0..length.min(900), 0..length];
    (prop::collection::vec((place, any::<u8>()), 0..4), prop_oneof![Just(length), 0..length]).prop_map(
        move |(changes, end)| {
            let mut bytes = original.clone();
            for (place, byte) in changes {
                bytes[place] = byte;
            }
            bytes.truncate(end);
            bytes
        },
    )
}

fn whole_gguf() -> Vec<u8> {
    let mut gguf = Gguf::tiny("llama");
    gguf.field("tokenizer.ggml.model", Field::Text("gpt2"));
    gguf.field("tokenizer.ggml.tokens", Field::Texts((0..6).map(|i| format!("t{i}")).collect()));
    gguf.f32("blk.0.attn_q.weight", &[8, 8]);
    gguf.tensors.push(("output.weight".into(), vec![256, 1], 14, vec![7; 210]));
    gguf.bytes()
}

fn whole_safetensors() -> Vec<u8> {
    let tensor = json!({ "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] });
    let half = json!({ "dtype": "BF16", "shape": [4], "data_offsets": [24, 32] });
    safetensors(&json!({ "model.a": tensor, "lm_head.weight": half }), 32)
}

proptest! {
    #[test]
    fn damaged_gguf_never_panics(bytes in damaged(whole_gguf())) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        read_all(&path);
    }

    #[test]
    fn damaged_safetensors_never_panic(bytes in damaged(whole_safetensors())) {
        read_all(folder(&[("model.safetensors", &bytes)]).path());
    }

    #[test]
    fn damaged_configs_never_panic(bytes in damaged(llama_config().to_string().into_bytes())) {
        let weights = whole_safetensors();
        read_all(folder(&[("config.json", &bytes), ("model.safetensors", &weights)]).path());
    }
}
