//! Adapters added into the weights that they belong to.

use rayon::prelude::*;
use temper_kernels::{Device, Part};

use super::Decoder;
use super::spec::specs;
use super::weights::{Adapter, AdapterOn, DenseOn};

/// The model that base and adapters are together, without adapters.
pub fn merge<D: Device>(device: &D, mut decoder: Decoder<D>) -> Decoder<D> {
    if decoder.lora.take().is_none() {
        return decoder;
    }
    for block in &mut decoder.weights.blocks {
        for dense in block.dense_mut() {
            if let Some(adapter) = dense.adapter.take() {
                dense.weight = merged(device, dense, &adapter);
            }
        }
    }
    decoder.specs = specs(&decoder.config);
    decoder
}

/// `W + scale · B A`, its adapted rows scaled to DoRA's magnitudes.
fn merged<D: Device>(device: &D, dense: &DenseOn<D>, adapter: &AdapterOn<D>) -> D::Weight {
    let Adapter { parts, a, b, magnitude } = adapter;
    let mut weight = device.weight_values(&dense.weight).into_owned();
    let a = device.weight_values(a);
    let inputs = a.len() / parts.last().map_or(1, |part| part.low.end);
    let scales = magnitude.as_ref().map(|pair| pair.each_ref().map(|x| device.download(x)));
    let mut place = 0;
    for (Part { columns, low, scale }, b) in parts.iter().zip(b) {
        let a = &a[low.start * inputs..low.end * inputs];
        let b = device.weight_values(b);
        let rows = weight[columns.start * inputs..columns.end * inputs].par_chunks_exact_mut(inputs);
        rows.zip(b.par_chunks_exact(low.len())).enumerate().for_each(|(i, (row, b))| {
            let length = match &scales {
                Some([magnitude, norms]) => f64::from(magnitude[place + i]) / f64::from(norms[place + i]),
                None => 1.0,
            };
            for (column, w) in row.iter_mut().enumerate() {
                let rank = b.iter().enumerate();
                let update: f64 = rank.map(|(r, &b)| f64::from(b) * f64::from(a[r * inputs + column])).sum();
                *w = (length * (f64::from(*w) + scale * update)) as f32;
            }
        });
        place += columns.len();
    }
    device.weight(weight, false)
}
