//! The reference's log-probabilities: computed once with the policy's own weights before the first step, and
//! kept in a cache keyed by content.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use temper_kernels::Device;

use crate::checkpoint::save::write_atomic;
use crate::data::{Example, Sequence};
use crate::model::Decoder;
use crate::objective::Pair;
use crate::score::score;

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

    fn write(&self, entries: &HashMap<[u8; 32], f64>) -> crate::Result<()> {
        let io = |error| crate::checkpoint::Error::Io {
            action: "create",
            path: self.folder.clone(),
            source: error,
        };
        std::fs::create_dir_all(&self.folder).map_err(io)?;
        let mut sorted: Vec<_> = entries.iter().collect();
        sorted.sort_by_key(|(hash, _)| **hash);
        let body: Vec<u8> =
            sorted.iter().flat_map(|(hash, logp)| [&hash[..], &logp.to_le_bytes()].concat()).collect();
        write_atomic(&self.path(), |file| {
            file.write_all(&Sha256::digest(&body))?;
            file.write_all(&body)
        })?;
        Ok(())
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
/// last bit into a larger one. `progress(done, total)` counts the pairs that had to be computed, and ends the pass by
/// returning false: what is done stays in the cache, the rest gets zeros.
///
/// # Errors
/// When the cache cannot be written.
pub fn reference<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    examples: &[Example],
    groups: &[Vec<usize>],
    budget: usize,
    cache: Option<&Cache>,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> crate::Result<Vec<Pair>> {
    let mut known = cache.map(Cache::read).unwrap_or_default();
    let hashes = |example: &Example| [hash(&example.sequences[0]), hash(&example.sequences[1])];
    // One known pair is computed again: a cache that does not agree with this model is thrown away.
    let is_known =
        |known: &HashMap<_, _>, i: usize| hashes(&examples[i]).iter().all(|hash| known.contains_key(hash));
    if let Some(&probe) = groups.iter().flatten().find(|&&i| is_known(&known, i)) {
        let scores = score(device, decoder, &[&examples[probe].sequences], budget, |_| true);
        let agree = |(score, hash): (&crate::score::Score, [u8; 32])| {
            (score.logp - known[&hash]).abs() <= 1e-3 + 1e-5 * score.logp.abs()
        };
        if !scores[0].iter().zip(hashes(&examples[probe])).all(agree) {
            known.clear();
        }
    }
    let missing: Vec<&Vec<usize>> =
        groups.iter().filter(|group| group.iter().any(|&i| !is_known(&known, i))).collect();
    let total = missing.iter().map(|group| group.len()).sum();
    let mut before = 0;
    let mut goes_on = total == 0 || progress(0, total);
    for group in missing {
        if !goes_on {
            break;
        }
        let sequences: Vec<&[Sequence]> = group.iter().map(|&i| &examples[i].sequences[..]).collect();
        let scores = score(device, decoder, &sequences, budget, |done| {
            goes_on = progress(before + done, total);
            goes_on
        });
        for (&i, scores) in group.iter().zip(scores) {
            known.extend(hashes(&examples[i]).into_iter().zip(scores.iter().map(|score| score.logp)));
        }
        before += group.len();
    }
    if let Some(cache) = cache.filter(|_| total > 0) {
        cache.write(&known)?;
    }
    let mut pairs = vec![Pair { chosen: 0.0, rejected: 0.0 }; examples.len()];
    for &i in groups.iter().flatten() {
        let [chosen, rejected] = hashes(&examples[i]).map(|hash| known.get(&hash).copied());
        if let (Some(chosen), Some(rejected)) = (chosen, rejected) {
            pairs[i] = Pair { chosen, rejected };
        }
    }
    Ok(pairs)
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
