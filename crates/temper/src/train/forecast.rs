//! What training on several ranks would take: bytes sent, seconds, memory. Counted, not measured.

use super::Memory;
use crate::model::spec::{Role, Spec};
use crate::model::weights::Weights;
use crate::parallel::Strategy;

/// Ranks and the wires between them.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// How many there are.
    pub ranks: usize,
    /// Bytes a second that a rank sends, while it receives as many.
    pub bandwidth: f64,
    /// Seconds that a message takes however short it is.
    pub latency: f64,
}

/// A step as one process computes it.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Seconds.
    pub seconds: f64,
    /// Rows of its forests.
    pub rows: f64,
    /// Rows of a micro-batch, at most.
    pub microbatch: usize,
}

/// What a rank would take.
#[derive(Debug, Clone, Copy)]
pub struct Forecast {
    /// What each keeps.
    pub strategy: Strategy,
    /// Bytes that it sends for a step.
    pub sent: f64,
    /// Seconds of a step.
    pub seconds: f64,
    /// Bytes of its buffers.
    pub memory: f64,
}

/// Floating-point operations of a step: products of dense layers for `rows` rows, of the head and of the last layer past
/// its attention for `targets` of them, forward, and backward for what is trained. Attention and adapters are left out:
/// they are a few percent.
pub fn operations(specs: &Weights<Spec>, rows: f64, targets: f64) -> f64 {
    let linear: usize = specs.iter().filter(|spec| spec.role == Role::Linear).map(Spec::len).sum();
    let narrow: usize = specs.blocks.last().map_or(0, |block| {
        [&block.output, &block.up, &block.down].map(|dense| dense.weight.len()).iter().sum()
    });
    let passes = |trained: bool| if trained { 6.0 } else { 4.0 };
    let trained = specs.blocks.first().is_some_and(|block| block.down.weight.trained);
    let head = specs.head();
    let dense = linear as f64 * rows - narrow as f64 * (rows - targets);
    passes(trained) * dense + passes(head.trained) * head.len() as f64 * targets
}

/// Forecasts for every strategy. `frozen` are the bytes of what is not trained; it lies whole on each rank but with
/// [`Strategy::Fsdp`].
pub fn forecast(
    specs: &Weights<Spec>,
    memory: &Memory,
    frozen: u64,
    cluster: Cluster,
    work: Work,
) -> [Forecast; 3] {
    let n = cluster.ranks as f64;
    let others = n - 1.0;
    let bytes = |unit: usize, all: bool| -> f64 {
        let specs = specs.unit(unit).into_iter().filter(|spec| all || spec.trained);
        4.0 * specs.map(Spec::len).sum::<usize>() as f64
    };
    let layers = specs.blocks.len();
    let (ends, block) = (bytes(layers, false), bytes(0, false));
    let (all_ends, all_block) = (bytes(layers, true), bytes(0, true));
    let time = |bytes: f64, units: f64| bytes / cluster.bandwidth + units * others * cluster.latency;

    let compute = work.seconds / n;
    let microbatches = (work.rows / n / work.microbatch as f64).ceil().max(1.0);
    // Blocks are exchanged behind the backward of the last micro-batch, two thirds of it; the gradients of both ends are
    // whole when it is over.
    let behind = compute / microbatches * 2.0 / 3.0;
    let (blocks_shared, ends_shared) = (layers as f64 * block * others / n, ends * others / n);
    let shared = blocks_shared + ends_shared;
    let (of_blocks, of_ends) = (time(blocks_shared, layers as f64), time(ends_shared, 1.0));
    let late = |halves: f64| halves * of_ends + (halves * of_blocks - behind).max(0.0);

    let walks = 3.0 * microbatches * layers as f64;
    let streamed = microbatches * layers as f64 * (2.0 * all_block + block) * others / n;
    let gathered_ends = (all_ends + ends) * others / n;

    // On the way: what is being added (own share, sent, received) and what is given on.
    let adding = |unit: f64| unit / n + 2.0 * unit * others / n;
    let giving = |unit: f64| 2.0 * unit * others / n;
    let messages = adding(ends) + 2.0 * (adding(block) + giving(block));
    let activations = (memory.activations + memory.backward) as f64;
    let whole = (frozen + memory.trained + memory.gradients) as f64 + activations + messages;
    let moments = memory.moments as f64;
    let pieces =
        (4.0 * specs.iter().map(Spec::len).sum::<usize>() as f64 + memory.gradients as f64 + moments) / n;
    let gathered = all_ends + 2.0 * all_block + ends + block + 2.0 * giving(all_block);
    let of = |strategy, sent, seconds, memory| Forecast { strategy, sent, seconds, memory };
    [
        of(Strategy::Ddp, 2.0 * shared, compute + late(2.0), whole + moments),
        of(Strategy::Zero1, 2.0 * shared, compute + late(1.0) + of_blocks + of_ends, whole + moments / n),
        of(
            Strategy::Fsdp,
            streamed + gathered_ends,
            compute.max(time(streamed, walks)) + time(gathered_ends, 2.0),
            pieces + gathered + activations + messages,
        ),
    ]
}
