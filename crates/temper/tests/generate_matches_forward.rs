//! Cached decoding against the full forward pass, token by token, with shared prompts and a sliding window.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;

use temper::checkpoint;
use temper::data::{Forest, Sequence};
use temper::generate::{Answer, Options, Sampling, choose, generate};
use temper::model::decoder::StepDropout;
use temper::model::{Decoder, Source};
use temper_kernels::{Cpu, Device, Plain, Precision};

/// Continues `prompt` by running everything again for each token.
fn slow<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    prompt: &[u32],
    index: u64,
    options: &Options,
) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for position in 0..options.max_new_tokens as u64 {
        let n = tokens.len();
        let sequence = Sequence { tokens: [&tokens[..], &[0]].concat(), trained: vec![n..n + 1], prompt: n };
        let forest = Forest::new([&sequence]);
        let mut a = decoder.activations(device, forest.rows(), false);
        decoder.forward(device, &forest, StepDropout::default(), None, &mut a);
        let mut logits = device.zeros(forest.target_rows.len() * decoder.config.vocabulary);
        decoder.logits(device, &mut logits, &forest, &a);
        tokens.push(choose(&device.download(&logits), &options.sampling, index, position));
    }
    tokens[prompt.len()..].to_vec()
}

fn check<D: Device>(device: &D, name: &str, sampling: Sampling) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    let decoder = Source::trained(&checkpoint::open(&folder).unwrap()).unwrap().whole(device).unwrap();
    let options = Options { max_new_tokens: 20, sampling, stop: Vec::new() };
    let shared = [vec![5, 6, 7, 8, 9], vec![5, 6, 7, 8, 9], vec![5, 6, 3], vec![5, 6], vec![40]];
    // So many that they are multiplied another way, until some of them end.
    let prompts: Vec<Vec<u32>> = shared.into_iter().chain((10..20).map(|token| vec![5, token])).collect();
    let longest = |i: usize| if i < 5 { 20 } else { i };
    let mut seen = vec![Vec::new(); prompts.len()];
    let answers = generate(device, &decoder, &prompts, &options, &mut |i, token| {
        seen[i].push(token);
        seen[i].len() < longest(i)
    })
    .unwrap();
    for (i, (answer, prompt)) in answers.iter().zip(&prompts).enumerate() {
        let expected = slow(device, &decoder, prompt, i as u64, &options);
        assert_eq!(answer.tokens, expected[..longest(i)], "{name} {i}");
        assert_eq!(answer.tokens, seen[i]);
    }
}

#[test]
fn cached_decoding_is_the_full_forward() {
    let warm = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, seed: 3 };
    for name in ["gpt2-tiny", "llama3-tiny", "mistral-tiny", "qwen3-tiny", "smollm3-tiny", "gemma3-tiny"] {
        for sampling in [Sampling::GREEDY, warm] {
            check(&Plain, name, sampling);
            check(&Cpu::new(2, Precision::F32).unwrap(), name, sampling);
        }
    }
}

#[test]
fn stops_and_limits_end_an_answer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/llama-tiny");
    let decoder = Source::trained(&checkpoint::open(&folder).unwrap()).unwrap().whole(&Plain).unwrap();
    let free = Options { max_new_tokens: 8, sampling: Sampling::GREEDY, stop: Vec::new() };
    let run = |prompt: Vec<u32>, options: &Options| {
        generate(&Plain, &decoder, &[prompt], options, &mut |_, _| true)
    };
    let all = run(vec![1, 2], &free).unwrap().remove(0).tokens;
    let stop = all[3];
    let first = all.iter().position(|&token| token == stop).unwrap();
    let stopped = run(vec![1, 2], &Options { stop: vec![stop], ..free.clone() }).unwrap().remove(0);
    assert_eq!(stopped, Answer { tokens: all[..first].to_vec(), stopped_by: Some(stop) });
    let context = decoder.config.context;
    assert_eq!(run(vec![1; context - 3], &free).unwrap()[0].tokens.len(), 3, "the context is full");
    assert!(run(vec![1; context], &free).is_err());
    assert!(run(Vec::new(), &free).is_err());
}
