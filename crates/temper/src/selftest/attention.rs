//! Attention against values from PyTorch.

use temper_kernels::textbook::{self, Masks, Real, Shape};

use super::{Check, stored};

/// The summed absolute error of f32 attention against PyTorch's f64 values, without and with a mask.
pub fn attention() -> [Check; 2] {
    let shape = Shape { batch: 1, heads: 1, tokens: 3, width: 4 };
    let mask = [true, true, false, false, true, false, true, true, true];
    let error = |mask: Option<&[bool]>, expected: &[f64; 12]| {
        let [q, k, v] = &stored::QKV;
        let out = textbook::self_attention(
            [&q[..], &k[..], &v[..]],
            shape,
            Masks { attention: mask, padding: None },
            |_, _, _, _| f32::of(1.0),
        );
        out.iter().zip(expected).map(|(&out, expected)| (f64::from(out) - expected).abs()).sum()
    };
    [
        Check::new("Absolute error without mask", error(None, &stored::ATTENDED[0]), 1e-6),
        Check::new("Absolute error with mask", error(Some(&mask), &stored::ATTENDED[1]), 1e-6),
    ]
}
