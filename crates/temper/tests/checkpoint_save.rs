//! What is saved is what is opened again; what fails leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod checkpoint_files;

use std::path::Path;
use std::{io, iter};

use checkpoint_files::{fixture, llama_config};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};
use temper::checkpoint::save::{self, ModelFiles, SaveType, SavedTensor, TokenizerToSave};
use temper::checkpoint::{self, Error, TokenizerFiles};
use temper::model::Config;

/// Saves a model whose tokenizer is a stub.
fn save(path: &Path, tensors: &[SavedTensor], save_type: SaveType) -> Result<(), Error> {
    let config = llama_config();
    let generation_config = json!({ "eos_token_id": 2 });
    let files = ModelFiles {
        config: &config,
        generation_config: Some(&generation_config),
        tokenizer: TokenizerToSave { json: b"{}", config: &json!({ "chat_template": "template" }) },
    };
    save::create_folder(path, |folder| save::write_model(folder, files, tensors, save_type))
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

proptest! {
    #[test]
    fn what_is_saved_is_what_is_opened(
        shapes in prop::collection::vec(prop::collection::vec(0usize..5, 0..4), 0..5),
        bits in prop::collection::vec(any::<u32>(), 64),
        save_type in prop::sample::select(vec![SaveType::F32, SaveType::F16, SaveType::BF16]),
    ) {
        let kept = |value: f32| match save_type {
            SaveType::F32 => value,
            SaveType::F16 => f16::from_f32(value).to_f32(),
            SaveType::BF16 => bf16::from_f32(value).to_f32(),
        };
        // Any bits, but a number that the type can hold.
        let value = |bits: u32| {
            let value = f32::from_bits(bits);
            if kept(value).is_finite() { value } else { (bits % 60_000) as f32 }
        };
        let values: Vec<Vec<f32>> = shapes
            .iter()
            .map(|shape| bits.iter().copied().map(value).take(shape.iter().product()).collect())
            .collect();
        let tensors: Vec<SavedTensor> = shapes
            .iter()
            .zip(&values)
            .enumerate()
            .map(|(i, (shape, values))| SavedTensor::borrowed(format!("model.t{i}"), shape, values))
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        save(&path, &tensors, save_type).unwrap();
        let opened = checkpoint::open(&path).unwrap();
        prop_assert_eq!(opened.tensors().count(), tensors.len());
        for (tensor, values) in tensors.iter().zip(&values) {
            prop_assert_eq!(opened.shape(&tensor.name), Some(tensor.shape.as_slice()));
            for (&found, &value) in opened.read(&tensor.name).unwrap().iter().zip(values) {
                prop_assert_eq!(found.to_bits(), kept(value).to_bits());
            }
        }
    }
}

#[test]
fn what_the_type_cannot_hold_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    for (save_type, value, advice) in [
        (SaveType::F32, f32::NAN, "lower `--learning-rate`"),
        (SaveType::BF16, f32::NEG_INFINITY, "lower `--learning-rate`"),
        (SaveType::F16, 65_520.0, "or as bf16"),
        (SaveType::BF16, f32::MAX, "save as f32:"),
    ] {
        let refused = save(&path, &[SavedTensor::borrowed("model.a", &[2], &[1.0, value])], save_type);
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::SavedValue { .. }), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains(advice), "{error}: {hint}");
        assert!(entries(folder.path()).is_empty());
    }
}

#[test]
fn a_saved_folder_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs/final");
    save(&path, &[SavedTensor::borrowed("model.a", &[2], &[1.0, 2.0])], SaveType::BF16).unwrap();
    let expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(entries(&path), expected);
    assert_eq!(entries(path.parent().unwrap()), ["final"]);
    let opened = checkpoint::open(&path).unwrap();
    assert_eq!(opened.config["dtype"], "bfloat16");
    assert_eq!(opened.generation_config.unwrap()["eos_token_id"], 2);
    match opened.tokenizer {
        TokenizerFiles::HuggingFace { chat_template, .. } => assert_eq!(chat_template.unwrap(), "template"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn saved_weights_are_aligned() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    save::write_safetensors(&path, &[SavedTensor::borrowed("a", &[1], &[1.0])], SaveType::F32).unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() % 8, 4);
    assert_eq!(bytes[bytes.len() - 4..], 1f32.to_le_bytes());
}

#[test]
fn saved_configs_have_the_new_forms() {
    let original = checkpoint::open(&fixture("llama-linear")).unwrap().config;
    let saved = Config::from_json(&original).unwrap().to_json(&original);
    let expected = json!({ "rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0 });
    assert_eq!(saved["rope_parameters"], expected);
    assert_eq!(saved["dtype"], "float32");
    assert_eq!(saved["architectures"], json!(["LlamaForCausalLM"]));
    for old in ["torch_dtype", "rope_theta", "rope_scaling"] {
        assert_eq!(saved[old], Value::Null, "{old}");
    }
    for (key, value) in original.as_object().unwrap() {
        if !["torch_dtype", "rope_theta", "rope_scaling", "architectures"].contains(&key.as_str()) {
            assert_eq!(&saved[key], value, "{key}");
        }
    }
}

#[test]
fn a_failed_save_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("final");
    let good = || SavedTensor::borrowed("model.a", &[2], &[1.0, 2.0]);
    let short = SavedTensor::borrowed("model.b", &[3], &[1.0]);
    let message = save(&path, &[good(), short], SaveType::F32).unwrap_err().to_string();
    assert!(message.contains("`model.b`: expected 3 values for shape [3], found 1"), "{message}");
    let message = save(&path, &[good(), good()], SaveType::F32).unwrap_err().to_string();
    assert!(message.contains("two tensors of the name `model.a`"), "{message}");
    let huge = SavedTensor {
        name: "model.c".into(),
        shape: vec![usize::MAX, 2],
        values: Box::new(|| Box::new(iter::empty())),
    };
    let message = save(&path, &[huge], SaveType::F32).unwrap_err().to_string();
    assert!(message.contains("expected too many values"), "{message}");
    assert_eq!(entries(folder.path()), [""; 0]);
}

#[test]
fn a_failed_write_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics");
    save::write_atomic(&path, |file| file.write_all(b"old")).unwrap();
    let error = save::write_atomic(&path, |file| {
        file.write_all(b"half of the ne")?;
        Err(io::ErrorKind::StorageFull.into())
    });
    let error = error.unwrap_err();
    assert!(error.hint().unwrap().contains("free some space"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(entries(folder.path()), ["metrics"]);
}

#[test]
fn a_link_stays_one_and_what_is_no_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let [target, link, socket] = ["target", "link", "socket"].map(|name| folder.path().join(name));
    std::fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    save::write_atomic(&link, |file| file.write_all(b"new")).unwrap();
    assert!(link.is_symlink());
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
    let _listens = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [socket.as_path(), folder.path()] {
        let error = save::write_atomic(path, |file| file.write_all(b"new")).unwrap_err();
        assert!(error.to_string().contains("expected a file") && error.hint().is_some(), "{error}");
    }
    assert_eq!(entries(folder.path()).len(), 3);
}

#[test]
fn saving_never_writes_over_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("final");
    std::fs::create_dir(&path).unwrap();
    save(&path, &[], SaveType::F32).unwrap();
    let message = save(&path, &[], SaveType::F32).unwrap_err().to_string();
    assert!(message.contains("found a folder that is not empty"), "{message}");
    // A killed process's temporary goes when its save is done again.
    std::fs::remove_dir_all(&path).unwrap();
    std::fs::create_dir(folder.path().join(".final.x1.partial")).unwrap();
    save(&path, &[], SaveType::F32).unwrap();
    assert_eq!(entries(folder.path()), ["final"]);
    // That of another name may belong to a process that lives.
    std::fs::create_dir(folder.path().join(".final.f16.x1.partial")).unwrap();
    std::fs::remove_dir_all(&path).unwrap();
    save(&path, &[], SaveType::F32).unwrap();
    assert_eq!(entries(folder.path()), [".final.f16.x1.partial", "final"]);
}
