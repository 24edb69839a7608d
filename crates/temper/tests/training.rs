//! Training as a whole: what must not change its numbers, what stops it, what a run directory keeps.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use temper::checkpoint::{self, Checkpoint, save::SaveType};
use temper::data::order::{Order, Plan};
use temper::data::{Example, Sequence};
use temper::model::weights::Parameter;
use temper::model::{Config, Decoder, Source, config::Dropout};
use temper::objective::{Dpo, Pair};
use temper::optim::{Adam, Schedule, Scheduler};
use temper::parallel::Ranks;
use temper::text::Processor;
use temper::train::directory::{Ended, ended};
use temper::train::reference::{Cache, ReferencePass};
use temper::train::{Error, Event, Objective, Outcome, Run, Start, Trainer, TrainerSettings, run};
use temper_kernels::cpu::Weight;
use temper_kernels::{Cpu, Device, Plain, Precision, mix};

fn model(name: &str) -> Checkpoint {
    checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)).unwrap()
}

/// Pairs of random tokens, some prompts shared.
fn pairs(count: usize) -> Vec<Example> {
    let token = |i: usize, j: usize| (mix(i as u64, j as u64) % 90) as u32;
    let side = |i: usize, which: usize| {
        let prompt = 4 + i % 3;
        let tokens: Vec<u32> = (0..prompt)
            .map(|j| token(i / 2, j))
            .chain((0..5 + i % 4).map(|j| token(i + 100 * (which + 1), j)))
            .collect();
        Sequence { trained: vec![prompt..tokens.len()], tokens, prompt }
    };
    (0..count).map(|i| Example { record: i, sequences: vec![side(i, 0), side(i, 1)] }).collect()
}

fn settings(records: usize, microbatch_tokens: usize) -> TrainerSettings {
    TrainerSettings {
        schedule: Schedule { scheduler: Scheduler::Linear, learning_rate: 1e-3, warmup: 1, steps: 6 },
        adam: Adam {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            lora_plus: 1.0,
        },
        plan: Plan { records, batch: 4, order: Order::Shuffled, seed: 42 },
        microbatch_tokens,
        dropout: Dropout { embedding: 0.1, attention: 0.1, residual: 0.1 },
    }
}

/// Reference log-probabilities of these groups, without a cache.
fn reference<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    examples: &[Example],
    groups: &[Vec<usize>],
    budget: usize,
) -> Vec<Pair> {
    let ranks = &Ranks::alone();
    ReferencePass { device, decoder, examples, groups, budget, cache: None, ranks }.run(|_, _| true).pairs
}

const DPO: Objective = Objective::Dpo(Dpo { beta: 0.5, label_smoothing: 0.0 });

/// Losses of six steps and the final weights.
fn train<D: Device>(device: &D, objective: Objective, microbatch_tokens: usize) -> (Vec<f64>, Vec<f32>) {
    let examples = pairs(10);
    let decoder = Source::trained(&model("gpt2-tiny")).unwrap().whole(device).unwrap();
    let every: Vec<usize> = (0..examples.len()).collect();
    let references = reference(device, &decoder, &examples, &[every], 50);
    let settings = settings(examples.len(), microbatch_tokens);
    let mut trainer = Trainer::new(device, decoder, objective, settings, &examples, &Ranks::alone());
    let step = |records: Vec<usize>| {
        trainer.step(&examples, &records, &references, &AtomicBool::new(false)).unwrap().unwrap().metrics.loss
    };
    let losses = settings.plan.steps(0..6).map(step).collect();
    let weights = trainer
        .decoder
        .weights
        .parameters()
        .into_iter()
        .flat_map(|parameter| match parameter {
            Parameter::Vector(x) => device.download(x).into_owned(),
            Parameter::Matrix(x) => device.weight_values(x).into_owned(),
        })
        .collect();
    (losses, weights)
}

#[test]
fn the_micro_batch_split_changes_nothing() {
    for objective in [Objective::Sft, DPO] {
        let (losses, weights) = train(&Plain, objective, 1000);
        for budget in [1, 30] {
            let (split_losses, split_weights) = train(&Plain, objective, budget);
            assert!(
                losses.iter().zip(&split_losses).all(|(a, b)| (a - b).abs() < 1e-12),
                "{objective:?}: {losses:?} {split_losses:?}"
            );
            assert!(weights.iter().zip(&split_weights).all(|(a, b)| (a - b).abs() <= 1e-6));
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for objective in [Objective::Sft, DPO] {
        let bits = |threads| {
            train(&Cpu::new(threads, Precision::F32).unwrap(), objective, 40)
                .1
                .iter()
                .map(|x| x.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(1), bits(2));
    }
}

#[test]
fn a_policy_that_is_its_reference_starts_at_ln_2() {
    let examples = pairs(4);
    let cpu = Cpu::new(1, Precision::F32).unwrap();
    let decoder = Source::trained(&model("llama-tiny")).unwrap().whole(&cpu).unwrap();
    let references = reference(&cpu, &decoder, &examples, &[vec![0, 1, 2, 3]], 1000);
    let still = TrainerSettings { dropout: Dropout::default(), ..settings(4, 1000) };
    let mut trainer = Trainer::new(&cpu, decoder, DPO, still, &examples, &Ranks::alone());
    let report =
        trainer.step(&examples, &[0, 1, 2, 3], &references, &AtomicBool::new(false)).unwrap().unwrap();
    assert!((report.metrics.loss - std::f64::consts::LN_2).abs() < 1e-6, "{}", report.metrics.loss);
    assert_eq!(report.learning_rate, 0.0, "a warmup starts at 0");
}

#[test]
fn a_number_that_is_not_finite_stops_before_the_update() {
    let cpu = Cpu::new(1, Precision::F32).unwrap();
    let mut decoder = Source::trained(&model("llama-tiny")).unwrap().whole(&cpu).unwrap();
    let Weight::F32(down) = &mut decoder.weights.blocks[1].down.weight else { panic!() };
    down[5] = f32::NAN;
    let examples = pairs(4);
    let mut trainer =
        Trainer::new(&cpu, decoder, Objective::Sft, settings(4, 1000), &examples, &Ranks::alone());
    let before = trainer.decoder.weights.embedding.clone();
    let error = trainer.step(&examples, &[2, 0], &[], &AtomicBool::new(false)).unwrap_err();
    let message = error.to_string();
    let Error::NonFinite { step: 1, records, .. } = error else { panic!("{message}") };
    assert_eq!(records, [2, 0]);
    assert!(message.contains("model.embed_tokens.weight"), "{message}");
    assert_eq!(trainer.decoder.weights.embedding, before);
}

#[test]
fn the_reference_is_cached_by_content_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let examples = pairs(6);
    let decoder = Source::trained(&model("llama-tiny")).unwrap().whole(&Plain).unwrap();
    let cache = Cache { folder: folder.path().join("made"), key: "k".into() };
    let computed = |decoder: &Decoder<Plain>, groups: &[&[usize]]| {
        let mut computed = 0;
        let pass = ReferencePass {
            device: &Plain,
            decoder,
            examples: &examples,
            groups: &groups.iter().map(|group| group.to_vec()).collect::<Vec<_>>(),
            budget: 50,
            cache: Some(&cache),
            ranks: &Ranks::alone(),
        };
        let reference = pass.run(|_, total| {
            computed = total;
            true
        });
        reference.kept.unwrap();
        (computed, reference.pairs)
    };
    let (first, values) = computed(&decoder, &[&[0], &[1, 2]]);
    assert_eq!((first, values[5]), (3, Pair { chosen: 0.0, rejected: 0.0 }));
    assert_eq!(computed(&decoder, &[&[0], &[1, 2]]), (0, values.clone()));
    assert_eq!(computed(&decoder, &[&[3], &[0], &[1, 2]]).0, 1, "only what is new");
    assert_eq!(computed(&decoder, &[&[1], &[2, 1]]).0, 3, "what is computed together decides the last bits");
    let file = folder.path().join("made/reference-k.bin");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[70] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(computed(&decoder, &[&[0], &[3]]).0, 2, "a damaged cache is computed again");
    let mut other = decoder;
    other.weights.embedding.iter_mut().for_each(|x| *x *= 1.5);
    assert_eq!(computed(&other, &[&[0], &[3]]).0, 2, "a cache of other weights is computed again");
}

/// The chosen answer of two pairs, whose last bits differ: dot products of few rows, and tiles of many.
#[test]
fn the_cache_gives_each_group_its_own_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let mut examples = pairs(12);
    examples[1].sequences[0] = examples[0].sequences[0].clone();
    let cpu = Cpu::new(1, Precision::F32).unwrap();
    let pass = ReferencePass {
        device: &cpu,
        decoder: &Source::trained(&model("llama-tiny")).unwrap().whole(&cpu).unwrap(),
        examples: &examples,
        groups: &[[vec![0], (2..12).collect()].concat(), vec![1]],
        budget: 1000,
        cache: Some(&Cache { folder: folder.path().into(), key: "k".into() }),
        ranks: &Ranks::alone(),
    };
    let computed = pass.run(|_, _| true).pairs;
    assert_ne!(computed[0].chosen, computed[1].chosen, "else nothing is tested");
    assert_eq!(pass.run(|_, total| panic!("{total} were not in the cache")).pairs, computed);
}

#[test]
fn passes_at_the_same_time_keep_what_each_other_found() {
    let folder = tempfile::tempdir().unwrap();
    let examples = pairs(2);
    let decoder = Source::trained(&model("llama-tiny")).unwrap().whole(&Plain).unwrap();
    let cache = Cache { folder: folder.path().into(), key: "k".into() };
    let pass = |groups: &[Vec<usize>], progress: &mut dyn FnMut(usize)| {
        let (device, examples, ranks) = (&Plain, &examples[..], &Ranks::alone());
        let pass = ReferencePass {
            device,
            decoder: &decoder,
            examples,
            groups,
            budget: 50,
            cache: Some(&cache),
            ranks,
        };
        let found = pass.run(|_, total| {
            progress(total);
            true
        });
        found.kept.unwrap();
    };
    let [one, other] = [0, 1].map(|example| [vec![example]]);
    pass(&one, &mut |_| pass(&other, &mut |_| ()));
    pass(&[one, other].concat(), &mut |total| panic!("{total} were lost"));
}

#[test]
fn a_reference_pass_ends_when_it_is_asked_to() {
    let examples = pairs(6);
    let pass = ReferencePass {
        device: &Plain,
        decoder: &Source::trained(&model("llama-tiny")).unwrap().whole(&Plain).unwrap(),
        examples: &examples,
        groups: &(0..6).map(|i| vec![i]).collect::<Vec<_>>(),
        budget: 50,
        cache: None,
        ranks: &Ranks::alone(),
    };
    let mut asked = Vec::new();
    let reference = pass.run(|done, _| {
        asked.push(done);
        done < 2
    });
    assert_eq!(asked, [0, 1, 2]);
    assert!(reference.pairs[1].chosen < 0.0 && reference.pairs[2].chosen == 0.0);
}

fn start_run(out: &Path, learning_rate: f64, seen: &mut Vec<String>) -> temper::Result<Outcome> {
    run_until(out, learning_rate, "", seen)
}

/// A run that is asked to stop when it comes to an event.
fn run_until(out: &Path, learning_rate: f64, last: &str, seen: &mut Vec<String>) -> temper::Result<Outcome> {
    let stop = AtomicBool::new(false);
    let model = model("chat-tiny");
    let processor = Processor::open(&model, 1000, None, chrono::DateTime::UNIX_EPOCH).unwrap();
    let examples = pairs(10);
    let settings = settings(examples.len(), 1000);
    let schedule = Schedule { learning_rate, ..settings.schedule };
    let setup = Run {
        out,
        manifest: json!({ "run": { "learning_rate": learning_rate }, "threads": 1 }),
        start: Start::Checkpoint(&model),
        processor: &processor,
        objective: DPO,
        settings: TrainerSettings { schedule, ..settings },
        examples: &examples,
        eval_examples: Some(&examples[..3]),
        reference: None,
        cache: None,
        ranks: Ranks::alone(),
        samples: None,
        steps: 6,
        stop_after: None,
        eval_steps: 2,
        save_steps: 2,
        keep: 1,
        save_type: SaveType::F32,
        stop: &stop,
    };
    run(&Cpu::new(1, Precision::F32).unwrap(), &setup, &mut |event| {
        let event = match event {
            Event::Step(report) => format!("step {}", report.step),
            Event::Resumed(step) => format!("resumed {step}"),
            Event::Evaluated(step, _) => format!("evaluated {step}"),
            Event::Saved(path) => format!("saved {}", path.file_name().unwrap().to_str().unwrap()),
            Event::LostTensorBoard(error) => format!("lost {error}"),
            Event::LostCache(error) => format!("lost {error}"),
            Event::Sampled(step, _) => format!("sampled {step}"),
            Event::Reference(done, _) => format!("reference {done}"),
        };
        stop.fetch_or(event == last, Ordering::Relaxed);
        if !event.starts_with("reference") {
            seen.push(event);
        }
    })
}

#[test]
fn a_run_leaves_what_it_should_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, broken]: [PathBuf; 2] = ["whole", "broken"].map(|name| folder.path().join(name));
    let mut seen = Vec::new();
    assert_eq!(start_run(&whole, 1e-3, &mut seen).unwrap(), Outcome::Finished(whole.join("final")));
    let expected = [
        "evaluated 0",
        "step 1",
        "step 2",
        "evaluated 2",
        "saved step-2",
        "step 3",
        "step 4",
        "evaluated 4",
        "saved step-4",
        "step 5",
        "step 6",
        "evaluated 6",
        "saved final",
    ];
    assert_eq!(seen, expected);
    assert!(
        whole.join("checkpoints/step-4/DONE").exists() && !whole.join("checkpoints/step-2").exists(),
        "keep 1"
    );

    // As if killed after step 5: metrics are ahead of the checkpoint, the last line is torn, there is no final.
    start_run(&broken, 1e-3, &mut Vec::new()).unwrap();
    std::fs::remove_dir_all(broken.join("final")).unwrap();
    let metrics = std::fs::read_to_string(broken.join("metrics.jsonl")).unwrap();
    std::fs::write(broken.join("metrics.jsonl"), &metrics[..metrics.len() - 20]).unwrap();
    let mut seen = Vec::new();
    start_run(&broken, 1e-3, &mut seen).unwrap();
    assert_eq!(seen, ["resumed 4", "step 5", "step 6", "evaluated 6", "saved final"]);
    let weights = |out: &Path| std::fs::read(out.join("final/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&broken), "resume changes no bit");
    let steps = |out: &Path| {
        std::fs::read_to_string(out.join("metrics.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(steps(&broken), [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]);

    let mut seen = Vec::new();
    assert_eq!(start_run(&whole, 1e-3, &mut seen).unwrap(), Outcome::AlreadyFinished(whole.join("final")));
    assert!(seen.is_empty());
    let message = start_run(&whole, 2e-3, &mut seen).unwrap_err().to_string();
    assert!(message.contains("learning_rate: 0.001 there, 0.002 now"), "{message}");

    // A manifest that cannot be read is not the absence of one.
    let metrics = std::fs::read(whole.join("metrics.jsonl")).unwrap();
    std::fs::remove_file(whole.join("manifest.json")).unwrap();
    std::fs::create_dir(whole.join("manifest.json")).unwrap();
    let message = start_run(&whole, 1e-3, &mut seen).unwrap_err().to_string();
    assert!(message.contains("cannot read manifest.json"), "{message}");
    assert!(std::fs::read(whole.join("metrics.jsonl")).unwrap() == metrics);
}

#[test]
fn a_run_that_is_stopped_saves_the_step_in_progress_and_goes_on_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, stopped]: [PathBuf; 2] = ["whole", "stopped"].map(|name| folder.path().join(name));
    start_run(&whole, 1e-3, &mut Vec::new()).unwrap();
    for (last, outcome, expected) in [
        ("reference 4", 0, &[][..]),
        (
            "step 3",
            3,
            &["evaluated 0", "step 1", "step 2", "evaluated 2", "saved step-2", "step 3", "saved step-3"],
        ),
        ("reference 0", 3, &[]),
        // Before an evaluation that is due: it is made up for when the run goes on, also after the last step.
        ("step 4", 4, &["resumed 3", "step 4", "saved step-4"]),
        ("evaluated 4", 4, &["resumed 4", "evaluated 4"]),
        ("step 6", 6, &["resumed 4", "step 5", "step 6", "saved step-6"]),
    ] {
        let mut seen = Vec::new();
        assert_eq!(run_until(&stopped, 1e-3, last, &mut seen).unwrap(), Outcome::Stopped(outcome), "{last}");
        assert_eq!(seen, expected, "{last}");
        assert_eq!(ended(&stopped), Some(Ended::Stopped(outcome)));
    }
    let mut seen = Vec::new();
    // Too late: all is done but for writing it.
    let outcome = run_until(&stopped, 1e-3, "evaluated 6", &mut seen).unwrap();
    assert_eq!(outcome, Outcome::Finished(stopped.join("final")));
    assert_eq!(seen, ["resumed 6", "evaluated 6", "saved final"]);
    assert_eq!(ended(&stopped), None);
    let weights = |out: &Path| std::fs::read(out.join("final/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&stopped), "stopping changes no bit");
    let losses = |out: &Path| {
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines
            .map(|line| (line["step"].clone(), line["loss"].clone(), line["eval_loss"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(losses(&whole), losses(&stopped));
}

#[test]
fn a_run_that_fails_leaves_why() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let message = start_run(&out, f64::NAN, &mut Vec::new()).unwrap_err().to_string();
    assert!(message.contains("is not finite"), "{message}");
    assert_eq!(ended(&out), Some(Ended::Failed(message)));
}

/// TRL's `mean_token_accuracy` is of the chosen answers, its `entropy` of both.
#[test]
fn entropy_is_of_both_answers() {
    let decoder = || Source::trained(&model("gpt2-tiny")).unwrap().whole(&Plain).unwrap();
    let evaluate = |objective, examples: &[Example], reference: &[Pair]| {
        let (settings, alone) = (settings(examples.len(), 1000), Ranks::alone());
        let mut trainer = Trainer::new(&Plain, decoder(), objective, settings, examples, &alone);
        trainer.evaluate(examples, reference, &AtomicBool::new(false)).unwrap()
    };
    let pairs = pairs(5);
    let of_pairs = evaluate(DPO, &pairs, &[Pair { chosen: 0.0, rejected: 0.0 }; 5]);
    let alone = |sequence: &Sequence| Example { record: 0, sequences: vec![sequence.clone()] };
    let both: Vec<Example> = pairs.iter().flat_map(|pair| &pair.sequences).map(alone).collect();
    let chosen: Vec<Example> = pairs.iter().map(|pair| alone(&pair.sequences[0])).collect();
    let [both, chosen] = [both, chosen].map(|examples| evaluate(Objective::Sft, &examples, &[]));
    assert!((of_pairs.entropy - both.entropy).abs() < 1e-12 && (both.entropy - chosen.entropy).abs() > 1e-6);
    assert!((of_pairs.mean_token_accuracy - chosen.mean_token_accuracy).abs() < 1e-12);
}

#[test]
fn fresh_matrices_have_the_deviation_of_the_configuration() {
    let mut json = model("llama-tiny").config;
    json["initializer_range"] = json!(0.3);
    let config = Config::from_json(&json).unwrap();
    let decoder = Source::fresh(config, 1).whole(&Plain).unwrap();
    let deviation = |values: &[f32]| {
        (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    };
    let embedding = deviation(&Plain.weight_values(&decoder.weights.embedding));
    let block = &decoder.weights.blocks[0];
    let [up, down] = [&block.up, &block.down].map(|it| deviation(&Plain.weight_values(&it.weight)));
    let small = 0.3 / (2.0 * decoder.weights.blocks.len() as f64).sqrt();
    for (found, expected) in [(embedding, 0.3), (up, 0.3), (down, small)] {
        assert!((found / expected - 1.0).abs() < 0.1, "{found} {expected}");
    }
}

/// In bf16 a last bit of a sum becomes a step of bf16 in the next layer. The reference pass must therefore take the
/// steps' own batches: the first loss is ln 2 to the rounding of f64.
#[test]
fn the_first_loss_in_bf16_is_ln_2() {
    let cpu = Cpu::new(2, Precision::Bf16).unwrap();
    let examples = pairs(10);
    for budget in [50, 1000] {
        let decoder = Source::trained(&model("llama-tiny")).unwrap().whole(&cpu).unwrap();
        let settings = TrainerSettings { dropout: Dropout::default(), ..settings(examples.len(), budget) };
        let steps: Vec<Vec<usize>> = settings.plan.steps(0..2).collect();
        let references = reference(&cpu, &decoder, &examples, &steps, budget);
        let mut trainer = Trainer::new(&cpu, decoder, DPO, settings, &examples, &Ranks::alone());
        let loss = trainer
            .step(&examples, &steps[0], &references, &AtomicBool::new(false))
            .unwrap()
            .unwrap()
            .metrics
            .loss;
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-12, "{loss}");
    }
}
