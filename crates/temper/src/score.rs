//! Log-probabilities of given sequences under a model, without training it.

use temper_kernels::{Device, HeadOutput};

use crate::data::{Forest, Sequence, forest};
use crate::model::Decoder;
use crate::model::activations::ActivationsOn;
use crate::model::decoder::StepDropout;

/// What a model thinks of one sequence's trained tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Sum of their log-probabilities.
    pub logp: f64,
    /// Their number.
    pub tokens: usize,
    /// How many of them were the likeliest.
    pub likeliest: usize,
    /// Sum of the entropies where they were predicted, in nats.
    pub entropy: f64,
}

/// The scores of a forest's sequences.
pub fn by_sequence(forest: &Forest, output: &HeadOutput) -> Vec<Score> {
    let mut scores = vec![Score::default(); forest.sequences];
    for ((target, &owner), logp) in forest.targets.iter().zip(&forest.owners).zip(&output.logp) {
        let (score, row) = (&mut scores[owner as usize], target.row as usize);
        score.logp += logp;
        score.tokens += 1;
        score.likeliest += usize::from(output.argmax[row] == target.token);
        score.entropy += output.entropy[row];
    }
    scores
}

/// Computes nothing so many times. Where parameters lie in pieces, all ranks put them together as often as the one with
/// the most forests.
pub fn idle<D: Device>(device: &D, decoder: &Decoder<D>, times: usize) {
    let nothing = Forest::new([]);
    let mut a = decoder.activations(device, 1, false);
    (0..times).for_each(|_| decoder.forward(device, &nothing, StepDropout::default(), None, &mut a));
}

/// Scores groups of sequences in forests of at most `budget` rows; calls `progress` with the number of groups
/// done, and ends there when it returns false.
pub fn score<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    groups: &[&[Sequence]],
    budget: usize,
    mut progress: impl FnMut(usize) -> bool,
) -> Vec<Vec<Score>> {
    let forests = forest::microbatches(groups.iter().copied(), budget);
    let tokens: usize = groups.iter().flat_map(|group| group.iter()).map(|s| s.tokens.len()).sum();
    let capacity = budget.min(tokens);
    let mut activations: Option<(usize, ActivationsOn<D>)> = None;
    let mut scores = Vec::with_capacity(groups.len());
    for range in forests {
        let groups = &groups[range];
        let forest = Forest::new(groups.iter().copied().flatten());
        let rows = forest.rows();
        if activations.as_ref().is_none_or(|(capacity, _)| *capacity < rows) {
            let capacity = rows.max(capacity);
            activations = Some((capacity, decoder.activations(device, capacity, false)));
        }
        let Some((_, a)) = &mut activations else { continue };
        decoder.forward(device, &forest, StepDropout::default(), None, a);
        let mut all = by_sequence(&forest, &decoder.head(device, &forest, a)).into_iter();
        scores.extend(groups.iter().map(|group| all.by_ref().take(group.len()).collect::<Vec<_>>()));
        if !progress(scores.len()) {
            break;
        }
    }
    scores
}
