//! Adapters against PEFT in f64, from `reference/lora.py`: logits, every gradient, ten AdamW steps, merged weights; and
//! files that do not fit.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod checkpoint_files;
mod goldens;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use checkpoint_files::{Field, Gguf};
use goldens::{gradients, mean, tensor};
use half::f16;
use serde_json::Value;
use temper::checkpoint::save::{SaveType, SavedTensor, write_safetensors};
use temper::checkpoint::{self, AdapterFiles, open_adapter};
use temper::data::order::{Order, Plan};
use temper::data::{Example, Forest, Sequence};
use temper::model::decoder::StepDropout;
use temper::model::files::{Quantise, frozen_bytes, saved_weights};
use temper::model::lora::{Lora, Targets};
use temper::model::merge::merge;
use temper::model::peft::PREFIX;
use temper::model::weights::Parameter;
use temper::model::{Adapted, Config, Decoder, Source};
use temper::optim::{Schedule, Scheduler};
use temper::parallel::Ranks;
use temper::train::{Objective, Trainer, TrainerSettings};
use temper_kernels::cpu::Weight;
use temper_kernels::{Cpu, Device, Plain, Precision};

const CASES: [&str; 7] = [
    "gpt2-lora",
    "gpt2-dora",
    "llama-lora",
    "llama-rslora-some",
    "llama-dora",
    "llama-head",
    "llama-patterns",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn relative(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(f64::MIN_POSITIVE, |max, x| max.max(x.abs()));
    let apart = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).abs());
    // A total order: what is not a number is the largest.
    apart.max_by(f64::total_cmp).unwrap() / largest
}

/// Adapters that change nothing yet.
fn fresh(lora: &Lora, quantise: Quantise) -> Adapted<'_> {
    Adapted { lora, adapter: None, quantise }
}

/// One of PEFT's adapters with its golden values.
struct Case {
    name: &'static str,
    golden: Value,
    tensors: Vec<u8>,
    base: PathBuf,
    files: AdapterFiles,
    lora: Lora,
}

impl Case {
    fn open(name: &'static str) -> Case {
        let folder = fixture("lora").join(name);
        let golden: Value =
            serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let files = open_adapter(&folder).unwrap();
        Case {
            name,
            base: fixture(golden["base"].as_str().unwrap()),
            tensors: std::fs::read(folder.join("golden.safetensors")).unwrap(),
            lora: Lora::from_peft(&files).unwrap(),
            golden,
            files,
        }
    }

    fn decoder<D: Device>(&self, device: &D) -> Decoder<D> {
        let base = checkpoint::open(&self.base).unwrap();
        let adapted = Adapted { adapter: Some(&self.files), ..fresh(&self.lora, Quantise::None) };
        Source::adapted(&base, adapted, 0).unwrap().whole(device).unwrap()
    }

    fn sequences(&self) -> Vec<Sequence> {
        let numbers = |value: &Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
        };
        let sequence = |s: &Value| {
            let flags = numbers(&s["trained"]);
            let trained = (0..flags.len()).filter(|&i| flags[i] == 1).map(|i| i..i + 1).collect();
            Sequence { tokens: numbers(&s["tokens"]), trained, prompt: 0 }
        };
        self.golden["sequences"].as_array().unwrap().iter().map(sequence).collect()
    }

    /// Logits of every position of each sequence.
    fn check_logits<D: Device>(&self, device: &D, decoder: &Decoder<D>, bound: f64) {
        for (i, sequence) in self.sequences().into_iter().enumerate() {
            let every = Sequence { trained: vec![1..sequence.tokens.len()], ..sequence };
            let forest = Forest::new([&every]);
            let mut a = decoder.activations(device, forest.rows(), false);
            decoder.forward(device, &forest, StepDropout::default(), None, &mut a);
            let mut logits = device.zeros(forest.target_rows.len() * decoder.config.vocabulary);
            decoder.logits(device, &mut logits, &forest, &a);
            let found = device.download(&logits);
            // Nothing follows the last token.
            let expected = tensor(&self.tensors, &format!("logits.{i}"));
            let error = relative(&found, &expected[..found.len()]);
            assert!(error <= bound, "{} sequence {i}: {error:e}", self.name);
        }
    }

    fn check_gradients<D: Device>(&self, device: &D, bound: f64) {
        let decoder = self.decoder(device);
        let dw = gradients(device, &decoder, &self.sequences(), mean);
        let mut compared = 0;
        for (spec, gradient) in decoder.specs.iter().zip(dw.iter()) {
            assert_eq!(spec.trained, gradient.is_some(), "{}", spec.parts[0].0);
            let Some(gradient) = gradient else { continue };
            let (gradient, mut at) = (device.download(gradient), 0);
            for (part, rows) in &spec.parts {
                let found = &gradient[at..at + rows * spec.columns()];
                at += found.len();
                let expected = tensor(&self.tensors, &format!("grad.{PREFIX}{part}"));
                let error = relative(found, &expected);
                assert!(error <= bound, "{} {part}: {error:e}", self.name);
                compared += 1;
            }
        }
        let golden = safetensors::SafeTensors::deserialize(&self.tensors).unwrap();
        let expected = golden.names().iter().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(compared, expected, "{}: parameters that PEFT trains", self.name);
    }

    fn check_steps<D: Device>(&self, device: &D, bound: f64) {
        let learning_rate = self.golden["adamw"]["learning_rate"].as_f64().unwrap();
        let settings = TrainerSettings {
            schedule: Schedule { scheduler: Scheduler::Constant, learning_rate, warmup: 0, steps: 10 },
            adam: goldens::adam(&self.golden),
            plan: Plan { records: 3, batch: 3, order: Order::Sequential, seed: 0 },
            microbatch_tokens: 30,
            dropout: Default::default(),
        };
        let examples = self.sequences().into_iter().enumerate();
        let examples: Vec<Example> =
            examples.map(|(record, sequence)| Example { record, sequences: vec![sequence] }).collect();
        let mut trainer =
            Trainer::new(device, self.decoder(device), Objective::Sft, settings, &examples, &Ranks::alone());
        for (i, expected) in self.golden["steps"].as_array().unwrap().iter().enumerate() {
            let (report, expected) = (
                trainer.step(&examples, &[0, 1, 2], &[], &AtomicBool::new(false)).unwrap().unwrap(),
                expected.as_f64().unwrap(),
            );
            let error = (report.metrics.loss - expected).abs() / expected;
            assert!(error <= bound, "{} step {i}: {} {expected}", self.name, report.metrics.loss);
            if i == 0 {
                let norm = self.golden["grad_norm"].as_f64().unwrap();
                assert!((report.grad_norm - norm).abs() <= 100.0 * bound * norm, "{}", self.name);
            }
        }
    }
}

#[test]
fn adapters_in_f64_match_peft() {
    for case in CASES.map(Case::open) {
        case.check_logits(&Plain, &case.decoder(&Plain), 1e-6);
        case.check_gradients(&Plain, 1e-6);
        case.check_steps(&Plain, 1e-9);
    }
}

#[test]
fn adapters_in_f32_match_peft() {
    let cpu = Cpu::new(2, Precision::F32).unwrap();
    for case in CASES.map(Case::open) {
        case.check_logits(&cpu, &case.decoder(&cpu), 1e-5);
        case.check_gradients(&cpu, 1e-4);
        case.check_steps(&cpu, 1e-5);
    }
}

#[test]
fn merging_gives_pefts_weights_and_the_same_logits() {
    for case in CASES.map(Case::open) {
        let merged = merge(&Plain, case.decoder(&Plain));
        case.check_logits(&Plain, &merged, 1e-6);
        let name = case.golden["merged"].as_str().unwrap();
        let tensors = saved_weights(&Plain, &merged, "", |_| true);
        let tensor_found = tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let error =
            relative(&(tensor_found.values)().collect::<Vec<_>>().concat(), &tensor(&case.tensors, "merged"));
        assert!(error <= 1e-6, "{}: {error:e}", case.name);
        let own_head = tensors.iter().any(|tensor| tensor.name == "lm_head.weight");
        assert_eq!(own_head, !merged.config.tied, "{}", case.name);
        assert_eq!(own_head, case.name == "llama-head");
    }
}

/// What is written is what PEFT wrote: names, shapes, values, and the keys that decide.
#[test]
fn adapters_are_saved_as_peft_saves_them() {
    for case in CASES.map(Case::open) {
        let decoder = case.decoder(&Plain);
        let tensors = saved_weights(&Plain, &decoder, PREFIX, |spec| spec.trained);
        let mut ours: Vec<(String, Vec<usize>)> =
            tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
        let mut theirs: Vec<(String, Vec<usize>)> =
            case.files.tensors.tensors().map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "{}", case.name);
        for tensor in &tensors {
            assert_eq!(
                (tensor.values)().collect::<Vec<_>>().concat(),
                *case.files.tensors.read(&tensor.name).unwrap()
            );
        }
        let config = case.lora.to_peft(&decoder.config, &decoder.specs, "base");
        let kind = ["peft_type", "r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"];
        for key in kind.into_iter().chain(["modules_to_save", "fan_in_fan_out", "bias"]) {
            assert_eq!(config[key], case.files.config[key], "{}: {key}", case.name);
        }
        assert_eq!(config["lora_alpha"].as_f64(), case.files.config["lora_alpha"].as_f64());
    }
}

/// A base in blocks is the base that its values are.
#[test]
fn quantised_bases_compute_with_their_values() {
    let base = checkpoint::open(&fixture("llama-tiny")).unwrap();
    let lora = Case::open("llama-lora").lora;
    for quantise in [Quantise::Nf4, Quantise::Int8] {
        let blocks = Source::adapted(&base, fresh(&lora, quantise), 3).unwrap().whole(&Plain).unwrap();
        let cpu = Cpu::new(2, Precision::F32).unwrap();
        let fast = Source::adapted(&base, fresh(&lora, quantise), 3).unwrap().whole(&cpu).unwrap();
        let case = Case::open("llama-lora");
        let forest = Forest::new(&case.sequences());
        let (mut a, mut b) =
            (blocks.activations(&Plain, forest.rows(), false), fast.activations(&cpu, forest.rows(), false));
        blocks.forward(&Plain, &forest, StepDropout::default(), None, &mut a);
        fast.forward(&cpu, &forest, StepDropout::default(), None, &mut b);
        let expected = blocks.head(&Plain, &forest, &a).logp;
        let found = fast.head(&cpu, &forest, &b).logp;
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{quantise:?}: {found} {expected}");
        }
    }
}

/// A GGUF file of one layer whose matrices are in blocks of different kinds, q, k and v among them.
fn quantised_gguf(architecture: &'static str) -> Gguf {
    let mut gguf = Gguf::default();
    gguf.field("general.architecture", Field::Text(architecture));
    let numbers = [
        ("context_length", 16),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("block_count", 1),
        ("attention.head_count", 4),
    ];
    for (key, value) in numbers {
        gguf.field(&format!("{architecture}.{key}"), Field::U32(value));
    }
    let epsilon = if architecture == "gpt2" { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    gguf.field(&format!("{architecture}.attention.{epsilon}"), Field::F32(1e-5));
    let [q8, q4] = [(8u32, 34usize, 2usize), (3, 20, 4)];
    let mut matrix = |name: &str, inputs: u64, outputs: u64, (kind, block, scales): (u32, usize, usize)| {
        let key = name.bytes().fold(3, |key, byte| temper_kernels::mix(key, byte.into()));
        let len = (inputs * outputs) as usize / 32 * block;
        let mut bytes: Vec<u8> =
            (0..len as u64).map(|i| (256.0 * temper_kernels::uniform(key, i)) as u8).collect();
        for block in bytes.chunks_mut(block) {
            block[..2].copy_from_slice(&f16::from_f32(0.004).to_le_bytes());
            if scales == 4 {
                block[2..4].copy_from_slice(&f16::from_f32(-0.03).to_le_bytes());
            }
        }
        gguf.tensors.push((format!("{name}.weight"), vec![inputs, outputs], kind, bytes));
    };
    matrix("token_embd", 64, 6, q8);
    if architecture == "gpt2" {
        matrix("blk.0.attn_qkv", 64, 192, q4);
        matrix("position_embd", 64, 16, q8);
        matrix("blk.0.ffn_up", 64, 96, q8);
    } else {
        matrix("blk.0.attn_q", 64, 64, q8);
        matrix("blk.0.attn_k", 64, 32, q4);
        matrix("blk.0.attn_v", 64, 32, q8);
        matrix("blk.0.ffn_gate", 64, 96, q4);
        matrix("blk.0.ffn_up", 64, 96, q8);
    }
    matrix("blk.0.attn_output", 64, 64, q4);
    matrix("blk.0.ffn_down", 96, 64, q8);
    for norm in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"] {
        gguf.f32(&format!("{norm}.weight"), &[64]);
    }
    if architecture == "gpt2" {
        let biases = [("attn_norm", 64), ("ffn_norm", 64), ("attn_qkv", 192), ("attn_output", 64)];
        for (name, len) in biases.into_iter().chain([("ffn_up", 96), ("ffn_down", 64)]) {
            gguf.f32(&format!("blk.0.{name}.bias"), &[len]);
        }
        gguf.f32("output_norm.bias", &[64]);
    } else {
        gguf.field(&format!("{architecture}.attention.head_count_kv"), Field::U32(2));
    }
    gguf
}

/// Blocks of a file, rows in llama.cpp's order and GPT-2's turned matrices among them, are the weights that they decode
/// to; and they stay blocks.
#[test]
fn blocks_of_a_file_compute_with_their_values() {
    let cpu = Cpu::new(2, Precision::F32).unwrap();
    for architecture in ["llama", "gpt2"] {
        let base = quantised_gguf(architecture).open().unwrap();
        check_blocks(&cpu, architecture, &base, Lora { targets: Targets::AllLinear, ..lora(&[]) });
        // An embedding that is trained leaves the head, which was tied to it, in its blocks.
        let table = if architecture == "gpt2" { "wte" } else { "embed_tokens" };
        check_blocks(
            &cpu,
            architecture,
            &base,
            Lora {
                modules_to_save: vec![table.into()],
                ..lora(&[if architecture == "gpt2" { "c_fc" } else { "up_proj" }])
            },
        );
    }
}

fn check_blocks(cpu: &Cpu, architecture: &str, base: &checkpoint::Checkpoint, lora: Lora) {
    let sequence = Sequence { tokens: vec![1, 5, 0, 3, 2, 4, 4], trained: vec![1..7], prompt: 1 };
    let forest = Forest::new([&sequence]);
    fn logps<D: Device>(device: &D, decoder: &Decoder<D>, forest: &Forest) -> Vec<f64> {
        let mut a = decoder.activations(device, forest.rows(), false);
        decoder.forward(device, forest, StepDropout::default(), None, &mut a);
        decoder.head(device, forest, &a).logp
    }
    let load = |quantise| Source::adapted(base, fresh(&lora, quantise), 0).unwrap().whole(cpu).unwrap();
    let (kept, unpacked) = (load(Quantise::File), load(Quantise::None));
    let plain = Source::adapted(base, fresh(&lora, Quantise::File), 0).unwrap().whole(&Plain).unwrap();
    let expected = logps(&Plain, &plain, &forest);
    assert!(expected.iter().all(|logp| logp.is_finite()), "{expected:?}");
    let used = [Quantise::File, Quantise::None];
    let used = used.map(|quantise| Source::frozen(base, quantise).unwrap().whole(cpu).unwrap());
    for decoder in [&kept, &unpacked, &used[0], &used[1]] {
        let found = logps(cpu, decoder, &forest);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-4, "{architecture}: {found} {expected}");
        }
    }
    let bytes = |quantise| frozen_bytes(base, &kept.specs, quantise, 4);
    assert!(bytes(Quantise::File) < bytes(Quantise::None) * 2 / 3, "{architecture}");
    assert!(
        used.iter()
            .zip([true, false])
            .all(|(used, blocks)| matches!(used.weights.blocks[0].qkv.weight, Weight::Quantised { .. })
                == blocks)
    );
    // Weights of the decoder are those that unpacking gives, part by part.
    for (a, b) in kept.weights.parameters().into_iter().zip(unpacked.weights.parameters()) {
        if let (Parameter::Matrix(a), Parameter::Matrix(b)) = (a, b) {
            assert_eq!(cpu.weight_values(a), cpu.weight_values(b), "{architecture}");
        }
    }
}

fn lora(targets: &[&str]) -> Lora {
    Lora {
        rank: 4,
        alpha: 8.0,
        targets: Targets::Named(targets.iter().map(|name| (*name).to_owned()).collect()),
        ..Lora::default()
    }
}

#[test]
fn names_and_ranks_that_fit_nothing_are_named() {
    let config = Config::from_json(&checkpoint::open(&fixture("llama-tiny")).unwrap().config).unwrap();
    let error = lora(&["q_proj", "qq_proj"]).specs(&config).unwrap_err().to_string();
    assert!(error.contains("`qq_proj`") && error.contains("down_proj, gate_proj, k_proj"), "{error}");
    let error = lora(&["lm_head"]).specs(&config).unwrap_err().to_string();
    assert!(error.contains("--lora-target: `lm_head` is none of"), "{error}");
    let hint = lora(&["lm_head"]).specs(&config).unwrap_err().hint().unwrap();
    assert_eq!(hint, "give `--modules-to-save lm_head`");
    for rank in [0, 17] {
        // Two key heads of 8 make 16 rows.
        let error = Lora { rank, ..lora(&["k_proj"]) }.specs(&config).unwrap_err().to_string();
        assert!(error.contains("expected 1 to 16") && error.contains("k_proj"), "{error}");
    }
    let saved = Lora { modules_to_save: vec!["q_proj".into()], ..lora(&["k_proj"]) };
    let error = saved.specs(&config).unwrap_err().to_string();
    assert!(error.contains("--modules-to-save") && error.contains("embed_tokens"), "{error}");
    // One layer by its full name.
    let one = lora(&["model.layers.1.self_attn.q_proj"]).specs(&config).unwrap();
    assert!(one.blocks[0].qkv.adapter.is_none() && one.blocks[1].qkv.adapter.is_some());
}

/// PEFT knows no largest rank, and its files are read as they are.
#[test]
fn an_adapter_of_a_rank_above_a_layers_side_is_read() {
    let base = checkpoint::open(&fixture("llama-tiny")).unwrap();
    let config = Config::from_json(&base.config).unwrap();
    let module = "model.layers.0.self_attn.k_proj".to_owned();
    let lora = Lora { rank: 500, targets: Targets::Found(vec![module]), ..lora(&[]) };
    let specs = lora.specs(&config).unwrap();
    let trained = specs.iter().filter(|spec| spec.trained);
    let rows: Vec<usize> = trained.map(|spec| spec.shape[0]).collect();
    assert!(rows.contains(&500), "{rows:?}");
}

/// Without a backward all blocks share one set of buffers, whatever adapters each has.
#[test]
fn adapters_of_a_later_layer_alone_count_in_inference_too() {
    let base = checkpoint::open(&fixture("llama-tiny")).unwrap();
    let lora = lora(&["model.layers.1.self_attn.q_proj"]);
    let mut decoder = Source::adapted(&base, fresh(&lora, Quantise::None), 0).unwrap().whole(&Plain).unwrap();
    let adapter = decoder.weights.blocks[1].qkv.adapter.as_mut().unwrap();
    adapter.b[0].iter_mut().enumerate().for_each(|(i, b)| *b = 0.1 * (i as f64).sin());
    let sequence = Sequence { tokens: vec![1, 5, 9, 2, 7], trained: vec![1..5], prompt: 0 };
    let forest = Forest::new([&sequence]);
    let mut logps = |training, on| {
        decoder.adapters_on = on;
        let mut a = decoder.activations(&Plain, forest.rows(), training);
        decoder.forward(&Plain, &forest, StepDropout::default(), None, &mut a);
        decoder.head(&Plain, &forest, &a).logp
    };
    let [trained, used, off] = [(true, true), (false, true), (false, false)].map(|(t, on)| logps(t, on));
    assert_eq!(trained, used);
    assert_ne!(used, off);
}

#[test]
fn what_is_trained_alone_has_the_gradient_that_it_has_among_others() {
    let common = ["q_norm", "k_norm", "input_layernorm", "post_attention_layernorm"];
    alone_as_among_others("qwen3-tiny", &common, 2);
    let around_the_mlp = ["pre_feedforward_layernorm", "post_feedforward_layernorm"];
    alone_as_among_others("gemma3-tiny", &[&common[..], &around_the_mlp].concat(), 4);
}

fn alone_as_among_others(model: &str, modules: &[&str], layers: usize) {
    let base = checkpoint::open(&fixture(model)).unwrap();
    let sequence = Sequence { tokens: vec![1, 5, 9, 2, 7], trained: vec![1..5], prompt: 0 };
    let by_name = |modules: &[&str]| -> BTreeMap<String, Vec<f64>> {
        let modules_to_save = modules.iter().map(|name| (*name).to_owned()).collect();
        let lora = Lora { modules_to_save, ..lora(&["model.layers.1.mlp.down_proj"]) };
        let decoder = Source::adapted(&base, fresh(&lora, Quantise::None), 0).unwrap().whole(&Plain).unwrap();
        let dw = gradients(&Plain, &decoder, std::slice::from_ref(&sequence), mean);
        let named = decoder.specs.iter().zip(dw.iter());
        named.filter_map(|(spec, dw)| Some((spec.parts[0].0.clone(), dw.clone()?))).collect()
    };
    let all = by_name(modules);
    for &module in modules {
        let alone = by_name(&[module]);
        let own: Vec<_> = alone.iter().filter(|(name, _)| name.contains(module)).collect();
        assert_eq!(own.len(), layers, "one in each layer");
        assert!(own.iter().all(|(_, gradient)| gradient.iter().any(|&x| x != 0.0)), "{module}");
        assert!(alone.iter().all(|(name, gradient)| *gradient == all[name]), "{module}");
    }
}

#[test]
fn an_adapter_of_another_model_names_tensors_and_shapes() {
    let case = Case::open("gpt2-lora");
    let base = checkpoint::open(&fixture("llama-tiny")).unwrap();
    let load = |lora: &Lora, files: &AdapterFiles| {
        let adapted = Adapted { adapter: Some(files), ..fresh(lora, Quantise::None) };
        Source::adapted(&base, adapted, 0).unwrap_err().to_string()
    };
    let error = load(&case.lora, &case.files);
    assert!(
        error.contains("unexpected base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"),
        "{error}"
    );
    let mut case = Case::open("llama-lora");
    case.lora.rank = 3;
    let error = load(&case.lora, &case.files);
    assert!(error.contains("lora_A.weight [4, 32], expected [3, 32]") && error.contains("more"), "{error}");
}

/// PEFT saves whole what ends with a name, or lies in what does.
#[test]
fn modules_that_a_file_has_whole_are_named_and_trained_together() {
    let config = Config::from_json(&checkpoint::open(&fixture("llama-tiny")).unwrap().config).unwrap();
    let read = |saved: &[&str], tensors: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let json = serde_json::json!({ "peft_type": "LORA", "r": 1, "modules_to_save": saved });
        std::fs::write(folder.path().join("adapter_config.json"), json.to_string()).unwrap();
        let names: Vec<String> = tensors.iter().map(|name| format!("{PREFIX}{name}.weight")).collect();
        let tensors: Vec<SavedTensor> =
            names.iter().map(|name| SavedTensor::borrowed(name, &[1], &[1.0])).collect();
        let path = folder.path().join("adapter_model.safetensors");
        write_safetensors(&path, &tensors, SaveType::F32).unwrap();
        Lora::from_peft(&open_adapter(folder.path()).unwrap())?.specs(&config)
    };
    let mlp = ["up_proj", "gate_proj", "down_proj"].map(|name| format!("model.layers.0.mlp.{name}"));
    let mlp = mlp.each_ref().map(String::as_str);
    let specs = read(&["mlp"], &mlp).unwrap();
    let trained =
        |block: usize| [&specs.blocks[block].up, &specs.blocks[block].down].map(|d| d.weight.trained);
    assert_eq!([trained(0), trained(1)], [[true; 2], [false; 2]]);
    for (saved, tensors, parts) in [
        (&["up_proj"][..], &mlp[..1], ["mlp.up_proj` whole", "mlp.gate_proj` not"]),
        (&["lm_head"], &["lm_head", "model.embed_tokens"], ["modules_to_save", "`model.embed_tokens` too"]),
        (&[], &["lm_head.lora_A", "lm_head.lora_B"], ["target_modules", "no head"]),
        (&[], &["model.embed_tokens.lora_embedding_A"], ["target_modules", "no embedding"]),
    ] {
        let error = read(saved, tensors).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

/// A file that lacks layers would be the base there, in silence.
#[test]
fn a_file_lacks_no_layer_that_its_list_names() {
    let mut case = Case::open("llama-lora");
    let base = checkpoint::open(&fixture("llama-tiny")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let mut load = |keep: &str, key: &str, value: Value| {
        let tensors = &case.files.tensors;
        let kept = tensors.tensors().filter(|(name, _)| name.contains(keep));
        let kept: Vec<_> = kept.map(|(name, shape)| (name, shape, tensors.read(name).unwrap())).collect();
        let kept: Vec<_> =
            kept.iter().map(|(name, shape, values)| SavedTensor::borrowed(*name, shape, values)).collect();
        write_safetensors(&path, &kept, SaveType::F32).unwrap();
        let before = std::mem::replace(&mut case.files.config[key], value);
        std::fs::write(folder.path().join("adapter_config.json"), case.files.config.to_string()).unwrap();
        case.files.config[key] = before;
        let files = open_adapter(folder.path()).unwrap();
        let lora = Lora::from_peft(&files).map_err(|error| error.to_string())?;
        let adapted = Adapted { adapter: Some(&files), ..fresh(&lora, Quantise::None) };
        Source::adapted(&base, adapted, 0).map(drop).map_err(|error| error.to_string())
    };
    load("", "exclude_modules", Value::Null).unwrap();
    let error = load("layers.0.", "exclude_modules", Value::Null).unwrap_err();
    assert!(
        error.contains("missing    base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"),
        "{error}"
    );
    load("layers.0.", "layers_to_transform", serde_json::json!([0])).unwrap();
    load("layers.0.", "exclude_modules", serde_json::json!(["layers.1.*"])).unwrap();
    load("layers.0.", "target_modules", r".*\.0\..*".into()).unwrap();
    let error = load("none", "target_modules", r".*\.0\..*".into()).unwrap_err();
    assert!(error.contains("target_modules") && error.contains("it has none"), "{error}");
}

#[test]
fn folders_without_a_file_and_unknown_settings_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let source = fixture("lora/llama-lora");
    let message = |folder: &Path| open_adapter(folder).unwrap_err().to_string();
    assert!(message(folder.path()).contains("adapter_config.json"));
    std::fs::copy(source.join("adapter_config.json"), folder.path().join("adapter_config.json")).unwrap();
    assert!(message(folder.path()).contains("adapter_model.safetensors"));
    std::fs::copy(source.join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors"))
        .unwrap();
    let mut files = open_adapter(folder.path()).unwrap();
    for (key, value) in [
        ("r", Value::from(0)),
        ("bias", "all".into()),
        ("peft_type", "IA3".into()),
        ("lora_alpha", "x".into()),
    ] {
        let before = files.config[key].take();
        files.config[key] = value;
        let error = Lora::from_peft(&files).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        files.config[key] = before;
    }
    for (key, value) in [
        ("rank_pattern", serde_json::json!({ "q_proj": 0 })),
        ("rank_pattern", serde_json::json!({ "(q_proj": 8 })),
        ("alpha_pattern", serde_json::json!({ "q_proj": "x" })),
        ("rank_pattern", serde_json::json!({ "q_proj": 1u64 << 40 })),
        ("modules_to_save", serde_json::json!([5])),
        ("init_lora_weights", "pissa".into()),
        ("of_a_later_peft", true.into()),
    ] {
        files.config[key] = value;
        let error = Lora::from_peft(&files).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        files.config[key] = Value::Null;
    }
    files.config["rank_pattern"] = serde_json::json!({ r"layers\.\d+\.mlp\.(?i:UP)_proj": 2 });
    assert_eq!(Lora::from_peft(&files).unwrap().rank_pattern.of("model.layers.1.mlp.up_proj"), Some(2));
    files.config["rank_pattern"] = Value::Null;
    // A factor may turn the update round, and be huge; it is saved as it was read.
    let config = Config::from_json(&checkpoint::open(&fixture("llama-tiny")).unwrap().config).unwrap();
    for alpha in [-16.0, 1e20] {
        files.config["lora_alpha"] = Value::from(alpha);
        let lora = Lora::from_peft(&files).unwrap();
        let saved = lora.to_peft(&config, &lora.specs(&config).unwrap(), "base");
        assert_eq!(saved["lora_alpha"].as_f64(), Some(alpha));
    }
}
