//! The reference's log-probabilities: computed once with the policy's own weights before the first step, and
//! kept in a cache keyed by content.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use temper_kernels::Device;

use crate::checkpoint::Error;
use crate::checkpoint::save::write_atomic;
use crate::data::{Example, Sequence, forest};
use crate::model::Decoder;
use crate::objective::Pair;
use crate::parallel::Ranks;
use crate::score::{Score, idle, score};

/// Bytes of an entry: the hash of a sequence and its log-probability.
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
    fn read(&self) -> HashMap<[u8; 32], f64> {
        let bytes = std::fs::read(self.path()).unwrap_or_default();
        let Some((checksum, entries)) = bytes.split_first_chunk::<32>() else { return HashMap::new() };
        if Sha256::digest(entries)[..] != checksum[..] || entries.len() % ENTRY != 0 {
            return HashMap::new();
        }
        let entry = |entry: &[u8]| {
            let (hash, logp) = entry.split_first_chunk::<32>()?;
            Some((*hash, f64::from_le_bytes(logp.try_into().ok()?)))
        };
        entries.chunks_exact(ENTRY).filter_map(entry).collect()
    }

    fn write(&self, entries: &HashMap<[u8; 32], f64>) -> Result<(), Error> {
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

/// Hash of a sequence's tokens and of which are targets.
fn hash(sequence: &Sequence) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update((sequence.tokens.len() as u64).to_le_bytes());
    for token in &sequence.tokens {
        hasher.update(token.to_le_bytes());
    }
    for span in &sequence.trained {
        hasher.update((span.start as u64).to_le_bytes());
        hasher.update((span.end as u64).to_le_bytes());
    }
    hasher.finalize().into()
}

/// The pairs of log-probabilities of the examples in `groups` under `decoder`, by example; others get zeros. A group is
/// computed as a step over it would be, so that a first step finds the very same numbers, also where bf16 would turn a
/// last bit into a larger one. Ranks compute a group in turn. `progress(done, total)` counts the pairs that had to be
/// computed, and ends the pass by returning false: what is done stays in the cache, the rest gets zeros. The second
/// result is why the cache could not be written.
pub fn reference<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    examples: &[Example],
    groups: &[Vec<usize>],
    budget: usize,
    cache: Option<&Cache>,
    ranks: &Ranks,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> (Vec<Pair>, Result<(), Error>) {
    let cache = cache.filter(|_| ranks.is_first());
    let mut known = cache.map(Cache::read).unwrap_or_default();
    let used: Vec<usize> = groups.concat();
    if !agrees(device, decoder, examples, &used, budget, &known, ranks) {
        known.clear();
    }
    let mut pairs = vec![None; examples.len()];
    for (&i, pair) in used.iter().zip(from_first(ranks, &used, examples, &known)) {
        pairs[i] = pair;
    }
    let missing: Vec<&Vec<usize>> =
        groups.iter().filter(|group| group.iter().any(|&i| pairs[i].is_none())).collect();
    let total = missing.iter().map(|group| group.len()).sum();
    let mut before = 0;
    let mut goes_on = total == 0 || progress(0, total);
    let sequences =
        |group: &[usize]| -> Vec<&[Sequence]> { group.iter().map(|&i| &examples[i].sequences[..]).collect() };
    // A group for each rank, then what they found for all: so none waits longer than for one group.
    for round in missing.chunks(ranks.size()) {
        let mut computed = vec![f64::from(u8::from(goes_on))];
        let own = round.get(ranks.rank()).filter(|_| goes_on);
        if let Some(group) = own {
            let sequences = sequences(group);
            let scores = score(device, decoder, &sequences, budget, |done| {
                goes_on = progress((before + done * round.len()).min(total), total);
                // What lies in pieces is put together by all ranks, as often as they have begun to.
                goes_on || decoder.pieces.is_some()
            });
            computed.extend(group.iter().zip(scores).flat_map(|(&i, s)| [i as f64, s[0].logp, s[1].logp]));
        }
        if decoder.pieces.is_some() {
            let forests = |group: &Vec<usize>| forest::split(sequences(group), budget).len();
            let most = round.iter().map(|group| forests(group)).max().unwrap_or(0);
            idle(device, decoder, most - own.map_or(0, |group| forests(group)));
        }
        for of_rank in ranks.gather_numbers(&computed) {
            goes_on &= of_rank.first() == Some(&1.0);
            for number in of_rank.get(1..).unwrap_or_default().chunks_exact(3) {
                let (i, chosen, rejected) = (number[0] as usize, number[1], number[2]);
                known.extend(hashes(&examples[i]).into_iter().zip([chosen, rejected]));
                pairs[i] = Some(Pair { chosen, rejected });
            }
        }
        before += round.iter().map(|group| group.len()).sum::<usize>();
        if !goes_on {
            break;
        }
    }
    let kept = cache.filter(|_| total > 0).map_or(Ok(()), |cache| cache.write(&known));
    (pairs.into_iter().map(|pair| pair.unwrap_or(Pair { chosen: 0.0, rejected: 0.0 })).collect(), kept)
}

fn hashes(example: &Example) -> [[u8; 32]; 2] {
    [hash(&example.sequences[0]), hash(&example.sequences[1])]
}

/// The pair of an example, when the cache has it.
fn pair(known: &HashMap<[u8; 32], f64>, example: &Example) -> Option<Pair> {
    let [chosen, rejected] = hashes(example).map(|hash| known.get(&hash).copied());
    Some(Pair { chosen: chosen?, rejected: rejected? })
}

/// Whether the first of the pairs that are used and that the first rank knows, computed again, agrees with the cache: one of
/// another model does not. All ranks compute it, for parameters may lie in pieces.
fn agrees<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    examples: &[Example],
    used: &[usize],
    budget: usize,
    known: &HashMap<[u8; 32], f64>,
    ranks: &Ranks,
) -> bool {
    let known = used.iter().find_map(|&i| Some((i, pair(known, &examples[i])?)));
    let probe = ranks.gather_numbers(&[known.map_or(-1.0, |(i, _)| i as f64)])[0][0];
    if probe < 0.0 {
        return true;
    }
    let scores = score(device, decoder, &[&examples[probe as usize].sequences], budget, |_| true);
    let agree = |(score, known): (&Score, f64)| (score.logp - known).abs() <= 1e-3 + 1e-5 * score.logp.abs();
    known.is_none_or(|(_, Pair { chosen, rejected })| scores[0].iter().zip([chosen, rejected]).all(agree))
}

/// The pairs that the first rank knows, on every rank: caches on different machines may differ.
fn from_first(
    ranks: &Ranks,
    used: &[usize],
    examples: &[Example],
    known: &HashMap<[u8; 32], f64>,
) -> Vec<Option<Pair>> {
    let own: Vec<Option<Pair>> = used.iter().map(|&i| pair(known, &examples[i])).collect();
    let unknown = Pair { chosen: f64::NAN, rejected: f64::NAN };
    let numbers =
        own.iter().map(|pair| pair.unwrap_or(unknown)).flat_map(|pair| [pair.chosen, pair.rejected]);
    let numbers = ranks.gather_numbers(&numbers.collect::<Vec<_>>()).swap_remove(0);
    let pair =
        |pair: &[f64]| pair.iter().all(|x| !x.is_nan()).then(|| Pair { chosen: pair[0], rejected: pair[1] });
    numbers.chunks_exact(2).map(pair).collect()
}

/// The key of a cache: hash of the reference's weights and of the arithmetic.
pub fn cache_key(weights_hash: &str, numerics: &str) -> String {
    let digest = Sha256::digest(format!("{weights_hash}\n{numerics}\n"));
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The default cache inside a user's cache folder.
pub fn cache_folder(user_cache: &Path) -> PathBuf {
    user_cache.join("temper")
}
