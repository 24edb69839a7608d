//! Adapters: thin products beside a dense layer's own, never a matrix of its size.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul;
use super::pack::{Operand, Values};
use super::product::{Place, Product};
use super::rows;
use super::weight::Weight;
use crate::device::{Linear, LowRank};
use crate::transpose;

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
    let Linear { rows, inputs, outputs } = shape.dense;
    if rows == 0 {
        return;
    }
    let place = Place::whole(low, shape.low());
    matmul::few_outputs(place, x, [0, inputs], values(a), [rows, inputs], 1.0);
    for (part, columns) in shape.parts.iter().enumerate() {
        let product = Product {
            shape: [rows, columns.len(), shape.rank],
            a: low_of(low, part, shape).turned(),
            b: Operand::rows(values(&b[part]), shape.rank),
            alpha: shape.scale as f32,
            add: true,
        };
        product.run(b[part].kernel(), Place { values: out, start: columns.start, stride: outputs });
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
    let (Linear { rows, inputs, outputs }, rank) = (shape.dense, shape.rank);
    if rows == 0 {
        return;
    }
    let alpha = shape.scale as f32;
    for (part, columns) in shape.parts.iter().enumerate() {
        // [rank, columns]: then `dout` is read along its rows, and need not be packed for `dlow`.
        let b = values(&b[part]).widened();
        let turned = transpose(&b, rank, columns.len());
        let place = Place { values: dlow, start: part * rank, stride: shape.low() };
        let from = [columns.start, outputs];
        matmul::few_outputs(place, dout, from, Values::F32(&turned), [rows, columns.len()], alpha);
        let mut db_turned = vec![0.0; rank * columns.len()];
        let to_b = Product {
            shape: [rank, columns.len(), rows],
            a: low_of(low, part, shape),
            b: Operand::columns(Values::F32(&dout[columns.start..rows * outputs]), outputs),
            alpha,
            add: false,
        };
        to_b.run(a.kernel(), Place::whole(&mut db_turned, columns.len()));
        let by_column = transpose(&db_turned, columns.len(), rank);
        db[part].iter_mut().zip(by_column).for_each(|(db, d)| *db += d);
    }
    let thin = [rows, inputs, shape.low()];
    matmul::backward_weight(da, dlow, x, a.kernel(), thin, true);
    if let Some(dx) = dx {
        matmul::backward_input(dx, dlow, a, 0, thin, true);
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
            product.run(b[part].kernel(), Place::whole(&mut adapted, inputs));
            let norms = &mut out[place + stripe.start..place + stripe.end];
            norms.par_iter_mut().zip(adapted.par_chunks(inputs)).for_each(|(norm, row)| {
                *norm = rows::sum_of_squares(row).sqrt() as f32;
            });
        });
        place += columns.len();
    }
}
