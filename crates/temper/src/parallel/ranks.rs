//! The ranks as one of them sees them: what is its part, and what all do together.

use std::ops::Range;
use std::sync::Arc;

use temper_kernels::BLOCK;

use super::{Alone, Error, Link};

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
}

impl Ranks {
    /// This process alone, all of a step in one.
    pub fn alone() -> Ranks {
        Ranks { link: Arc::new(Alone), strategy: Strategy::Ddp, shards: 1 }
    }

    /// Ranks that compute `shards` parts of a step; as many as there are ranks when that is not said.
    ///
    /// # Errors
    /// When ranks would not have 1, 2, 4 … shards each.
    pub fn new(link: Arc<dyn Link>, strategy: Strategy, shards: Option<usize>) -> Result<Ranks, Error> {
        let ranks = link.size();
        let shards = shards.unwrap_or(ranks);
        if !shards.is_multiple_of(ranks) || !(shards / ranks).is_power_of_two() {
            return Err(Error::Shards { shards, ranks });
        }
        Ok(Ranks { link, strategy, shards })
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
        let blocks = len.div_ceil(BLOCK);
        let start = |rank: usize| (blocks * rank / self.size() * BLOCK).min(len);
        start(rank)..start(rank + 1)
    }

    /// The elements whose moments this rank has and which it updates.
    pub fn updated(&self, len: usize) -> Range<usize> {
        match self.strategy {
            Strategy::Ddp => 0..len,
            Strategy::Zero1 | Strategy::Fsdp => self.share(self.rank(), len),
        }
    }

    /// Everybody's words on every rank, by rank.
    pub fn gather(&self, words: Vec<u32>) -> Vec<Vec<u32>> {
        for other in self.others() {
            self.link.send(other, vec![words.len() as u32]);
            self.link.send(other, words.clone());
        }
        let lengths: Vec<_> = self.others().map(|other| self.link.receive(other, 1)).collect();
        let mut all: Vec<Vec<u32>> = lengths
            .into_iter()
            .map(|ticket| {
                let len = self.link.wait(ticket).first().copied().unwrap_or(0) as usize;
                self.link.wait(self.link.receive(ticket.from, len))
            })
            .collect();
        all.insert(self.rank(), words);
        all
    }

    /// Everybody's numbers, by rank.
    pub fn gather_numbers(&self, numbers: &[f64]) -> Vec<Vec<f64>> {
        let words = numbers.iter().flat_map(|x| [x.to_bits() as u32, (x.to_bits() >> 32) as u32]).collect();
        let number = |words: &[u32]| f64::from_bits(u64::from(words[0]) | u64::from(words[1]) << 32);
        self.gather(words).iter().map(|words| words.chunks_exact(2).map(number).collect()).collect()
    }

    /// Everybody's text, by rank.
    pub fn gather_text(&self, text: &str) -> Vec<String> {
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
        self.gather(words).into_iter().map(text).collect()
    }

    /// What the first rank says; others are not asked.
    pub fn from_first(&self, text: &str) -> String {
        self.gather_text(if self.is_first() { text } else { "" }).swap_remove(0)
    }

    /// The pieces of a parameter of `len` elements, put together on the first rank; nothing on others.
    pub fn on_first(&self, piece: &[f32], len: usize) -> Vec<f32> {
        if !self.is_first() {
            self.link.send(0, bytemuck::cast_slice(piece).to_vec());
            return Vec::new();
        }
        let tickets: Vec<_> =
            self.others().map(|other| self.link.receive(other, self.share(other, len).len())).collect();
        let mut all = piece.to_vec();
        all.reserve_exact(len - piece.len());
        for ticket in tickets {
            all.extend_from_slice(bytemuck::cast_slice(&self.link.wait(ticket)));
        }
        all
    }
}
