//! Generation: the prompts as one forest into a cache, then a token for every answer at a time.

mod sample;

use std::ops::Range;

use temper_kernels::{Device, Segment};

pub use sample::{Sampling, choose};

use crate::data::{Forest, Sequence};
use crate::model::decoder::StepDropout;
use crate::model::{Config, Decoder};
use crate::system;
use crate::text::Processor;

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The prompt leaves no room.
    #[error("the prompt has {tokens} tokens; the model's context is {context}")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the model.
        context: usize,
    },
    /// The keys and values of the answers find no room.
    #[error(
        "{answers} answers of up to {tokens} tokens need {bytes} bytes of keys and values, and there are {available}"
    )]
    NoRoom {
        /// Answers at a time.
        answers: usize,
        /// The most tokens of each.
        tokens: usize,
        /// Of all layers.
        bytes: u64,
        /// Bytes that the system could give.
        available: u64,
    },
    /// The model computes no numbers.
    #[error("the logits after {tokens} tokens are not all finite numbers")]
    NonFinite {
        /// Of prompt and answer.
        tokens: usize,
    },
}

/// What to do about a model whose results are no numbers.
pub const NON_FINITE: &str = "the weights, or an adapter's, hold NaN or infinity, or grew too large in training: take an earlier checkpoint";

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::EmptyPrompt => {
                Some("give a prompt, or a model whose tokenizer begins texts with a token of its own".into())
            }
            Error::TooLong { .. } => Some("shorten the prompt".into()),
            Error::NoRoom { .. } => Some("ask for shorter answers, or for fewer at a time".into()),
            Error::NonFinite { .. } => Some(NON_FINITE.into()),
        }
    }
}

/// How to generate.
#[derive(Debug, Clone)]
pub struct Options {
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
    /// How a token is drawn.
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
}

/// What came out for one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// The token that ended it; none when it was cut at a limit.
    pub stopped_by: Option<u32>,
}

/// An answer in the making and where its keys lie.
#[derive(Debug)]
struct Branch {
    answer: Answer,
    /// Cache rows of the prompt, in the order of the path.
    prompt: Vec<Range<usize>>,
    /// Cache rows set aside for the answer.
    slot: usize,
    /// Number of the prompt's tokens.
    depth: usize,
    done: bool,
}

/// One answer to each prompt. Equal prompts and prefixes are computed once: for several samples, repeat the
/// prompt. `on_token` sees each (answer, token) as it comes, and ends that answer by returning false.
///
/// # Errors
/// When a prompt is empty or fills the context, no memory holds keys and values, or logits are not finite.
pub fn generate<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    prompts: &[Vec<u32>],
    options: &Options,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) -> Result<Vec<Answer>, Error> {
    generate_from(0, device, decoder, prompts, options, on_token)
}

/// The same; the draws are those of answers from number `first` on.
fn generate_from<D: Device>(
    first: usize,
    device: &D,
    decoder: &Decoder<D>,
    prompts: &[Vec<u32>],
    options: &Options,
    on_token: &mut dyn FnMut(usize, u32) -> bool,
) -> Result<Vec<Answer>, Error> {
    let context = decoder.config.context;
    prompts.iter().try_for_each(|prompt| check(prompt, context))?;
    let forest = prompt_forest(prompts);
    let shortest = prompts.iter().map(Vec::len).min().unwrap_or(0);
    let room = options.max_new_tokens.min(context - shortest);
    let rows = forest.rows() + prompts.len() * room;
    check_room(&decoder.config, rows, prompts.len(), room, system::available_memory())?;
    let mut cache = decoder.cache(device, rows);
    let mut a = decoder.activations(device, forest.rows().max(prompts.len()), false);
    decoder.forward(device, &forest, StepDropout::default(), Some(&mut cache), &mut a);
    let mut branches = branches(&forest, prompts, room);
    // The branches that go on, in order, and the row of their logits.
    let mut open: Vec<(usize, usize)> = forest
        .owners
        .iter()
        .zip(&forest.targets)
        .map(|(&owner, target)| (owner as usize, target.row as usize))
        .filter(|&(branch, _)| !branches[branch].done)
        .collect();
    open.sort_unstable();
    let vocabulary = decoder.config.vocabulary;
    let mut logits = device.zeros(prompts.len() * vocabulary);
    let draw_all = |logits: &D::Buffer, branches: &[Branch], open: &[(usize, usize)]| {
        let logits = device.download(logits);
        device.map(open.len(), |i| {
            let (branch, row) = open[i];
            branches[branch].draw(
                first + branch,
                &logits[row * vocabulary..][..vocabulary],
                &options.sampling,
            )
        })
    };
    decoder.logits(device, &mut logits, &forest, &a);
    let mut drawn = draw_all(&logits, &branches, &open);
    loop {
        for (&(branch, _), token) in open.iter().zip(drawn) {
            branches[branch].extend(token?, options, context, &mut |token| on_token(branch, token));
        }
        open =
            (0..branches.len()).filter(|&i| !branches[i].done).enumerate().map(|(row, i)| (i, row)).collect();
        if open.is_empty() {
            return Ok(branches.into_iter().map(|branch| branch.answer).collect());
        }
        let forest = next_tokens(&branches, &open);
        drawn = device.awake(open.len(), || {
            decoder.forward(device, &forest, StepDropout::default(), Some(&mut cache), &mut a);
            decoder.logits(device, &mut logits, &forest, &a);
            draw_all(&logits, &branches, &open)
        });
    }
}

/// Only rows that are written take memory, but one layer's must at least be imaginable: the system ends the process else.
fn check_room(
    config: &Config,
    rows: usize,
    answers: usize,
    tokens: usize,
    available: Option<u64>,
) -> Result<(), Error> {
    let of_layer = (4 * 2 * config.kv_heads * config.head_width) as u64;
    let of_layer = of_layer.saturating_mul(rows as u64);
    match available {
        Some(available) if of_layer > available => {
            let bytes = of_layer.saturating_mul(config.layers.len() as u64);
            Err(Error::NoRoom { answers, tokens, bytes, available })
        }
        _ => Ok(()),
    }
}

/// An answer as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// The number of its tokens.
    pub tokens: usize,
}

/// One answer to each prompt, `together` at a time, which bounds the memory that they need. The random numbers of an answer
/// depend on its number alone; the last bits of its logits also on how many others are still written beside it, since
/// products of a few rows are summed in another order than those of more.
///
/// # Errors
/// When a prompt is empty or fills the context, no memory holds keys and values, or logits are not finite.
pub fn answers<'a, D: Device>(
    device: &'a D,
    decoder: &'a Decoder<D>,
    processor: &'a Processor,
    prompts: &'a [Vec<u32>],
    options: &'a Options,
    together: usize,
) -> impl Iterator<Item = crate::Result<Vec<Reply>>> + 'a {
    prompts
        .chunks(together)
        .enumerate()
        .map(move |(i, prompts)| replies(i * together, device, decoder, processor, prompts, options))
}

/// The answers to these prompts, at a time. The first one's number is `first`.
///
/// # Errors
/// As [`answers`].
pub fn replies<D: Device>(
    first: usize,
    device: &D,
    decoder: &Decoder<D>,
    processor: &Processor,
    prompts: &[Vec<u32>],
    options: &Options,
) -> crate::Result<Vec<Reply>> {
    let answers = generate_from(first, device, decoder, prompts, options, &mut |_, _| true)?;
    let reply = |Answer { tokens, .. }: Answer| {
        Ok(Reply { text: processor.tokenizer.decode(&tokens, true)?, tokens: tokens.len() })
    };
    answers.into_iter().map(reply).collect()
}

/// That a prompt can be continued.
///
/// # Errors
/// When it is empty or fills the context.
pub fn check(prompt: &[u32], context: usize) -> Result<(), Error> {
    match prompt.len() {
        0 => Err(Error::EmptyPrompt),
        tokens if tokens >= context => Err(Error::TooLong { tokens, context }),
        _ => Ok(()),
    }
}

/// The prompts' forest, whose only targets are what follows each prompt.
fn prompt_forest(prompts: &[Vec<u32>]) -> Forest {
    let sequence = |prompt: &Vec<u32>| Sequence {
        tokens: [&prompt[..], &[0]].concat(),
        trained: vec![prompt.len()..prompt.len() + 1],
        prompt: prompt.len(),
    };
    let sequences: Vec<Sequence> = prompts.iter().map(sequence).collect();
    Forest::new(&sequences)
}

fn branches(forest: &Forest, prompts: &[Vec<u32>], room: usize) -> Vec<Branch> {
    let mut last_rows = vec![0; prompts.len()];
    for (&owner, target) in forest.owners.iter().zip(&forest.targets) {
        last_rows[owner as usize] = forest.target_rows[target.row as usize] as usize;
    }
    let path = |row: usize| -> Vec<Range<usize>> {
        let segment = forest.segments.iter().find(|segment| segment.rows.contains(&row));
        segment.map_or_else(Vec::new, |segment| {
            segment.context.iter().cloned().chain([segment.rows.start..row + 1]).collect()
        })
    };
    let branch = |(i, row): (usize, usize)| Branch {
        answer: Answer::default(),
        prompt: path(row),
        slot: forest.rows() + i * room,
        depth: prompts[i].len(),
        done: room == 0,
    };
    last_rows.into_iter().enumerate().map(branch).collect()
}

/// One row for each of these branches: its newest token, seeing its prompt and its earlier tokens.
fn next_tokens(branches: &[Branch], open: &[(usize, usize)]) -> Forest {
    let mut forest = Forest { sequences: open.len(), ..Forest::default() };
    for &(branch, row) in open {
        let branch = &branches[branch];
        let earlier = branch.answer.tokens.len() - 1;
        let own = branch.slot + earlier;
        let mut context = branch.prompt.clone();
        if earlier > 0 {
            context.push(branch.slot..own);
        }
        forest.tokens.push(branch.answer.tokens[earlier]);
        forest.positions.push((branch.depth + earlier) as u32);
        forest.segments.push(Segment { rows: row..row + 1, context, own });
        forest.target_rows.push(row as u32);
    }
    forest
}

impl Branch {
    /// The next token of the answer with this number.
    fn draw(&self, number: usize, logits: &[f32], sampling: &Sampling) -> Result<u32, Error> {
        let tokens = self.answer.tokens.len();
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(Error::NonFinite { tokens: self.depth + tokens });
        }
        Ok(choose(logits, sampling, number as u64, tokens as u64))
    }

    /// Takes in a token.
    fn extend(&mut self, token: u32, options: &Options, context: usize, take: &mut dyn FnMut(u32) -> bool) {
        if options.stop.contains(&token) {
            (self.answer.stopped_by, self.done) = (Some(token), true);
            return;
        }
        self.answer.tokens.push(token);
        let full = self.answer.tokens.len() == options.max_new_tokens
            || self.depth + self.answer.tokens.len() == context;
        self.done = !take(token) || full;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_whose_keys_no_memory_holds_are_refused() {
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        });
        let config = Config::from_json(&config).unwrap();
        // A row of a layer: keys and values of 2 heads of 16 columns, of 4 bytes.
        let check = |rows| check_room(&config, rows, 2, 50, Some(256 * 100));
        assert!(check(100).is_ok());
        assert!(matches!(check(101), Err(Error::NoRoom { bytes, .. }) if bytes == 3 * 256 * 101));
        assert!(matches!(check(usize::MAX), Err(Error::NoRoom { .. })));
    }
}
