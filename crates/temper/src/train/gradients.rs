//! The gradients of a step: added over the micro-batches of a shard, the shards of a rank and the ranks.

use temper_kernels::{BLOCK, Device};

use crate::model::Decoder;
use crate::model::decoder::ParameterGradients;
use crate::model::spec::{Role, Spec};
use crate::model::weights::Weights;
use crate::parallel::{Exchange, Ranks, Strategy};

/// Gradients that are being added up.
#[derive(Debug)]
pub struct GradientSum<D: Device> {
    ranks: Ranks,
    /// Sums of shards that wait for their neighbours in the tree; the last of the `open` ones is that of the shard at hand.
    levels: Vec<Weights<Option<D::Buffer>>>,
    open: usize,
    /// Whether nothing has been added to the shard at hand.
    fresh: bool,
    /// Of each parameter, whether the first backward of a shard writes its gradient; the others add to zeros.
    written: Vec<bool>,
    exchange: Exchange,
    /// Whether gradients of a block exist only until they are sent.
    streamed: bool,
    /// This rank's pieces of all sums, where parameters lie in pieces.
    pieces: Option<Weights<Option<D::Buffer>>>,
}

impl<D: Device> GradientSum<D> {
    /// Zeros for every trained parameter, as often as the shards of this rank need them.
    pub fn new(device: &D, decoder: &Decoder<D>, ranks: &Ranks) -> GradientSum<D> {
        let zeros = |len: &dyn Fn(usize) -> usize| {
            decoder.specs.map(|spec| spec.trained.then(|| device.zeros(len(spec.len()))))
        };
        let mut levels: Vec<_> = (0..sets_of_gradients(ranks)).map(|_| zeros(&|len| len)).collect();
        let streamed = is_streamed(ranks, &decoder.specs);
        if streamed {
            // One block's gradients at a time: the last one's, which come first.
            for block in 1..levels[0].blocks.len() {
                for gradient in levels[0].elements_mut(block - 1).into_iter().flatten() {
                    *gradient = device.zeros(0);
                }
            }
        }
        let of_product = |spec: &Spec| spec.role == Role::Linear || std::ptr::eq(spec, decoder.specs.head());
        GradientSum {
            levels,
            open: 0,
            fresh: false,
            // What is streamed is cleared on its way from block to block.
            written: decoder.specs.iter().map(|spec| !streamed && of_product(spec)).collect(),
            exchange: Exchange::new(ranks),
            streamed,
            pieces: (ranks.strategy == Strategy::Fsdp)
                .then(|| zeros(&|len| ranks.share(ranks.rank(), len).len())),
            ranks: ranks.clone(),
        }
    }

    /// Forgets the step before.
    pub fn begin_step(&mut self, device: &D) {
        self.open = 0;
        for piece in self.pieces.iter_mut().flat_map(Weights::iter_mut).flatten() {
            device.clear(piece);
        }
    }

    /// Begins a shard.
    pub fn begin_shard(&mut self, device: &D) {
        self.clear(device, self.open, false);
        self.open += 1;
        self.fresh = true;
    }

    /// Clears, of the sums of a shard, those that a backward writes, or the others.
    fn clear(&mut self, device: &D, level: usize, written: bool) {
        let gradients = self.levels[level].iter_mut().zip(&self.written);
        for (gradient, _) in gradients.filter(|(_, first)| **first == written) {
            gradient.iter_mut().for_each(|gradient| device.clear(gradient));
        }
    }

    /// Ends shard number `place` of this rank, not its last: sums that are neighbours in the tree are added.
    pub fn end_shard(&mut self, device: &D, place: usize) {
        if std::mem::take(&mut self.fresh) {
            self.clear(device, self.open - 1, true);
        }
        for _ in 0..place.trailing_ones() {
            let (lower, upper) = self.levels.split_at_mut(self.open - 1);
            if let (Some(sum), Some(last)) = (lower.last_mut(), upper.first()) {
                add(device, sum.iter_mut(), last.iter());
            }
            self.open -= 1;
        }
    }

    /// Runs a backward pass that adds to the shard at hand or, told not to add, writes what it makes by products. With `last`,
    /// it is this rank's last of the step, and what is ready is added over shards and ranks meanwhile.
    pub fn add(&mut self, device: &D, last: bool, backward: impl FnOnce(ParameterGradients<'_, D::Buffer>)) {
        let GradientSum { ranks, levels, open, fresh, exchange, streamed, pieces, .. } = self;
        let (lower, upper) = levels.split_at_mut(*open - 1);
        let streamed = *streamed;
        let mut ready = |unit: usize, top: &mut Weights<Option<D::Buffer>>| {
            if last {
                fold(device, unit, lower, top);
            }
            let sums = lower.first_mut().unwrap_or(top);
            let of_block = unit < sums.blocks.len();
            if ranks.size() == 1 || !(last || streamed && of_block) {
                return;
            }
            let values: Vec<_> = sums.unit(unit).into_iter().flatten().map(|g| device.download(g)).collect();
            if values.is_empty() {
                return;
            }
            exchange.add(unit, &values);
            if streamed && of_block {
                pass_on(device, sums, unit);
            }
            let give = ranks.strategy == Strategy::Ddp;
            exchange.move_on(give, &mut |unit, rank, values| {
                place(device, ranks, [unit, rank], values, sums, pieces);
            });
        };
        if streamed {
            bring_back(device, &mut upper[0]);
        }
        let add = streamed || !std::mem::take(fresh);
        backward(ParameterGradients { sums: &mut upper[0], add, ready: &mut ready });
        if last {
            let sums = &mut levels[0];
            exchange.finish(ranks.strategy == Strategy::Ddp, &mut |unit, rank, values| {
                place(device, ranks, [unit, rank], values, sums, pieces);
            });
        }
    }

    /// The sums: all of them, or this rank's share, or its pieces.
    pub fn sums(&self) -> &Weights<Option<D::Buffer>> {
        self.pieces.as_ref().unwrap_or(&self.levels[0])
    }

    /// `Σ x²` of each trained parameter's gradient, the same on every rank.
    pub fn squares(&self, device: &D, specs: &Weights<Spec>) -> Vec<f64> {
        let whole = self.ranks.strategy == Strategy::Ddp;
        let in_sums = |len: usize| match self.ranks.strategy {
            Strategy::Ddp => 0..len,
            Strategy::Zero1 => self.ranks.share(self.ranks.rank(), len),
            Strategy::Fsdp => 0..self.ranks.share(self.ranks.rank(), len).len(),
        };
        let trained = || specs.iter().filter(|spec| spec.trained);
        let gradients = self.sums().iter().flatten();
        let of_blocks: Vec<Vec<f64>> = gradients
            .zip(trained())
            .map(|(gradient, spec)| device.sums_of_squares(gradient, in_sums(spec.len())))
            .collect();
        if whole {
            return of_blocks.iter().map(|blocks| blocks.iter().sum()).collect();
        }
        let mut all = self.ranks.gather_numbers(&of_blocks.concat());
        let mut sum = |spec: &Spec| {
            let of_rank = |(rank, numbers): (usize, &mut Vec<f64>)| {
                let blocks = self.ranks.share(rank, spec.len()).len().div_ceil(BLOCK);
                numbers.drain(..blocks).collect::<Vec<f64>>()
            };
            all.iter_mut().enumerate().flat_map(of_rank).sum()
        };
        trained().map(&mut sum).collect()
    }
}

/// How many sums of shards exist at a time on a rank.
pub(super) fn sets_of_gradients(ranks: &Ranks) -> usize {
    1 + (ranks.shards / ranks.size()).ilog2() as usize
}

/// Whether gradients of a block exist only until they are sent: with pieces, where every block trains the same. The order
/// of sums then has micro-batches outside of ranks, which is not that of the tree.
fn is_streamed(ranks: &Ranks, specs: &Weights<Spec>) -> bool {
    let trained = |block: usize| -> Vec<usize> {
        specs.unit(block).into_iter().filter(|spec| spec.trained).map(Spec::len).collect()
    };
    let same = (1..specs.blocks.len()).all(|block| trained(block) == trained(0));
    ranks.strategy == Strategy::Fsdp && !ranks.exact && same
}

/// `sum += x`, parameter by parameter.
fn add<'a, D: Device>(
    device: &D,
    sum: impl IntoIterator<Item = &'a mut Option<D::Buffer>>,
    x: impl IntoIterator<Item = &'a Option<D::Buffer>>,
) where
    D::Buffer: 'a,
{
    for (sum, x) in sum.into_iter().zip(x) {
        if let (Some(sum), Some(x)) = (sum, x) {
            device.add_values(sum, 0, &device.download(x));
        }
    }
}

/// Adds what still waits of a unit into the lowest level.
fn fold<D: Device>(
    device: &D,
    unit: usize,
    lower: &mut [Weights<Option<D::Buffer>>],
    top: &Weights<Option<D::Buffer>>,
) {
    let mut above = top;
    for level in lower.iter_mut().rev() {
        add(device, level.elements_mut(unit), above.unit(unit));
        above = level;
    }
}

/// Hands the buffers of a block's gradients, emptied, to the block before it.
fn pass_on<D: Device>(device: &D, gradients: &mut Weights<Option<D::Buffer>>, block: usize) {
    for gradient in gradients.elements_mut(block).into_iter().flatten() {
        device.clear(gradient);
    }
    gradients.blocks.swap(block, block.saturating_sub(1));
}

/// Hands the buffers of the only block's gradients that there are to the last block.
fn bring_back<D: Device>(device: &D, gradients: &mut Weights<Option<D::Buffer>>) {
    let last = gradients.blocks.len().saturating_sub(1);
    let is_here = |block: &usize| gradients.unit(*block).into_iter().flatten().any(|g| device.len(g) > 0);
    if let Some(block) = (0..last).find(is_here) {
        gradients.blocks.swap(block, last);
    }
}

/// Puts a rank's share of a unit's sums where it belongs.
fn place<D: Device>(
    device: &D,
    ranks: &Ranks,
    [unit, rank]: [usize; 2],
    mut values: &[f32],
    sums: &mut Weights<Option<D::Buffer>>,
    pieces: &mut Option<Weights<Option<D::Buffer>>>,
) {
    match pieces {
        Some(pieces) => {
            for piece in pieces.elements_mut(unit).into_iter().flatten() {
                device.add_values(piece, 0, take(&mut values, device.len(piece)));
            }
        }
        None => {
            for sum in sums.elements_mut(unit).into_iter().flatten() {
                let share = ranks.share(rank, device.len(sum));
                device.set_values(sum, share.start, take(&mut values, share.len()));
            }
        }
    }
}

fn take<'a>(values: &mut &'a [f32], len: usize) -> &'a [f32] {
    let (taken, rest) = values.split_at(len);
    *values = rest;
    taken
}
