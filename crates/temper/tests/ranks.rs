//! Several ranks do what one does: in threads, over channels, so that no MPI is needed.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use temper::checkpoint::{self, save::SaveType};
use temper::data::order::{Order, Plan};
use temper::data::{Example, Sequence};
use temper::model::files::Quantise;
use temper::model::{Adapted, Config, Lora, config::Dropout, lora::Targets};
use temper::objective::Dpo;
use temper::optim::{Adam, Schedule, Scheduler};
use temper::parallel::{Link, Ranks, Strategy, Ticket};
use temper::text::Processor;
use temper::train::{Event, Objective, Outcome, Run, Samples, Start, TrainerSettings, run};
use temper_kernels::{Cpu, Precision, mix};

/// What came from a rank, by its number.
#[derive(Debug)]
struct Inbox {
    receiver: Receiver<Vec<u32>>,
    arrived: HashMap<u64, Vec<u32>>,
    read: u64,
    /// Expected lengths, by number.
    asked: Vec<usize>,
}

/// A rank in a thread.
#[derive(Debug)]
struct Threads {
    rank: usize,
    to: Vec<Sender<Vec<u32>>>,
    from: Vec<Mutex<Inbox>>,
}

impl Threads {
    fn all(size: usize) -> Vec<Threads> {
        let mut wires: Vec<Vec<_>> =
            (0..size).map(|_| (0..size).map(|_| Some(channel())).collect()).collect();
        let mut senders: Vec<Vec<Sender<Vec<u32>>>> = Vec::new();
        let mut receivers: Vec<Vec<Receiver<Vec<u32>>>> = (0..size).map(|_| Vec::new()).collect();
        for from in &mut wires {
            let mut out = Vec::new();
            for (to, wire) in from.iter_mut().enumerate() {
                let (sender, receiver) = wire.take().unwrap();
                out.push(sender);
                receivers[to].push(receiver);
            }
            senders.push(out);
        }
        let inbox =
            |receiver| Mutex::new(Inbox { receiver, arrived: HashMap::new(), read: 0, asked: Vec::new() });
        let ranks = senders.into_iter().zip(receivers).enumerate();
        ranks
            .map(|(rank, (to, from))| Threads { rank, to, from: from.into_iter().map(inbox).collect() })
            .collect()
    }
}

impl Link for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, words: Vec<u32>) {
        assert_ne!(to, self.rank);
        self.to[to].send(words).unwrap();
    }

    fn receive(&self, from: usize, len: usize) -> Ticket {
        let mut inbox = self.from[from].lock().unwrap();
        inbox.asked.push(len);
        Ticket { from, number: inbox.asked.len() as u64 - 1 }
    }

    fn wait(&self, ticket: Ticket) -> Vec<u32> {
        let mut inbox = self.from[ticket.from].lock().unwrap();
        loop {
            if let Some(words) = inbox.arrived.remove(&ticket.number) {
                assert_eq!(words.len(), inbox.asked[ticket.number as usize], "{ticket:?}");
                return words;
            }
            let words = inbox.receiver.recv_timeout(Duration::from_secs(60)).unwrap();
            let number = inbox.read;
            inbox.read += 1;
            inbox.arrived.insert(number, words);
        }
    }
}

/// Large enough that its matrices lie on several ranks; of the family with the most kinds of parameters.
fn model_config() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 96, "head_dim": 24,
        "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 600, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "query_pre_attn_scalar": 24,
        "sliding_window": 8, "sliding_window_pattern": 2, "bos_token_id": 1, "eos_token_id": 2,
    })
}

/// Pairs of random tokens of very different lengths.
fn pairs(count: usize) -> Vec<Example> {
    let token = |i: usize, j: usize| (mix(i as u64, j as u64) % 590) as u32;
    let side = |i: usize, which: usize| {
        let prompt = 3 + 5 * (i % 3);
        let tokens: Vec<u32> = (0..prompt)
            .map(|j| token(i, j))
            .chain((0..4 + 3 * (i % 5)).map(|j| token(i + 100 * (which + 1), j)))
            .collect();
        Sequence { trained: vec![prompt..tokens.len()], tokens, prompt }
    };
    (0..count).map(|i| Example { record: i, sequences: vec![side(i, 0), side(i, 1)] }).collect()
}

/// What is trained, and how.
#[derive(Clone, Copy)]
struct Task {
    strategy: Strategy,
    shards: Option<usize>,
    precision: Precision,
    lora: bool,
    /// Adapters in the first block only, and nothing else.
    some: bool,
    /// The reference is another model, not the one before the first step.
    reference: bool,
    objective: Objective,
    /// Stops after this step; after none while the reference is computed, once so many pairs are done.
    until: u64,
    pairs: usize,
}

const DPO: Objective = Objective::Dpo(Dpo { beta: 0.5, label_smoothing: 0.0 });
const TASK: Task = Task {
    strategy: Strategy::Ddp,
    shards: None,
    precision: Precision::F32,
    lora: false,
    some: false,
    reference: false,
    objective: DPO,
    until: u64::MAX,
    pairs: 0,
};

/// Trains on `size` ranks; the last has two threads.
fn train(out: &Path, size: usize, task: Task) {
    let ranks = Threads::all(size).into_iter().enumerate();
    let threads: Vec<_> = ranks
        .map(|(rank, link)| {
            let out = out.to_owned();
            thread::spawn(move || of_rank(&out, Arc::new(link), 1 + usize::from(rank + 1 == size), task))
        })
        .collect();
    for thread in threads {
        let expected =
            if task.until <= 6 { Outcome::Stopped(task.until) } else { Outcome::Finished(out.join("final")) };
        assert_eq!(thread.join().unwrap(), expected);
    }
}

fn of_rank(out: &Path, link: Arc<dyn Link>, threads: usize, task: Task) -> Outcome {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let tokens = checkpoint::open(&fixtures.join("chat-tiny")).unwrap();
    let processor = Processor::open(&tokens, 1000, None, chrono::DateTime::UNIX_EPOCH).unwrap();
    let json = model_config();
    let config = Config::from_json(&json).unwrap();
    let base = checkpoint::open(&fixtures.join("llama-tiny")).unwrap();
    let lora = Lora {
        rank: 4,
        alpha: 8.0,
        dropout: 0.1,
        targets: if task.some {
            Targets::Named(vec!["layers.0.mlp.up_proj".into()])
        } else {
            Targets::AllLinear
        },
        modules_to_save: if task.some { vec![] } else { vec!["embed_tokens".into()] },
        ..Lora::default()
    };
    let adapted = Adapted { lora: &lora, adapter: None, quantise: Quantise::None };
    let mut examples = pairs(10);
    if task.lora || task.reference {
        let tokens = examples.iter_mut().flat_map(|e| &mut e.sequences).flat_map(|s| &mut s.tokens);
        tokens.for_each(|token| *token %= base.config["vocab_size"].as_u64().unwrap() as u32);
    }
    let prompts = [("?".to_owned(), vec![3, 4, 5])];
    let stop = AtomicBool::new(false);
    let first = link.rank() == 0;
    let setup = Run {
        out,
        manifest: json!({ "run": {} }),
        start: if task.lora { Start::Adapted(&base, adapted) } else { Start::Fresh(&config, &json) },
        processor: &processor,
        objective: task.objective,
        settings: TrainerSettings {
            schedule: Schedule { scheduler: Scheduler::Linear, learning_rate: 1e-3, warmup: 1, steps: 6 },
            adam: Adam {
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
                max_grad_norm: 1.0,
                lora_plus: 1.0,
            },
            // Shards of several micro-batches, of one record, and at the end of an epoch of none.
            plan: Plan { records: 10, batch: 8, order: Order::Shuffled, seed: 42 },
            microbatch_tokens: 30,
            dropout: Dropout { embedding: 0.1, attention: 0.1, residual: 0.1 },
        },
        examples: &examples,
        eval_examples: Some(&examples[..3]),
        reference: task.reference.then_some(&base),
        cache: None,
        ranks: Ranks::new(link, task.strategy, task.shards).unwrap(),
        samples: Some(Samples { prompts: &prompts, steps: 2, max_new_tokens: 5 }),
        steps: 6,
        stop_after: None,
        eval_steps: 2,
        save_steps: 2,
        keep: 1,
        save_type: SaveType::F32,
        stop: &stop,
    };
    let cpu = Cpu::new(threads, task.precision).unwrap();
    let run = run(&cpu, &setup, &mut |event| {
        let due = match event {
            Event::Reference(pairs, _) => task.until == 0 && pairs >= task.pairs,
            Event::Step(report) => report.step == task.until,
            _ => return,
        };
        // One rank is asked; all stop.
        stop.fetch_or(first && due, Ordering::Relaxed);
    });
    run.unwrap()
}

/// The lines of metrics without what differs from run to run.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "tokens_per_second", "peak_rss_bytes", "computed_tokens"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    text.lines().map(line).collect()
}

fn weights(run: &Path, lora: bool) -> Vec<u8> {
    let name = if lora { "adapter_model.safetensors" } else { "model.safetensors" };
    std::fs::read(run.join("final").join(name)).unwrap()
}

/// Every way to train on several ranks gives the losses, gradient norms and evaluations of one, to rounding.
#[test]
fn ranks_do_what_one_does() {
    let folder = tempfile::tempdir().unwrap();
    for (objective, precision, lora, some) in [
        (DPO, Precision::F32, false, false),
        (Objective::Sft, Precision::F32, false, false),
        (DPO, Precision::F32, true, false),
        (DPO, Precision::F32, true, true),
        (DPO, Precision::Bf16, false, false),
    ] {
        let task = Task { objective, precision, lora, some, ..TASK };
        let name = |size, strategy| {
            folder.path().join(format!("{objective:?}{precision:?}{lora}{some}{size}{strategy:?}"))
        };
        let alone = name(1, Strategy::Ddp);
        train(&alone, 1, task);
        for (size, strategy) in [
            (1, Strategy::Fsdp),
            (2, Strategy::Ddp),
            (3, Strategy::Zero1),
            (2, Strategy::Fsdp),
            (4, Strategy::Fsdp),
            (4, Strategy::Ddp),
        ] {
            let out = name(size, strategy);
            train(&out, size, Task { strategy, ..task });
            let bound = if precision == Precision::F32 { 2e-5 } else { 2e-2 };
            let (one, many) = (metrics(&alone), metrics(&out));
            assert_eq!(one.len(), many.len());
            for (one, many) in one.iter().zip(many) {
                for (key, value) in one.as_object().unwrap() {
                    let (a, b) = (value.as_f64().unwrap(), many[key].as_f64().unwrap());
                    assert!((a - b).abs() <= bound * (1.0 + a.abs()), "{out:?} {key}: {a} {b}");
                }
            }
        }
    }
}

/// With a fixed number of shards, every number of ranks and every strategy gives the same bits, in metrics and weights,
/// also when a run goes on with another number.
#[test]
fn fixed_shards_give_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for (precision, lora, reference) in [
        (Precision::F32, false, false),
        (Precision::Bf16, false, false),
        (Precision::F32, true, false),
        (Precision::Bf16, false, true),
    ] {
        let task = Task { shards: Some(4), precision, lora, reference, ..TASK };
        let name = |name: String| folder.path().join(format!("{precision:?}{lora}{reference}{name}"));
        let alone = name("alone".into());
        train(&alone, 1, task);
        let same = |out: &Path| {
            assert_eq!(metrics(out), metrics(&alone), "{out:?}");
            assert!(weights(out, lora) == weights(&alone, lora), "{out:?}");
            let samples = |run: &Path| std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
            assert_eq!(samples(out), samples(&alone), "{out:?}");
        };
        for strategy in [Strategy::Ddp, Strategy::Zero1, Strategy::Fsdp] {
            for size in [2, 4] {
                let out = name(format!("{strategy:?}{size}"));
                train(&out, size, Task { strategy, ..task });
                same(&out);
            }
            let out = name(format!("{strategy:?} resumed"));
            train(&out, 2, Task { strategy, until: 3, ..task });
            train(&out, 4, Task { strategy, ..task });
            same(&out);
        }
    }
}

/// One rank is asked to stop while all compute the reference: none waits for another, and the run goes on.
#[test]
fn a_stop_while_the_reference_is_computed_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("alone");
    train(&alone, 1, TASK);
    for strategy in [Strategy::Ddp, Strategy::Fsdp] {
        // Before the first round, in it, and in the last one.
        for pairs in [0, 1, 9] {
            let out = folder.path().join(format!("{strategy:?}{pairs}"));
            train(&out, 3, Task { strategy, until: 0, pairs, ..TASK });
            assert!(!out.join("metrics.jsonl").exists());
            train(&out, 3, Task { strategy, ..TASK });
            assert_eq!(metrics(&out).len(), metrics(&alone).len());
        }
    }
}
