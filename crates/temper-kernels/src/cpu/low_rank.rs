//! Adapters: thin products beside a dense layer's own, never a matrix of its size.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul;
use super::pack::{Operand, Values};
use super::product::{Output, Product};
use super::rows;
use super::thin;
use super::tile::Thin;
use super::weight::Weight;
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
    let kernel = Thin::new();
    let through_a =
        thin::product(kernel, x, [inputs, 1], Operand::rows(values(a), inputs), [rows, width, inputs]);
    low.chunks_exact_mut(width).zip(through_a.rows()).for_each(|(low, row)| low.copy_from_slice(row));
    for (part, columns) in shape.parts.iter().enumerate() {
        let product = Product {
            shape: [rows, columns.len(), shape.rank],
            a: low_of(low, part, shape).turned(),
            b: Operand::rows(values(&b[part]), shape.rank),
            alpha: shape.scale as f32,
            add: true,
        };
        product.run(b[part].kernel(), Output { values: out, start: columns.start, stride: outputs });
    }
}

/// Columns of a part in `[rows, R]`, lanes along the columns.
fn low_of<'a>(low: &'a [f32], part: usize, shape: LowRank<'_>) -> Operand<'a> {
    Operand::columns(Values::F32(&low[part * shape.rank..shape.dense.rows * shape.low()]), shape.low())
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
    let (Linear { rows, inputs, outputs }, rank, width) = (shape.dense, shape.rank, shape.low());
    if rows == 0 {
        return;
    }
    let (kernel, alpha, dlow) = (Thin::new(), shape.scale as f32, &mut dlow[..rows * width]);
    for (part, columns) in shape.parts.iter().enumerate() {
        let dout = &dout[columns.start..rows * outputs];
        let b = Operand::columns(values(&b[part]), rank);
        let through_b = thin::product(kernel, dout, [outputs, 1], b, [rows, rank, columns.len()]);
        dlow.chunks_exact_mut(width).zip(through_b.rows()).for_each(|(dlow, row)| {
            dlow[part * rank..].iter_mut().zip(row).for_each(|(dlow, x)| *dlow = alpha * x);
        });
        let low = low_of(low, part, shape);
        let to_b = thin::product(kernel, dout, [1, outputs], low, [columns.len(), rank, rows]);
        db[part].chunks_exact_mut(rank).zip(to_b.rows()).for_each(|(db, row)| {
            db.iter_mut().zip(row).for_each(|(db, x)| *db += alpha * x);
        });
    }
    let to_a = thin::product(
        kernel,
        x,
        [1, inputs],
        Operand::columns(Values::F32(dlow), width),
        [inputs, width, rows],
    );
    for (column, row) in to_a.rows().enumerate() {
        da[column..].iter_mut().step_by(inputs).zip(row).for_each(|(da, x)| *da += x);
    }
    if let Some(dx) = dx {
        matmul::backward_input(dx, dlow, a, 0, [rows, inputs, width], true);
    }
}

/// See [`crate::Device::low_rank_norms`].
pub fn norms(out: &mut [f32], weight: &Weight, a: &Weight, b: &[Weight], shape: LowRank<'_>) {
    let (inputs, rank) = (shape.dense.inputs, shape.rank);
    let mut place = 0;
    for (part, columns) in shape.parts.iter().enumerate() {
        let a = values(a).slice(part * rank * inputs..(part + 1) * rank * inputs);
        weight.by_stripes(columns.clone(), inputs, |stripe: Range<usize>, w| {
            let product = Product {
                shape: [stripe.len(), inputs, rank],
                a: Operand::rows(values(&b[part]).slice(stripe.start * rank..stripe.end * rank), rank),
                b: Operand::columns(a, inputs),
                alpha: shape.scale as f32,
                add: true,
            };
            let mut adapted = w.widened();
            product.run(b[part].kernel(), Output::whole(&mut adapted, inputs));
            let norms = &mut out[place + stripe.start..place + stripe.end];
            norms.par_iter_mut().zip(adapted.par_chunks(inputs)).for_each(|(norm, row)| {
                *norm = rows::sum_of_squares(row).sqrt() as f32;
            });
        });
        place += columns.len();
    }
}
