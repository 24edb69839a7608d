//! Parameters on several ranks: updated in pieces and then shared (Rajbhandari et al. 2020, arXiv 1910.02054), or lying in
//! pieces (Zhao et al. 2023, arXiv 2304.11277), where a block is put together when it is computed and dropped afterwards.

use std::cell::RefCell;
use std::ops::Deref;

use temper_kernels::Device;

use super::files::{self, Quantise};
use super::spec::Spec;
use super::weights::{BlockOn, Parameter, Parameters, Weights};
use super::{Decoder, Error, Lora};
use crate::checkpoint::save::SavedTensor;
use crate::parallel::{Exchange, Ranks, Ticket};

/// This rank's pieces.
#[derive(Debug)]
pub struct Pieces<D: Device> {
    pub(super) ranks: Ranks,
    /// The piece of each parameter.
    pub values: Weights<D::Buffer>,
}

/// That a base with adapters can lie in pieces, which are cut of whole numbers.
///
/// # Errors
/// When its blocks stay quantised, or DoRA needs whole rows.
pub fn can_be_cut(lora: &Lora, quantise: Quantise) -> Result<(), Error> {
    let refuse = |reason, hint| Err(Error::Pieces { reason, hint });
    if quantise != Quantise::None {
        return refuse(
            "cuts all weights into pieces, and quantised blocks are not cut",
            "give `--quantize none`, or `--parallel zero1` to keep the quantised model whole on each rank",
        );
    }
    if lora.dora {
        return refuse(
            "has no whole rows whose norms DoRA needs",
            "give `--parallel zero1`, or another `--lora-variant`",
        );
    }
    Ok(())
}

impl<D: Device> Decoder<D> {
    /// Puts the embedding, the last norm and the head together, which every pass needs; nothing to do for a model that is
    /// whole.
    pub fn gather_ends(&mut self, device: &D) {
        let Some(pieces) = &self.pieces else { return };
        let layers = self.config.layers.len();
        let tickets = pieces.ask(device, &self.specs, layers);
        let unit = RefCell::new(pieces.arrived(device, layers, tickets));
        self.weights = self.specs.without_blocks().map_each(
            |spec| device.upload(unit.borrow_mut().next(spec)),
            |spec| device.weight(unit.borrow_mut().next(spec), spec.trained),
        );
    }

    /// Gives all ranks the trained parameters' elements that each of them has updated.
    pub fn share_updated(&mut self, device: &D, ranks: &Ranks) {
        let Decoder { weights, specs, .. } = self;
        let mut exchange = Exchange::new(ranks);
        for unit in 0..specs.units() {
            let (mut own, mut lens) = (Vec::new(), Vec::new());
            for (spec, parameter) in trained::<D>(weights, specs, unit) {
                let share = ranks.share(ranks.rank(), spec.len());
                match parameter {
                    Parameter::Vector(vector) => own.extend_from_slice(&device.download(vector)[share]),
                    Parameter::Matrix(matrix) => own.extend(&*device.weight_values_in(matrix, share)),
                }
                lens.push(spec.len());
            }
            exchange.give(unit, lens, own);
            exchange.move_on(true, &mut |unit, rank, values| {
                receive(device, weights, specs, ranks, [unit, rank], values);
            });
        }
        exchange.finish(true, &mut |unit, rank, values| {
            receive(device, weights, specs, ranks, [unit, rank], values);
        });
    }

    /// Drops them.
    pub fn release_ends(&mut self, device: &D) {
        if self.pieces.is_some() {
            let nothing = |_: &Spec| device.weight(Vec::new(), false);
            self.weights = self.specs.without_blocks().map_each(|_| device.zeros(0), nothing);
        }
    }
}

/// The trained parameters of a unit, and what they are.
fn trained<'a, D: Device>(
    weights: &'a mut Parameters<D>,
    specs: &'a Weights<Spec>,
    unit: usize,
) -> impl Iterator<Item = (&'a Spec, Parameter<&'a mut D::Buffer, &'a mut D::Weight>)> {
    specs.unit(unit).into_iter().zip(weights.unit_mut(unit)).filter(|(spec, _)| spec.trained)
}

/// Puts a rank's share of a unit's trained parameters into its place.
fn receive<D: Device>(
    device: &D,
    weights: &mut Parameters<D>,
    specs: &Weights<Spec>,
    ranks: &Ranks,
    [unit, rank]: [usize; 2],
    mut values: &[f32],
) {
    for (spec, parameter) in trained::<D>(weights, specs, unit) {
        let share = ranks.share(rank, spec.len());
        let (new, rest) = values.split_at(share.len());
        values = rest;
        match parameter {
            Parameter::Vector(vector) => device.set_values(vector, share.start, new),
            Parameter::Matrix(matrix) => device.set_weight_values(matrix, share.start, new),
        }
    }
}

impl<D: Device> Pieces<D> {
    /// Every tensor to be saved, put together on the first rank when its turn comes; the others must ask for them too, in
    /// the same order, and get nothing.
    pub fn saved<'a>(
        &'a self,
        device: &'a D,
        specs: &'a Weights<Spec>,
        prefix: &str,
        chosen: impl Fn(&Spec) -> bool,
    ) -> Vec<SavedTensor<'a>> {
        let all = specs.iter().zip(self.values.iter()).filter(|(spec, _)| chosen(spec));
        let of_one = |(spec, piece): (&'a Spec, &'a D::Buffer)| {
            let values = move |range| self.ranks.on_first(&device.download(piece), spec.len(), range).into();
            files::saved(spec, prefix, values)
        };
        all.flat_map(of_one).collect()
    }

    /// This rank's pieces of a unit, one after the other.
    fn own(&self, device: &D, unit: usize) -> Vec<f32> {
        self.values.unit(unit).into_iter().map(|piece| device.download(piece)).collect::<Vec<_>>().concat()
    }

    /// Sends this rank's pieces of a unit to all, and asks for theirs.
    fn ask(&self, device: &D, specs: &Weights<Spec>, unit: usize) -> Vec<Ticket> {
        let lens: Vec<usize> = specs.unit(unit).iter().map(|spec| spec.len()).collect();
        self.ranks.swap(&self.own(device, unit), &lens)
    }

    /// Waits for the others' pieces.
    fn arrived(&self, device: &D, unit: usize, tickets: Vec<Ticket>) -> Arrived<'_> {
        let mut by_rank: Vec<Vec<f32>> = tickets
            .into_iter()
            .map(|ticket| bytemuck::allocation::cast_vec(self.ranks.link.wait(ticket)))
            .collect();
        by_rank.insert(self.ranks.rank(), self.own(device, unit));
        Arrived { ranks: &self.ranks, at: vec![0; by_rank.len()], by_rank }
    }
}

/// All pieces of a unit, to be read one parameter after the other.
struct Arrived<'a> {
    ranks: &'a Ranks,
    by_rank: Vec<Vec<f32>>,
    at: Vec<usize>,
}

impl Arrived<'_> {
    /// The values of the next parameter.
    fn next(&mut self, spec: &Spec) -> Vec<f32> {
        let mut values = Vec::with_capacity(spec.len());
        for (rank, (all, at)) in self.by_rank.iter().zip(&mut self.at).enumerate() {
            let len = self.ranks.share(rank, spec.len()).len();
            values.extend_from_slice(&all[*at..*at + len]);
            *at += len;
        }
        values
    }
}

/// The blocks of a decoder in some order. Those that lie in pieces are asked for while the one before is computed.
pub(super) struct Blocks<'a, D: Device, I> {
    decoder: &'a Decoder<D>,
    device: &'a D,
    order: I,
    /// The layer that was asked for.
    asked: Option<(usize, Vec<Ticket>)>,
}

impl<'a, D: Device, I: Iterator<Item = usize>> Blocks<'a, D, I> {
    pub(super) fn new(decoder: &'a Decoder<D>, device: &'a D, order: I) -> Blocks<'a, D, I> {
        let mut blocks = Blocks { decoder, device, order, asked: None };
        blocks.ask();
        blocks
    }

    fn ask(&mut self) {
        let ask = |layer| {
            let pieces = self.decoder.pieces.as_ref();
            pieces.map_or_else(Vec::new, |pieces| pieces.ask(self.device, &self.decoder.specs, layer))
        };
        self.asked = self.order.next().map(|layer| (layer, ask(layer)));
    }

    /// The next layer and its block.
    pub(super) fn next(&mut self) -> Option<(usize, Here<'a, D>)> {
        let (layer, tickets) = self.asked.take()?;
        let Some(pieces) = &self.decoder.pieces else {
            self.ask();
            return Some((layer, Here::Always(&self.decoder.weights.blocks[layer])));
        };
        let unit = RefCell::new(pieces.arrived(self.device, layer, tickets));
        let block = self.decoder.specs.blocks[layer]
            .map_each(&|spec| self.device.upload(unit.borrow_mut().next(spec)), &|spec| {
                self.device.weight(unit.borrow_mut().next(spec), spec.trained)
            });
        drop(unit);
        self.ask();
        Some((layer, Here::Gathered(Box::new(block))))
    }
}

impl<D: Device, I> Drop for Blocks<'_, D, I> {
    /// What was asked for and not used must still be received: messages come in order.
    fn drop(&mut self) {
        if let (Some(pieces), Some((_, tickets))) = (&self.decoder.pieces, self.asked.take()) {
            tickets.into_iter().for_each(|ticket| drop(pieces.ranks.link.wait(ticket)));
        }
    }
}

/// A block that can be computed.
pub(super) enum Here<'a, D: Device> {
    /// It is always here.
    Always(&'a BlockOn<D>),
    /// It was put together.
    Gathered(Box<BlockOn<D>>),
}

impl<D: Device> Deref for Here<'_, D> {
    type Target = BlockOn<D>;

    fn deref(&self) -> &BlockOn<D> {
        match self {
            Here::Always(block) => block,
            Here::Gathered(block) => block,
        }
    }
}
