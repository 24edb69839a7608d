//! The way of a rank to the others: messages from one to another, nothing more. Everything that ranks do together is
//! built of them, so that it can be tested without MPI.

use std::fmt::Debug;

/// Messages between ranks, which move while a rank computes. Those from one rank to another arrive in the order in which
/// they were sent.
///
/// A link that cannot go on, because another rank is gone, ends the process and does not return, as MPI does.
pub trait Link: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Begins to send.
    fn send(&self, to: usize, words: Vec<u32>);
    /// Begins to receive the next message of a rank, of so many words.
    fn receive(&self, from: usize, len: usize) -> Ticket;
    /// Waits for a message.
    fn wait(&self, ticket: Ticket) -> Vec<u32>;
}

/// A message that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    /// The rank that sends it.
    pub from: usize,
    /// How many were asked of that rank before.
    pub number: u64,
}

/// The only rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Link for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn send(&self, _: usize, _: Vec<u32>) {}

    fn receive(&self, from: usize, _: usize) -> Ticket {
        Ticket { from, number: 0 }
    }

    fn wait(&self, _: Ticket) -> Vec<u32> {
        Vec::new()
    }
}
