//! What operations take for themselves, beside the buffers that they are given.

use super::tile::Kernel;
use super::weight::DECODED;
use super::{Cpu, Precision, head, product};

/// The shapes of a model's training.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Outputs and inputs of its dense layers.
    pub dense: Vec<[usize; 2]>,
    /// Vocabulary and width of its head.
    pub head: [usize; 2],
    /// Whether logits find room in a buffer of the head's.
    pub logits_kept: bool,
    /// Columns of the keys of all heads.
    pub keys: usize,
    /// Whether weights lie in blocks.
    pub quantised: bool,
    /// Whether rows of adapters are dropped.
    pub dropout: bool,
}

impl Cpu {
    /// Bytes that the operations of a training take at most, where they are more than some thousands a thread: packed
    /// operands of products and of attention, a tile of logits, decoded weights, dropped rows.
    pub fn workspace_bytes(&self, shapes: &Workspace) -> u64 {
        let &Workspace { rows, ref dense, head: [vocabulary, width], keys, .. } = shapes;
        let kernel = Kernel::of(self.precision);
        let (tile_rows, tile_tokens) = (rows.min(head::ROWS), vocabulary.min(head::TOKENS));
        // Forward, gradient of the input, gradient of the weight.
        let of_layer = |rows: usize, [outputs, inputs]: [usize; 2]| {
            [[rows, outputs, inputs], [rows, inputs, outputs], [outputs, inputs, rows]]
        };
        let layers = dense.iter().flat_map(|&layer| of_layer(rows, layer));
        let products = layers.chain(of_layer(tile_rows, [tile_tokens, width]));
        let panels = products.map(|shape| product::panel_lines(kernel, shape).iter().sum()).max();
        let panel_bytes = size_of::<super::pack::Line>() * panels.unwrap_or(0);
        // Keys and values as they are multiplied with queries, their gradients, and probabilities.
        let value_bytes = size_of::<f32>() / kernel.units.values();
        let key_bytes = 3 * rows * keys * value_bytes;
        let logits = if shapes.logits_kept { 0 } else { tile_rows * tile_tokens };
        let largest = dense.iter().map(|[outputs, inputs]| outputs * inputs).max().unwrap_or(0);
        let decoded = if shapes.quantised { largest.min(DECODED) } else { 0 };
        let decoded_bytes = match self.precision {
            Precision::F32 => size_of::<f32>(),
            Precision::Bf16 => size_of::<f32>() + size_of::<u16>(),
        };
        let inputs = dense.iter().map(|[_, inputs]| inputs).max().unwrap_or(&0);
        let dropped = if shapes.dropout { 2 * rows * inputs } else { 0 };
        (panel_bytes + key_bytes + decoded * decoded_bytes + (logits + dropped) * size_of::<f32>()) as u64
    }
}
