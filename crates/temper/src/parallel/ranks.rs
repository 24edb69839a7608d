//! The ranks as one of them sees them: what is its part, and what all do together.

use std::ops::Range;
use std::sync::Arc;

use serde_json::{Map, Value};
use temper_kernels::BLOCK;

use super::{Alone, Error, Link, Ticket};

/// Where parameters, gradients and moments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// All on every rank.
    Ddp,
    /// Moments in pieces, one on each rank (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1).
    Zero1,
    /// Parameters and gradients too; a block is gathered when it is computed (stage 3; Zhao et al. 2023, arXiv
    /// 2304.11277).
    Fsdp,
}

/// The ranks that train together.
#[derive(Debug, Clone)]
pub struct Ranks {
    /// The way to the others.
    pub link: Arc<dyn Link>,
    /// What each keeps.
    pub strategy: Strategy,
    /// Parts of a step that are computed apart and then added; a multiple of the ranks.
    pub shards: usize,
    /// Whether another number of ranks must give the same bits.
    pub exact: bool,
}

impl Ranks {
    /// This process alone, all of a step in one.
    pub fn alone() -> Ranks {
        Ranks { link: Arc::new(Alone), strategy: Strategy::Ddp, shards: 1, exact: false }
    }

    /// Ranks that compute `shards` parts of a step, to the same bits for any number of ranks; when that is not said, one
    /// part each, as fast as can be. One rank alone keeps everything.
    ///
    /// # Errors
    /// When ranks would not have 1, 2, 4 … shards each.
    pub fn new(link: Arc<dyn Link>, strategy: Strategy, shards: Option<usize>) -> Result<Ranks, Error> {
        let ranks = link.size();
        let (exact, shards) = (shards.is_some(), shards.unwrap_or(ranks));
        check_shards(shards, ranks)?;
        let strategy = if ranks == 1 { Strategy::Ddp } else { strategy };
        Ok(Ranks { link, strategy, shards, exact })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.link.rank()
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.link.size()
    }

    /// Whether this one writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// All others.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank();
        (0..self.size()).filter(move |&other| other != rank)
    }

    /// The shards of a rank.
    pub fn shards_of(&self, rank: usize) -> Range<usize> {
        let each = self.shards / self.size();
        rank * each..(rank + 1) * each
    }

    /// The elements of a parameter of `len` elements that a rank adds up; whole [`BLOCK`]s, so that sums over them do not
    /// depend on the number of ranks.
    pub fn share(&self, rank: usize, len: usize) -> Range<usize> {
        share([rank, self.size()], len)
    }

    /// Sends all others this rank's share of parameters, one after the other, and asks for theirs.
    pub fn swap(&self, own: &[f32], lens: &[usize]) -> Vec<Ticket> {
        for other in self.others() {
            self.link.send(other, bytemuck::cast_slice(own).to_vec());
        }
        let length = |rank| lens.iter().map(|&len| self.share(rank, len).len()).sum();
        self.others().map(|other| self.link.receive(other, length(other))).collect()
    }

    /// The elements whose moments this rank has and which it updates.
    pub fn updated(&self, len: usize) -> Range<usize> {
        match self.strategy {
            Strategy::Ddp => 0..len,
            Strategy::Zero1 | Strategy::Fsdp => self.share(self.rank(), len),
        }
    }

    /// Where these begin in the parameter as this rank holds it.
    pub fn updated_from(&self, len: usize) -> usize {
        match self.strategy {
            Strategy::Zero1 => self.updated(len).start,
            Strategy::Ddp | Strategy::Fsdp => 0,
        }
    }

    /// Everybody's words on every rank, by rank.
    pub fn gather(&self, words: Vec<u32>) -> Vec<Vec<u32>> {
        gather(&*self.link, words)
    }

    /// Everybody's numbers, by rank.
    pub fn gather_numbers(&self, numbers: &[f64]) -> Vec<Vec<f64>> {
        let words = numbers.iter().flat_map(|x| [x.to_bits() as u32, (x.to_bits() >> 32) as u32]).collect();
        let number = |words: &[u32]| f64::from_bits(u64::from(words[0]) | u64::from(words[1]) << 32);
        self.gather(words).iter().map(|words| words.chunks_exact(2).map(number).collect()).collect()
    }

    /// Everybody's text, by rank.
    pub fn gather_text(&self, text: &str) -> Vec<String> {
        gather_text(&*self.link, text)
    }

    /// The numbers of the first rank; others are not asked.
    pub fn numbers_of_first(&self, numbers: &[f64]) -> Vec<f64> {
        self.gather_numbers(if self.is_first() { numbers } else { &[] }).swap_remove(0)
    }

    /// What the first rank says; others are not asked.
    pub fn from_first(&self, text: &str) -> String {
        self.gather_text(if self.is_first() { text } else { "" }).swap_remove(0)
    }

    /// Elements `wanted` of a parameter of `len`, of which this rank has `piece`, put together on the first rank; nothing on
    /// others, which wait to be asked: else they would send faster than the first can write.
    pub fn on_first(&self, piece: &[f32], len: usize, wanted: Range<usize>) -> Vec<f32> {
        let wanted_of = |rank| {
            let share = self.share(rank, len);
            let start = share.start.max(wanted.start).min(share.end);
            start - share.start..share.end.min(wanted.end).max(start) - share.start
        };
        let own = &piece[wanted_of(self.rank())];
        if !self.is_first() {
            if !own.is_empty() {
                self.link.wait(self.link.receive(0, 1));
                self.link.send(0, bytemuck::cast_slice(own).to_vec());
            }
            return Vec::new();
        }
        let asked = self.others().filter(|&other| !wanted_of(other).is_empty());
        let ask = |other| {
            self.link.send(other, vec![1]);
            self.link.receive(other, wanted_of(other).len())
        };
        let tickets: Vec<_> = asked.map(ask).collect();
        let mut all = Vec::with_capacity(wanted.len());
        all.extend_from_slice(own);
        for ticket in tickets {
            all.extend_from_slice(bytemuck::cast_slice(&self.link.wait(ticket)));
        }
        all
    }
}

/// That every rank has 1, 2, 4 … shards: whole nodes of their tree.
fn check_shards(shards: usize, ranks: usize) -> Result<(), Error> {
    let even = shards.is_multiple_of(ranks) && (shards / ranks).is_power_of_two();
    even.then_some(()).ok_or(Error::Shards { shards, ranks })
}

/// The elements of a parameter that are one rank's of so many.
fn share([rank, ranks]: [usize; 2], len: usize) -> Range<usize> {
    let start = |rank: usize| (len.div_ceil(BLOCK) * rank / ranks * BLOCK).min(len);
    start(rank)..start(rank + 1)
}

/// Everybody's words on every rank, by rank.
fn gather(link: &dyn Link, words: Vec<u32>) -> Vec<Vec<u32>> {
    let others = || (0..link.size()).filter(|&other| other != link.rank());
    for other in others() {
        link.send(other, vec![words.len() as u32]);
        link.send(other, words.clone());
    }
    let lengths: Vec<_> = others().map(|other| link.receive(other, 1)).collect();
    let of_rank = |ticket: Ticket| {
        let len = link.wait(ticket).first().copied().unwrap_or(0) as usize;
        link.wait(link.receive(ticket.from, len))
    };
    let mut all: Vec<Vec<u32>> = lengths.into_iter().map(of_rank).collect();
    all.insert(link.rank(), words);
    all
}

/// Everybody's text, by rank.
pub fn gather_text(link: &dyn Link, text: &str) -> Vec<String> {
    let mut words = vec![text.len() as u32];
    words.extend(text.as_bytes().chunks(4).map(|four| {
        let mut bytes = [0; 4];
        bytes[..four.len()].copy_from_slice(four);
        u32::from_le_bytes(bytes)
    }));
    let text = |words: Vec<u32>| {
        let bytes = words.iter().skip(1).flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = bytes.take(words.first().map_or(0, |&len| len as usize)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    gather(link, words).into_iter().map(text).collect()
}

/// That all ranks say the same: objects as JSON, by rank.
///
/// # Errors
/// [`Error::Differs`] with the first key that differs on the first rank that does.
pub fn check_same(all: &[String]) -> Result<(), Error> {
    let object = |text: &String| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    let Some(first) = all.first().map(object) else { return Ok(()) };
    for (rank, there) in all.iter().map(object).enumerate() {
        let keys = first.keys().chain(there.keys().filter(|key| !first.contains_key(*key)));
        if let Some(key) = keys.into_iter().find(|key| first.get(*key) != there.get(*key)) {
            let show =
                |object: &Map<String, Value>| object.get(key).map_or("nothing".into(), Value::to_string);
            let (there, here) = (show(&there), show(&first));
            return Err(Error::Differs { rank, what: format!("`{key}`"), there, here });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let all = ["a", "a", "b"].map(|data| format!(r#"{{"beta":0.1,"data":"{data}"}}"#));
        assert_eq!(check_same(&all[..2]), Ok(()));
        let error = check_same(&all).err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("rank 2 differs from rank 0 in `data`: \"b\" there, \"a\" on rank 0")
        );
    }

    #[test]
    fn shares_are_whole_blocks_and_cover_everything() {
        for ranks in [1, 2, 3, 7] {
            for len in [1, BLOCK, 5 * BLOCK + 3, 100 * BLOCK] {
                let shares: Vec<_> = (0..ranks).map(|rank| share([rank, ranks], len)).collect();
                assert_eq!((shares[0].start, shares[ranks - 1].end), (0, len));
                for two in shares.windows(2) {
                    assert_eq!(two[0].end, two[1].start);
                    assert!(two[1].start % BLOCK == 0 || two[1].start == len);
                }
            }
        }
    }

    #[test]
    fn shards_are_dealt_out_as_nodes_of_the_tree() {
        assert!([(1, 1), (4, 1), (4, 2), (4, 4), (3, 3)].iter().all(|&(s, r)| check_shards(s, r).is_ok()));
        assert!([(4, 3), (6, 2), (2, 4)].iter().all(|&(s, r)| check_shards(s, r).is_err()));
    }
}
