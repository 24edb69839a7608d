//! A dense layer with its adapters, forward and backward.

use temper_kernels::{Device, Dropout, Linear, LowRank};

use super::Decoder;
use super::weights::{Adapter, AdapterOn, Dense, DenseOn};

/// How rows go through a dense layer.
#[derive(Clone, Copy)]
pub(super) struct Through<'a> {
    /// Its shape.
    pub(super) shape: Linear,
    /// Dropout at the input of its adapters.
    pub(super) dropout: Option<Dropout<'a>>,
}

/// Buffers that the backward of a layer's adapters needs.
pub(super) struct Room<'a, B> {
    /// What A made in the forward pass.
    pub(super) low: &'a mut B,
    /// Its gradient.
    pub(super) dlow: &'a mut B,
    /// The layer's output again.
    pub(super) again: &'a mut B,
}

impl<D: Device> Decoder<D> {
    /// `out = x Wᵀ + b`, with the layer's adapters.
    pub(super) fn apply(
        &self,
        device: &D,
        dense: &DenseOn<D>,
        out: &mut D::Buffer,
        x: &D::Buffer,
        low: &mut D::Buffer,
        through: Through<'_>,
    ) {
        let bias = dense.bias.as_ref();
        let Some((adapter, shape)) = self.adapter(dense, through) else {
            return device.linear(out, x, &dense.weight, bias, through.shape);
        };
        let bias_first = bias.filter(|_| adapter.magnitude.is_none());
        device.linear(out, x, &dense.weight, bias_first, shape.dense);
        device.low_rank(out, low, x, &adapter.a, &adapter.b, shape);
        if let Some([magnitude, norms]) = &adapter.magnitude {
            device.magnitude(out, magnitude, norms, bias, shape);
        }
    }

    /// `dx = …` where it is wanted, and the gradients of what is trained; `dout` may be scaled on the way.
    pub(super) fn apply_backward(
        &self,
        device: &D,
        dense: &DenseOn<D>,
        gradient: &mut Dense<Option<D::Buffer>>,
        mut dx: Option<&mut D::Buffer>,
        dout: &mut D::Buffer,
        x: &D::Buffer,
        through: Through<'_>,
        Room { low, dlow, again }: Room<'_, D::Buffer>,
        add: bool,
    ) {
        let mut adapted = self.adapter(dense, through).zip(gradient.adapter.as_mut());
        if let Some(((adapter, shape), dadapter)) = &mut adapted
            && let (Some([magnitude, norms]), Some([Some(dmagnitude), _])) =
                (&adapter.magnitude, &mut dadapter.magnitude)
        {
            // Keeping these outputs of every layer would nearly double the activations.
            device.linear(again, x, &dense.weight, None, shape.dense);
            device.low_rank(again, low, x, &adapter.a, &adapter.b, *shape);
            device.magnitude_backward(dout, dmagnitude, again, magnitude, norms, *shape);
        }
        let (dweight, dbias) = (gradient.weight.as_mut(), gradient.bias.as_mut().and_then(Option::as_mut));
        device.linear_backward(dx.as_deref_mut(), dweight, dbias, dout, x, &dense.weight, through.shape, add);
        if let Some(((adapter, shape), Adapter { a: Some(da), b: db, .. })) = adapted {
            let mut db: Vec<&mut D::Buffer> = db.iter_mut().flatten().collect();
            device.low_rank_backward(dx, da, &mut db, dlow, dout, x, low, &adapter.a, &adapter.b, shape);
        }
    }

    /// A dense layer's adapters, when they count, and their shape.
    fn adapter<'a>(
        &self,
        dense: &'a DenseOn<D>,
        Through { shape, dropout }: Through<'a>,
    ) -> Option<(&'a AdapterOn<D>, LowRank<'a>)> {
        let adapter = dense.adapter.as_ref().filter(|_| self.adapters_on)?;
        Some((adapter, LowRank { dense: shape, parts: &adapter.parts, dropout }))
    }

    /// Computes again the norms that DoRA divides by, after adapters have changed.
    pub fn refresh_norms(&mut self, device: &D) {
        let shapes = self.dense_shapes(0);
        for block in &mut self.weights.blocks {
            for (dense, shape) in block.dense_mut().into_iter().zip(shapes) {
                if let Some(Adapter { parts, a, b, magnitude: Some([_, norms]) }) = &mut dense.adapter {
                    let shape = LowRank { dense: shape, parts, dropout: None };
                    device.low_rank_norms(norms, &dense.weight, a, b, shape);
                }
            }
        }
    }

    /// Makes fresh DoRA change nothing.
    pub fn magnitudes_from_norms(&mut self, device: &D) {
        for block in &mut self.weights.blocks {
            for dense in block.dense_mut() {
                if let Some(Adapter { magnitude: Some([magnitude, norms]), .. }) = &mut dense.adapter {
                    device.copy(magnitude, norms, device.len(norms));
                }
            }
        }
    }
}
