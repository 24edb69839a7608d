//! The reference's log-probabilities: computed once before the first step, with the policy's own weights or those of
//! another reference, and kept in a cache keyed by content.

use std::collections::HashMap;
use std::path::PathBuf;

use sha2::{Digest, Sha256};
use temper_kernels::Device;

use crate::checkpoint::Error;
use crate::checkpoint::save::write_atomic;
use crate::data::{Example, Sequence, forest};
use crate::hex;
use crate::model::Decoder;
use crate::objective::Pair;
use crate::parallel::Ranks;
use crate::score::{Score, idle, score};

/// Bytes of an entry: its key and a log-probability.
const ENTRY: usize = 32 + 8;

/// Where reference log-probabilities are kept between runs.
#[derive(Debug, Clone)]
pub struct Cache {
    /// The folder.
    pub folder: PathBuf,
    /// Hash of what decides the numbers: the reference's weights and the arithmetic.
    pub key: String,
}

impl Cache {
    fn path(&self) -> PathBuf {
        self.folder.join(format!("reference-{}.bin", self.key))
    }

    /// The entries; none when there is no file or its checksum does not hold.
    fn read(&self) -> Entries {
        let bytes = std::fs::read(self.path()).unwrap_or_default();
        let Some((checksum, entries)) = bytes.split_first_chunk::<32>() else { return Entries::new() };
        if Sha256::digest(entries)[..] != checksum[..] || entries.len() % ENTRY != 0 {
            return Entries::new();
        }
        let entry = |entry: &[u8]| {
            let (hash, logp) = entry.split_first_chunk::<32>()?;
            Some((*hash, f64::from_le_bytes(logp.try_into().ok()?)))
        };
        entries.chunks_exact(ENTRY).filter_map(entry).collect()
    }

    fn write(&self, entries: &Entries) -> Result<(), Error> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let mut sorted: Vec<_> = entries.iter().collect();
        sorted.sort_by_key(|(hash, _)| **hash);
        let body: Vec<u8> =
            sorted.iter().flat_map(|(hash, logp)| [&hash[..], &logp.to_le_bytes()].concat()).collect();
        write_atomic(&self.path(), |file| {
            file.write_all(&Sha256::digest(&body))?;
            file.write_all(&body)
        })
    }
}

/// A pass over the reference: what it computes, and together with whom.
pub struct ReferencePass<'a, D: Device> {
    /// Where.
    pub device: &'a D,
    /// The reference.
    pub decoder: &'a Decoder<D>,
    /// Of the policy's training or evaluation.
    pub examples: &'a [Example],
    /// Which of them to compute, and which together.
    pub groups: &'a [Vec<usize>],
    /// Tokens computed at once, as in a step.
    pub budget: usize,
    /// What is known from runs before.
    pub cache: Option<&'a Cache>,
    /// Each computes a group in turn.
    pub ranks: &'a Ranks,
}

/// What a pass found.
pub struct Reference {
    /// The pairs of log-probabilities, by example; those in no group, or not reached, are zeros.
    pub pairs: Vec<Pair>,
    /// Why they could not be kept for the next run.
    pub kept: Result<(), Error>,
}

/// Log-probabilities by [`ReferencePass::keys`].
type Entries = HashMap<[u8; 32], f64>;

impl<D: Device> ReferencePass<'_, D> {
    /// Computes a group as a step over it would be, so that a first step finds the very same numbers, also where bf16 would
    /// turn a last bit into a larger one. `progress(done, total)` counts the pairs that had to be computed, and ends the pass
    /// by returning false: what is done stays in the cache.
    pub fn run(&self, mut progress: impl FnMut(usize, usize) -> bool) -> Reference {
        let ReferencePass { device, decoder, examples, groups, budget, ranks, .. } = *self;
        let cache = self.cache.filter(|_| ranks.is_first());
        let mut entries = cache.map(Cache::read).unwrap_or_default();
        let keys: Vec<Vec<[u8; 32]>> = groups.iter().map(|group| self.keys(group)).collect();
        let mut known = self.known_by_first(&entries, &keys);
        let agrees = self.agrees(&known);
        if !agrees {
            entries.clear();
            known.fill(None);
        }
        let mut pairs = vec![Pair { chosen: 0.0, rejected: 0.0 }; examples.len()];
        for (group, known) in groups.iter().zip(&known) {
            for (&i, pair) in group.iter().zip(known.iter().flatten()) {
                pairs[i] = *pair;
            }
        }
        let missing: Vec<usize> = (0..groups.len()).filter(|&group| known[group].is_none()).collect();
        let total = missing.iter().map(|&group| groups[group].len()).sum();
        let mut before = 0;
        let mut goes_on = total == 0 || progress(0, total);
        // A group for each rank, then what they found for all: so none waits longer than for one group.
        for round in missing.chunks(ranks.size()) {
            let mut computed = Vec::new();
            let own = round.get(ranks.rank()).filter(|_| goes_on);
            if let Some(&group) = own {
                let scores = score(device, decoder, &self.sequences(&groups[group]), budget, |done| {
                    goes_on = progress((before + done * round.len()).min(total), total);
                    // What lies in pieces is put together by all ranks, as often as they have begun to.
                    goes_on || decoder.pieces.is_some()
                });
                computed.extend(scores.iter().flat_map(|sides| [sides[0].logp, sides[1].logp]));
            }
            if decoder.pieces.is_some() {
                let forests =
                    |&group: &usize| forest::microbatches(self.sequences(&groups[group]), budget).len();
                let most = round.iter().map(forests).max().unwrap_or(0);
                idle(device, decoder, most - own.map_or(0, forests));
            }
            computed.push(f64::from(u8::from(goes_on)));
            let of_ranks = ranks.gather_numbers(&computed);
            // All end in the round in which one was asked to.
            goes_on = of_ranks.iter().all(|of_rank| of_rank.last() == Some(&1.0));
            for (of_rank, &group) in of_ranks.iter().zip(round) {
                let logps = of_rank.split_last().map_or(&[][..], |(_, logps)| logps);
                entries.extend(keys[group].iter().copied().zip(logps.iter().copied()));
                for (&i, pair) in groups[group].iter().zip(logps.chunks_exact(2)) {
                    pairs[i] = Pair { chosen: pair[0], rejected: pair[1] };
                }
            }
            before += round.iter().map(|&group| groups[group].len()).sum::<usize>();
            if !goes_on {
                break;
            }
        }
        let kept = cache.filter(|_| total > 0).map_or(Ok(()), |cache| {
            // Another run of a sweep may have added to it meanwhile.
            let others = if agrees { cache.read() } else { Entries::new() };
            cache.write(&others.into_iter().chain(entries).collect())
        });
        Reference { pairs, kept }
    }

    fn sequences(&self, group: &[usize]) -> Vec<&[Sequence]> {
        group.iter().map(|&i| &self.examples[i].sequences[..]).collect()
    }

    /// Keys of a group's log-probabilities, chosen and rejected in turn. What is computed together decides the last bits, so a
    /// key is a hash of all sequences of the group, of the budget that cuts it, and of the place in it.
    fn keys(&self, group: &[usize]) -> Vec<[u8; 32]> {
        let mut hasher = Sha256::new();
        hasher.update((self.budget as u64).to_le_bytes());
        let all: Vec<&Sequence> = self.sequences(group).into_iter().flatten().collect();
        for sequence in &all {
            hasher.update((sequence.tokens.len() as u64).to_le_bytes());
            for token in &sequence.tokens {
                hasher.update(token.to_le_bytes());
            }
            hasher.update((sequence.trained.len() as u64).to_le_bytes());
            for span in &sequence.trained {
                hasher.update((span.start as u64).to_le_bytes());
                hasher.update((span.end as u64).to_le_bytes());
            }
        }
        let place = |i: u64| hasher.clone().chain_update(i.to_le_bytes()).finalize().into();
        (0..all.len() as u64).map(place).collect()
    }

    /// The pairs of each group whose every number the first rank knows, on every rank: caches on different machines may differ.
    fn known_by_first(&self, entries: &Entries, keys: &[Vec<[u8; 32]>]) -> Vec<Option<Vec<Pair>>> {
        let unknown = f64::NAN;
        let own: Vec<f64> =
            keys.concat().iter().map(|key| entries.get(key).copied().unwrap_or(unknown)).collect();
        let of_first = self.ranks.numbers_of_first(&own);
        let mut pairs = of_first.chunks_exact(2).map(|pair| Pair { chosen: pair[0], rejected: pair[1] });
        let known = |pair: &Pair| !(pair.chosen.is_nan() || pair.rejected.is_nan());
        let of_group = |group: &Vec<usize>| pairs.by_ref().take(group.len()).collect::<Vec<Pair>>();
        self.groups.iter().map(of_group).map(|pairs| pairs.iter().all(known).then_some(pairs)).collect()
    }

    /// Whether the first pair that is known, computed again, agrees: one of another model does not.
    fn agrees(&self, known: &[Option<Vec<Pair>>]) -> bool {
        let mut known = self.groups.iter().zip(known);
        let first = known.find_map(|(group, pairs)| Some((*group.first()?, *pairs.as_ref()?.first()?)));
        let Some((i, Pair { chosen, rejected })) = first else { return true };
        let scores = score(self.device, self.decoder, &self.sequences(&[i]), self.budget, |_| true);
        let agree =
            |(score, known): (&Score, f64)| (score.logp - known).abs() <= 1e-3 + 1e-5 * score.logp.abs();
        scores[0].iter().zip([chosen, rejected]).all(agree)
    }
}

/// The key of a cache: hash of the reference's weights and of the arithmetic.
pub fn cache_key(weights_hash: &str, numerics: &str) -> String {
    let digest = Sha256::digest(format!("{weights_hash}\n{numerics}\n"));
    hex(&digest[..16])
}
