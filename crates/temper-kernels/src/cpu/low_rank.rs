//! Adapters: thin products beside a dense layer's own, never a matrix of its size.

use rayon::prelude::*;

use super::matmul;
use super::pack::{Operand, Values};
use super::product::{Output, Product};
use super::rows;
use super::thin::{self, Place};
use super::weight::{DECODED, Weight};
use crate::device::{Linear, LowRank};

/// What a weight that is trained, or small, gives to products.
fn values(weight: &Weight) -> Values<'_> {
    match weight {
        Weight::F32(values) => Values::F32(values),
        Weight::Bf16 { upper, .. } => Values::Bf16(upper),
        Weight::Quantised { .. } => unreachable!("adapters are not quantised"),
    }
}

/// See [`crate::Device::low_rank`]; `x` has been through dropout.
pub fn forward(out: &mut [f32], low: &mut [f32], x: &[f32], a: &Weight, b: &[Weight], shape: LowRank<'_>) {
    let (Linear { rows, inputs, outputs }, width) = (shape.dense, shape.low());
    if rows == 0 {
        return;
    }
    let through_a = Product {
        shape: [rows, width, inputs],
        a: Operand::rows(Values::F32(x), inputs),
        b: Operand::rows(values(a), inputs),
        alpha: 1.0,
        add: false,
    };
    thin::run(through_a, Place { values: low, start: 0, strides: [width, 1] });
    for (part, b) in shape.parts.iter().zip(b) {
        let rank = part.low.len();
        let product = Product {
            shape: [rows, part.columns.len(), rank],
            a: Operand::rows(Values::F32(&low[part.low.start..rows * width]), width),
            b: Operand::rows(values(b), rank),
            alpha: part.scale as f32,
            add: true,
        };
        product.run(b.kernel(), Output { values: out, start: part.columns.start, stride: outputs });
    }
}

/// See [`crate::Device::low_rank_backward`]; `x` has been through dropout, and `dx` is before it.
pub fn backward(
    dx: Option<&mut [f32]>,
    da: &mut [f32],
    db: &mut [&mut Vec<f32>],
    dlow: &mut [f32],
    dout: &[f32],
    x: &[f32],
    low: &[f32],
    a: &Weight,
    b: &[Weight],
    shape: LowRank<'_>,
) {
    let (Linear { rows, inputs, outputs }, width) = (shape.dense, shape.low());
    if rows == 0 {
        return;
    }
    for ((part, b), db) in shape.parts.iter().zip(b).zip(db) {
        let (rank, columns, alpha) = (part.low.len(), part.columns.len(), part.scale as f32);
        let dout = Values::F32(&dout[part.columns.start..rows * outputs]);
        let through_b = Product {
            shape: [rows, rank, columns],
            a: Operand::rows(dout, outputs),
            b: Operand::columns(values(b), rank),
            alpha,
            add: false,
        };
        thin::run(through_b, Place { values: dlow, start: part.low.start, strides: [width, 1] });
        let to_b = Product {
            shape: [columns, rank, rows],
            a: Operand::columns(dout, outputs),
            b: Operand::columns(Values::F32(&low[part.low.start..rows * width]), width),
            alpha,
            add: true,
        };
        thin::run(to_b, Place { values: db, start: 0, strides: [rank, 1] });
    }
    let to_a = Product {
        shape: [inputs, width, rows],
        a: Operand::columns(Values::F32(x), inputs),
        b: Operand::columns(Values::F32(&dlow[..rows * width]), width),
        alpha: 1.0,
        add: true,
    };
    thin::run(to_a, Place { values: da, start: 0, strides: [1, inputs] });
    if let Some(dx) = dx {
        matmul::backward_input(dx, dlow, a, 0, [rows, inputs, width], true);
    }
}

/// See [`crate::Device::low_rank_norms`]; no more rows at a time than are decoded of a quantised matrix.
pub fn norms(out: &mut [f32], weight: &Weight, a: &Weight, b: &[Weight], shape: LowRank<'_>) {
    let inputs = shape.dense.inputs;
    let height = (DECODED / inputs).max(1);
    let mut out = out;
    for (part, b) in shape.parts.iter().zip(b) {
        let (columns, rank) = (&part.columns, part.low.len());
        let a = values(a).slice(part.low.start * inputs..part.low.end * inputs);
        let norms;
        (norms, out) = out.split_at_mut(columns.len());
        for (i, norms) in norms.chunks_mut(height).enumerate() {
            let some = i * height..i * height + norms.len();
            let b = values(b).slice(some.start * rank..some.end * rank);
            let product = Product {
                shape: [some.len(), inputs, rank],
                a: Operand::rows(b, rank),
                b: Operand::columns(a, inputs),
                alpha: part.scale as f32,
                add: true,
            };
            weight.by_stripes(columns.start + some.start..columns.start + some.end, inputs, |_, w| {
                let mut adapted = w.widened();
                product.run(b.kernel(), Output::whole(&mut adapted, inputs));
                norms.par_iter_mut().zip(adapted.par_chunks(inputs)).for_each(|(norm, row)| {
                    *norm = (rows::sum_of_squares(row).sqrt() as f32).max(f32::MIN_POSITIVE);
                });
            });
        }
    }
}
