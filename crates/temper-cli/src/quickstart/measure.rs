//! What a stage can do on questions it never saw.

use anyhow::Result;
use temper::data::Example;
use temper::generate::{self, Options, Sampling};
use temper::model::Decoder;
use temper::objective::Pair;
use temper::score::score;
use temper::text::Processor;
use temper_kernels::Cpu;

use super::world::{Question, is_friendly};

/// Prompts that are answered at a time.
const TOGETHER: usize = 64;

/// Longest answer in tokens.
pub const ANSWER: usize = 16;

/// A stage on the held-out questions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Share of greedy answers that are right.
    pub right: f64,
    /// Share of sampled answers in the friendly manner.
    pub friendly: f64,
}

/// Held-out preferences under a policy.
#[derive(Debug, Clone, Copy)]
pub struct Preferred {
    /// Share of pairs whose friendly answer has the higher reward.
    pub accuracy: f64,
    /// Mean margin of the rewards.
    pub margin: f64,
}

/// An answer to each prompt, of at most `longest` tokens.
pub fn answers(
    device: &Cpu,
    decoder: &Decoder<Cpu>,
    processor: &Processor,
    prompts: &[Vec<u32>],
    longest: usize,
    sampling: Sampling,
) -> Result<Vec<String>> {
    let options = Options { max_new_tokens: longest, sampling, stop: processor.stop.clone() };
    let batches = generate::answers(device, decoder, processor, prompts, &options, TOGETHER);
    let replies = batches.collect::<temper::Result<Vec<_>>>()?.concat();
    Ok(replies.into_iter().map(|reply| reply.text).collect())
}

/// Tokens of the questions, up to where their answers begin.
pub fn prompts(processor: &Processor, questions: &[Question]) -> Result<Vec<Vec<u32>>> {
    questions.iter().map(|question| Ok(processor.prompt(&question.prompt())?)).collect()
}

/// Asks every question twice: greedily for what is right, and drawing for the manner.
pub fn measure(
    device: &Cpu,
    decoder: &Decoder<Cpu>,
    processor: &Processor,
    questions: &[Question],
    seed: u64,
) -> Result<Measured> {
    let prompts = prompts(processor, questions)?;
    let greedy = answers(device, decoder, processor, &prompts, ANSWER, Sampling::GREEDY)?;
    let drawn = answers(
        device,
        decoder,
        processor,
        &prompts,
        ANSWER,
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed },
    )?;
    let share = |count: usize| count as f64 / questions.len() as f64;
    Ok(Measured {
        right: share(
            greedy.iter().zip(questions).filter(|(answer, question)| question.is_right(answer)).count(),
        ),
        friendly: share(drawn.iter().filter(|answer| is_friendly(answer)).count()),
    })
}

/// Log-probabilities of pairs `[chosen, rejected]`.
pub fn logps(device: &Cpu, decoder: &Decoder<Cpu>, pairs: &[Example]) -> Vec<Pair> {
    let groups: Vec<_> = pairs.iter().map(|pair| &pair.sequences[..]).collect();
    let scores = score(device, decoder, &groups, 2048, |_| true);
    scores.iter().map(|scores| Pair { chosen: scores[0].logp, rejected: scores[1].logp }).collect()
}

/// The rewards of a policy against its reference, scaled by β.
pub fn preferred(policy: &[Pair], reference: &[Pair], beta: f64) -> Preferred {
    let margin = |(policy, reference): (&Pair, &Pair)| {
        beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    };
    let margins: Vec<f64> = policy.iter().zip(reference).map(margin).collect();
    let count = margins.len() as f64;
    Preferred {
        accuracy: margins.iter().filter(|&&margin| margin > 0.0).count() as f64 / count,
        margin: margins.iter().sum::<f64>() / count,
    }
}

/// Accuracy of always giving the commonest answer.
pub fn majority(questions: &[Question]) -> f64 {
    let mut counts = std::collections::HashMap::new();
    for question in questions {
        *counts.entry(&question.answer).or_insert(0usize) += 1;
    }
    counts.into_values().max().unwrap_or(0) as f64 / questions.len() as f64
}
