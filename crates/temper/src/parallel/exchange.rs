//! Adding up gradients over ranks while the backward pass goes on, and sharing what one rank has with all.
//!
//! Values travel by unit, a group of parameters that are ready together. Every rank sends each other rank its values of
//! that rank's share; the owner adds what it gets in the order of the tree. So a value crosses the wire once in each
//! direction, as in a ring, but in an order that is ours.

use std::borrow::Cow;
use std::collections::VecDeque;

use super::{Ranks, Ticket, add_as_tree};

/// Units on their way at a time; each takes room for its values twice.
const IN_FLIGHT: usize = 2;

/// A unit on its way.
#[derive(Debug)]
struct Pending {
    unit: usize,
    /// Elements of its parameters.
    lens: Vec<usize>,
    /// This rank's values of its own share, when they are to be added to the others'.
    own: Vec<f32>,
    tickets: Vec<Ticket>,
}

/// The exchange of a step.
#[derive(Debug)]
pub struct Exchange {
    ranks: Ranks,
    /// Being added up.
    adding: VecDeque<Pending>,
    /// Being given to all.
    giving: VecDeque<Pending>,
}

/// A rank's share of a unit has arrived: the unit, the rank, and the values of its parameters one after the other.
pub type Arrived<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

impl Exchange {
    /// An exchange between these ranks.
    pub fn new(ranks: &Ranks) -> Exchange {
        Exchange { ranks: ranks.clone(), adding: VecDeque::new(), giving: VecDeque::new() }
    }

    /// Begins to add the values of a unit's parameters over all ranks.
    pub fn add(&mut self, unit: usize, values: &[Cow<'_, [f32]>]) {
        let link = &self.ranks.link;
        for other in self.ranks.others() {
            link.send(other, bytemuck::allocation::cast_vec(self.part(other, values)));
        }
        let own = self.part(self.ranks.rank(), values);
        let tickets = self.ranks.others().map(|other| link.receive(other, own.len())).collect();
        let lens = values.iter().map(|values| values.len()).collect();
        self.adding.push_back(Pending { unit, lens, own, tickets });
    }

    /// Begins to give every rank this one's share of a unit: the values of its parameters, one after the other.
    pub fn give(&mut self, unit: usize, lens: Vec<usize>, own: Vec<f32>) {
        let tickets = self.ranks.swap(&own, &lens);
        self.giving.push_back(Pending { unit, lens: Vec::new(), own: Vec::new(), tickets });
    }

    /// Lets older units arrive. With `give`, every rank gets all sums; without, each its share.
    pub fn move_on(&mut self, give: bool, arrived: &mut Arrived<'_>) {
        self.advance(IN_FLIGHT, give, arrived);
    }

    /// Waits for all that is on its way.
    pub fn finish(&mut self, give: bool, arrived: &mut Arrived<'_>) {
        self.advance(0, give, arrived);
    }

    /// Finishes the oldest until no more than `most` are on their way. Which are finished is a matter of counting, not of
    /// what happens to have arrived: so all ranks send and receive in the same order.
    fn advance(&mut self, most: usize, give: bool, arrived: &mut Arrived<'_>) {
        while self.adding.len() > most
            && let Some(Pending { unit, lens, own, tickets }) = self.adding.pop_front()
        {
            let sum = self.sum(own, tickets);
            arrived(unit, self.ranks.rank(), &sum);
            if give {
                self.give(unit, lens, sum);
            }
        }
        while self.giving.len() > most
            && let Some(Pending { unit, tickets, .. }) = self.giving.pop_front()
        {
            for ticket in tickets {
                arrived(unit, ticket.from, bytemuck::cast_slice(&self.ranks.link.wait(ticket)));
            }
        }
    }

    /// A rank's share of these parameters, one after the other.
    fn part(&self, rank: usize, values: &[Cow<'_, [f32]>]) -> Vec<f32> {
        let shares: Vec<&[f32]> =
            values.iter().map(|values| &values[self.ranks.share(rank, values.len())]).collect();
        shares.concat()
    }

    /// Adds the others' values to this rank's, in the order of the tree.
    fn sum(&self, own: Vec<f32>, tickets: Vec<Ticket>) -> Vec<f32> {
        let mut parts: Vec<Vec<f32>> = tickets
            .into_iter()
            .map(|ticket| bytemuck::allocation::cast_vec(self.ranks.link.wait(ticket)))
            .collect();
        parts.insert(self.ranks.rank(), own);
        let add = |sum: &mut Vec<f32>, part: Vec<f32>| {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        };
        add_as_tree(parts, add).unwrap_or_default()
    }
}
