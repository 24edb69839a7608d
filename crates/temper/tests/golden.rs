//! Whole models against PyTorch in f64, from `reference/tiny.py` and `reference/dpo.py`: logits, loss, every
//! gradient, ten AdamW steps, DPO.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod goldens;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use goldens::{gradients, mean, tensor};
use serde_json::Value;
use temper::checkpoint;
use temper::data::order::{Order, Plan};
use temper::data::{Example, Forest, Sequence};
use temper::model::decoder::StepDropout;
use temper::model::spec::Spec;
use temper::model::{Decoder, Source};
use temper::objective::{Dpo, Pair};
use temper::optim::{Schedule, Scheduler};
use temper::parallel::Ranks;
use temper::score::score;
use temper::train::{Objective, Trainer, TrainerSettings};
use temper_kernels::{Cpu, Device, Plain, Precision, transpose};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers<T: From<f64>>(value: &Value) -> Vec<T> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap().into()).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// The golden sequences with spans from their `trained` flags.
fn sequences(golden: &Value) -> Vec<Sequence> {
    let sequence = |s: &Value| {
        let flags: Vec<bool> = numbers::<f64>(&s["trained"]).iter().map(|&x| x == 1.0).collect();
        let trained = (0..flags.len()).filter(|&i| flags[i]).map(|i| i..i + 1).collect();
        Sequence { tokens: tokens(&s["tokens"]), trained, prompt: 0 }
    };
    golden["sequences"].as_array().unwrap().iter().map(sequence).collect()
}

fn load<D: Device>(device: &D, name: &str) -> Decoder<D> {
    Source::trained(&checkpoint::open(&fixture(name)).unwrap()).unwrap().whole(device).unwrap()
}

/// What f32 is allowed, and what is left of the f32 downloads in f64.
struct Bounds {
    logits: f64,
    gradient: f64,
    steps: f64,
}

const F32: Bounds = Bounds { logits: 1e-5, gradient: 1e-4, steps: 1e-5 };
const F64: Bounds = Bounds { logits: 1e-6, gradient: 1e-6, steps: 1e-9 };

fn check_logits<D: Device>(device: &D, name: &str, golden_of: &str, bound: f64) {
    let decoder = load(device, name);
    let golden = std::fs::read(fixture(golden_of).join("golden.safetensors")).unwrap();
    for (i, sequence) in sequences(&json(&fixture(golden_of).join("golden.json"))).iter().enumerate() {
        let every = Sequence { trained: vec![1..sequence.tokens.len()], ..sequence.clone() };
        let forest = Forest::new([&every]);
        let mut a = decoder.activations(device, forest.rows(), false);
        decoder.forward(device, &forest, StepDropout::default(), None, &mut a);
        let mut logits = device.zeros(forest.target_rows.len() * decoder.config.vocabulary);
        decoder.logits(device, &mut logits, &forest, &a);
        let found = device.download(&logits);
        let expected = tensor(&golden, &format!("logits.{i}"));
        let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
        let apart = found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e).abs());
        // A total order: what is not a number is the largest.
        let worst = apart.max_by(f64::total_cmp).unwrap();
        assert!(worst / largest <= bound, "{name} sequence {i}: {:e}", worst / largest);
    }
}

/// Compares the gradient of one parameter, part by part as the file has it.
fn compare_gradient(name: &str, spec: &Spec, found: &[f32], golden: &[u8], bound: f64) {
    let columns = spec.shape.get(1).copied().unwrap_or(1);
    let mut at = 0;
    for (part, rows) in &spec.parts {
        let found = &found[at..at + rows * columns];
        at += rows * columns;
        let found = if spec.transposed { transpose(found, columns, *rows) } else { found.to_vec() };
        let expected = tensor(golden, &format!("grad.{part}"));
        let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum::<f64>().sqrt();
        assert_eq!(found.len(), expected.len());
        assert!(error <= bound * norm, "{name} {part}: {:e} of {norm:e}", error / norm);
    }
}

fn check_gradients<D: Device>(
    device: &D,
    name: &str,
    sequences: &[Sequence],
    golden: &[u8],
    bound: f64,
    coefficients: impl Fn(&Forest) -> Vec<f64>,
) {
    let decoder = load(device, name);
    let dw = gradients(device, &decoder, sequences, coefficients);
    for (spec, gradient) in decoder.specs.iter().zip(dw.iter()) {
        compare_gradient(name, spec, &device.download(gradient.as_ref().unwrap()), golden, bound);
    }
}

fn check_sft<D: Device>(device: &D, name: &str, bounds: &Bounds) {
    let golden = json(&fixture(name).join("golden.json"));
    let tensors = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
    check_logits(device, name, name, bounds.logits);
    let sequences = sequences(&golden);
    check_gradients(device, name, &sequences, &tensors, bounds.gradient, mean);

    let steps: Vec<f64> = numbers(&golden["steps"]);
    let settings = TrainerSettings {
        schedule: Schedule {
            scheduler: Scheduler::Constant,
            learning_rate: golden["adamw"]["learning_rate"].as_f64().unwrap(),
            warmup: 0,
            steps: 10,
        },
        adam: goldens::adam(&golden),
        plan: Plan { records: 3, batch: 3, order: Order::Sequential, seed: 0 },
        microbatch_tokens: 30, // two micro-batches
        dropout: Default::default(),
    };
    let examples: Vec<Example> = sequences
        .into_iter()
        .enumerate()
        .map(|(record, sequence)| Example { record, sequences: vec![sequence] })
        .collect();
    let mut trainer =
        Trainer::new(device, load(device, name), Objective::Sft, settings, &examples, &Ranks::alone());
    for (i, expected) in steps.iter().enumerate() {
        let report = trainer.step(&examples, &[0, 1, 2], &[], &AtomicBool::new(false)).unwrap().unwrap();
        assert!(
            (report.metrics.loss - expected).abs() / expected <= bounds.steps,
            "{name} step {i}: {} {expected}",
            report.metrics.loss
        );
        if i == 0 {
            let norm = golden["grad_norm"].as_f64().unwrap();
            assert!(
                (report.grad_norm - norm).abs() / norm <= bounds.gradient,
                "{name}: {} {norm}",
                report.grad_norm
            );
        }
    }
}

const MODELS: [&str; 9] = [
    "gpt2-tiny",
    "llama-tiny",
    "llama3-tiny",
    "llama-linear",
    "mistral-tiny",
    "qwen2-tiny",
    "qwen3-tiny",
    "smollm3-tiny",
    "gemma3-tiny",
];

#[test]
fn models_in_f32_match_pytorch() {
    let cpu = Cpu::new(2, Precision::F32).unwrap();
    MODELS.iter().for_each(|name| check_sft(&cpu, name, &F32));
}

#[test]
fn models_in_f64_match_pytorch() {
    MODELS.iter().for_each(|name| check_sft(&Plain, name, &F64));
}

#[test]
fn published_names_and_half_precision_files_read_the_same() {
    check_logits(&Plain, "gpt2-hub", "gpt2-tiny", F64.logits);
    check_logits(&Plain, "bf16-tiny", "bf16-tiny", F64.logits);
    check_logits(&Plain, "f16-tiny", "f16-tiny", F64.logits);
}

fn check_dpo<D: Device>(device: &D, name: &str, bound: f64) {
    let golden = json(&fixture(name).join("dpo.json"));
    let tensors = std::fs::read(fixture(name).join("dpo.safetensors")).unwrap();
    let pairs: Vec<Vec<Sequence>> = golden["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| {
            let prompt = tokens(&pair["prompt"]);
            ["chosen", "rejected"]
                .map(|side| {
                    let tokens = [prompt.clone(), tokens(&pair[side])].concat();
                    Sequence { trained: vec![prompt.len()..tokens.len()], tokens, prompt: prompt.len() }
                })
                .to_vec()
        })
        .collect();
    let pair =
        |value: &Value| Pair { chosen: value[0].as_f64().unwrap(), rejected: value[1].as_f64().unwrap() };
    let groups: Vec<&[Sequence]> = pairs.iter().map(Vec::as_slice).collect();
    let scores = score(device, &load(device, name), &groups, 40, |_| true);
    let dpo = Dpo { beta: golden["beta"].as_f64().unwrap(), label_smoothing: 0.0 };
    let smoothed =
        Dpo { label_smoothing: golden["conservative"]["label_smoothing"].as_f64().unwrap(), ..dpo };
    let (mut loss, mut conservative, mut coefficients) = (0.0, 0.0, Vec::new());
    for (i, scores) in scores.iter().enumerate() {
        let (policy, expected) =
            (Pair { chosen: scores[0].logp, rejected: scores[1].logp }, pair(&golden["policy"][i]));
        assert!(
            (policy.chosen - expected.chosen).abs() < bound * expected.chosen.abs()
                && (policy.rejected - expected.rejected).abs() < bound * expected.rejected.abs()
        );
        let reference = pair(&golden["reference"][i]);
        let graded = dpo.loss(policy, reference);
        assert!(
            (graded.rewards.chosen - golden["rewards_chosen"][i].as_f64().unwrap()).abs() < 100.0 * bound
        );
        assert!(
            (graded.rewards.rejected - golden["rewards_rejected"][i].as_f64().unwrap()).abs() < 100.0 * bound
        );
        loss += graded.loss / 4.0;
        conservative += smoothed.loss(policy, reference).loss / 4.0;
        coefficients.extend([graded.coefficient / 4.0, -graded.coefficient / 4.0]);
    }
    for (found, expected) in [(loss, &golden["loss"]), (conservative, &golden["conservative"]["loss"])] {
        let expected = expected.as_f64().unwrap();
        assert!((found - expected).abs() <= bound * expected, "{name}: {found} {expected}");
    }
    let trl = golden["trl"]["loss"].as_f64().unwrap();
    assert!((loss - trl).abs() <= 1e-4 * trl, "{name}: {loss}, TRL {trl}");
    let all: Vec<Sequence> = pairs.concat();
    check_gradients(device, name, &all, &tensors, 10.0 * bound, |forest| {
        forest.owners.iter().map(|&owner| coefficients[owner as usize]).collect()
    });
}

#[test]
fn dpo_matches_pytorch_and_trl() {
    for name in ["gpt2-tiny", "llama-tiny"] {
        check_dpo(&Plain, name, 1e-7);
        check_dpo(&Cpu::new(2, Precision::F32).unwrap(), name, 1e-5);
    }
}
