//! The event file for TensorBoard, read back byte by byte.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Place, fixture, lines};

/// The only event file of a run.
fn event_file(run: &Path) -> PathBuf {
    let names = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = names
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."))
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

/// CRC-32C bit by bit, in TensorFlow's form.
fn masked(content: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in content {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The contents of a file's records, checksums compared.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(number(&bytes[8..12]), masked(&bytes[..8]));
        let content = &bytes[12..12 + length];
        assert_eq!(number(&bytes[12 + length..16 + length]), masked(content));
        found.push(content);
        bytes = &bytes[16 + length..];
    }
    found
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let length = 1 + bytes.iter().position(|byte| byte & 0x80 == 0).unwrap();
    let value = bytes[..length].iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f));
    *bytes = &bytes[length..];
    value
}

/// The fields of a message: number and bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            kind => panic!("kind {kind}"),
        };
        found.push((key >> 3, bytes[..length].to_vec()));
        bytes = &bytes[length..];
    }
    found
}

fn field(bytes: &[u8], number: u64) -> Option<Vec<u8>> {
    fields(bytes).into_iter().find(|(other, _)| *other == number).map(|(_, value)| value)
}

/// Values by tag and step.
type ByTag<T> = BTreeMap<(String, u64), T>;

/// The scalars and the texts of a file, none of them twice.
fn values(file: &Path) -> (ByTag<f32>, ByTag<String>) {
    let (mut scalars, mut texts) = (BTreeMap::new(), BTreeMap::new());
    let bytes = fs::read(file).unwrap();
    let records = records(&bytes);
    assert_eq!(field(records[0], 3).unwrap(), b"brain.Event:2");
    for event in &records[1..] {
        let wall_time = f64::from_le_bytes(field(event, 1).unwrap().try_into().unwrap());
        assert!(wall_time > 1.7e9);
        let step = u64::from_le_bytes(field(event, 2).unwrap().try_into().unwrap());
        for (_, value) in fields(&field(event, 5).unwrap()) {
            let key = (String::from_utf8(field(&value, 1).unwrap()).unwrap(), step);
            if let Some(scalar) = field(&value, 2) {
                let scalar = f32::from_le_bytes(scalar.try_into().unwrap());
                assert!(scalars.insert(key, scalar).is_none(), "twice");
            } else {
                assert_eq!(field(&field(&field(&value, 9).unwrap(), 1).unwrap(), 1).unwrap(), b"text");
                let text = String::from_utf8(field(&field(&value, 8).unwrap(), 8).unwrap()).unwrap();
                assert!(texts.insert(key, text).is_none(), "twice");
            }
        }
    }
    (scalars, texts)
}

/// A run in two halves has every number once, under the names that TRL gives them.
#[test]
fn tensorboard_has_the_numbers_of_the_metrics() {
    let place = Place::new();
    let (data, prompts) = (place.pairs(), place.file("prompts.txt", "Hello\nWhat comes after 3?\n"));
    let words =
        "dpo --out run --batch-size 4 --epochs 2 --save-steps 2 --eval-steps 2 --sample-steps 2 --dtype f32";
    let more = [
        "--model",
        &fixture("chat-tiny"),
        "--data",
        &data,
        "--eval-data",
        &data,
        "--sample-prompts",
        &prompts,
    ];
    place.run(words, &more).good();
    let first = event_file(&place.path("run"));
    // As if killed after the checkpoint of step 4.
    fs::remove_dir_all(place.path("run/final")).unwrap();
    place.run(words, &more).good();
    let (scalars, texts) = values(&event_file(&place.path("run")));
    assert!(!first.exists());
    let mut expected = 0;
    for line in lines(&place.path("run/metrics.jsonl")) {
        let evaluated = line.get("eval_loss").is_some();
        for (key, value) in line.as_object().unwrap().iter().filter(|(key, _)| *key != "step") {
            let tag = match key.strip_prefix("eval_") {
                Some(name) => format!("eval/{name}"),
                None if evaluated => continue,
                None => format!("train/{key}"),
            };
            let found = scalars[&(tag, line["step"].as_u64().unwrap())];
            assert_eq!(found, value.as_f64().unwrap() as f32, "{key}");
            expected += 1;
        }
    }
    assert_eq!(scalars.len(), expected);
    for tag in
        ["train/loss", "train/rewards/chosen", "train/learning_rate", "eval/loss", "eval/rewards/margins"]
    {
        assert!(scalars.contains_key(&(tag.into(), 6)), "{tag}");
    }
    let samples = lines(&place.path("run/samples.jsonl"));
    assert_eq!((samples.len(), texts.len()), (8, 8));
    let last = &texts[&("samples/2/text_summary".to_owned(), 6)];
    assert_eq!(last, &format!("**What comes after 3?**\n\n{}", samples[7]["answer"].as_str().unwrap()));
}

/// What cannot be written for TensorBoard is said once, and the run goes on.
#[test]
#[cfg(unix)]
fn losing_tensorboard_stops_nothing() {
    let place = Place::new();
    let more = ["--model", &fixture("chat-tiny"), "--data", &place.chats()];
    let words = "sft --out run --epochs 1 --save-steps 1";
    place.run(words, &more).good();
    fs::remove_dir_all(place.path("run/final")).unwrap();
    // A folder of that name cannot be removed as a file.
    fs::create_dir(place.path("run/events.out.tfevents.0")).unwrap();
    let ran = place.run(&format!("{words} --quiet"), &more).good();
    assert_eq!(ran.stderr().matches("cannot write the file for TensorBoard").count(), 1, "{}", ran.stderr());
    assert!(place.path("run/final/DONE").exists());
}
