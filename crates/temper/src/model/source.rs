//! Where a decoder's parameters come from: a checkpoint, a checkpoint with adapters on it, or random numbers.

use std::cell::Cell;
use std::ops::Range;

use temper_kernels::quants::Blocks;
use temper_kernels::{Device, mix, uniform};

use super::files::{self, Quantise, check, in_file, stored_blocks};
use super::peft::PREFIX;
use super::pieces::Pieces;
use super::spec::{Init, Role, Spec, specs};
use super::weights::{Parameters, Weights};
use super::{Config, Decoder, Lora};
use crate::checkpoint::{AdapterFiles, Checkpoint};
use crate::parallel::Ranks;

/// The parameters of a decoder, to be read one after the other.
#[derive(Debug)]
pub struct Source<'a> {
    config: Config,
    specs: Weights<Spec>,
    /// None for fresh parameters.
    base: Option<&'a Checkpoint>,
    /// How frozen matrices are kept.
    quantise: Quantise,
    lora: Option<&'a Lora>,
    /// Values of adapters; without, they change nothing yet.
    saved: Option<&'a Checkpoint>,
    seed: u64,
    /// How many parameters had random values.
    drawn: Cell<u64>,
}

/// Adapters on a frozen model.
#[derive(Debug, Clone, Copy)]
pub struct Adapted<'a> {
    /// Their shape.
    pub lora: &'a Lora,
    /// PEFT's files of them; fresh ones, which change nothing yet, without.
    pub adapter: Option<&'a AdapterFiles>,
    /// How the frozen matrices are kept.
    pub quantise: Quantise,
}

impl<'a> Source<'a> {
    /// A checkpoint whose parameters are all trained.
    ///
    /// # Errors
    /// When its configuration or its tensors do not make a model: [`super::Error::Tensors`] with every missing, unexpected
    /// and wrongly shaped tensor.
    pub fn trained(base: &'a Checkpoint) -> crate::Result<Source<'a>> {
        let source = Source::fresh(Config::from_json(&base.config)?, 0);
        check(base, "", &source.specs, |_| true)?;
        Ok(Source { base: Some(base), ..source })
    }

    /// A checkpoint that is only used.
    ///
    /// # Errors
    /// As [`Source::trained`].
    pub fn frozen(base: &'a Checkpoint, quantise: Quantise) -> crate::Result<Source<'a>> {
        let mut source = Source::trained(base)?;
        source.specs.iter_mut().for_each(|spec| spec.trained = false);
        Ok(Source { quantise, ..source })
    }

    /// A frozen base and adapters on it, where fresh ones are a function of the seed.
    ///
    /// # Errors
    /// When either does not make a model, or they do not fit together.
    pub fn adapted(base: &'a Checkpoint, adapted: Adapted<'a>, seed: u64) -> crate::Result<Source<'a>> {
        let Adapted { lora, adapter, quantise } = adapted;
        let source = Source::frozen(base, quantise)?;
        let specs = lora.specs(&source.config)?;
        let saved = adapter.map(|files| &files.tensors);
        if let Some(saved) = saved {
            check(saved, PREFIX, &specs, |spec| spec.trained)?;
        }
        Ok(Source { specs, lora: Some(lora), saved, seed, ..source })
    }

    /// Fresh parameters: normal matrices, zero biases, norms without effect; a function of the seed.
    pub fn fresh(config: Config, seed: u64) -> Source<'a> {
        let specs = specs(&config);
        let (quantise, drawn) = (Quantise::None, Cell::new(0));
        Source { config, specs, base: None, quantise, lora: None, saved: None, seed, drawn }
    }

    /// Its parameters.
    pub fn into_specs(self) -> Weights<Spec> {
        self.specs
    }

    /// The decoder.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn whole<D: Device>(self, device: &D) -> crate::Result<Decoder<D>> {
        let vector = |spec: &Spec| self.own(device, spec, 0..spec.len());
        let weights = self.specs.try_map_each(vector, |spec| self.weight(device, spec))?;
        let fresh = self.lora.is_some() && self.saved.is_none();
        let mut decoder = self.decoder(device, weights);
        if fresh {
            decoder.magnitudes_from_norms(device);
        }
        Ok(decoder)
    }

    /// The decoder with this rank's piece of each parameter, which alone is kept of it.
    ///
    /// # Errors
    /// When a tensor cannot be read or cut.
    pub fn in_pieces<D: Device>(self, device: &D, ranks: &Ranks) -> crate::Result<Decoder<D>> {
        if let Some(lora) = self.lora {
            super::can_be_cut(lora, self.quantise)?;
        }
        let piece = |spec: &Spec| self.own(device, spec, ranks.share(ranks.rank(), spec.len()));
        let values = self.specs.try_map_each(piece, piece)?;
        let ends = self.specs.without_blocks();
        let nothing = ends.map_each(|_| device.zeros(0), |_| device.weight(Vec::new(), false));
        let mut decoder = self.decoder(device, nothing);
        decoder.pieces = Some(Pieces { ranks: ranks.clone(), values });
        Ok(decoder)
    }

    fn decoder<D: Device>(self, device: &D, weights: Parameters<D>) -> Decoder<D> {
        match self.lora {
            None => {
                let mut decoder = Decoder::new(self.config, weights);
                decoder.specs = self.specs;
                decoder
            }
            Some(lora) => Decoder::adapted(device, &self.config, lora, self.specs, weights),
        }
    }

    /// Calls `f` with the values of a parameter and where they begin, some at a time.
    fn read(&self, spec: &Spec, mut f: impl FnMut(usize, &[f32])) -> crate::Result<()> {
        match (self.saved, self.base) {
            (Some(saved), _) if spec.trained => files::read(saved, PREFIX, spec, f),
            (_, Some(base)) if !spec.role.is_adapter() => {
                files::read(base, "", in_file(base, &self.specs, spec), f)
            }
            _ => {
                f(0, &self.drawn(spec));
                Ok(())
            }
        }
    }

    /// A buffer of the elements `own` of a parameter.
    fn own<D: Device>(&self, device: &D, spec: &Spec, own: Range<usize>) -> crate::Result<D::Buffer> {
        let mut buffer = device.zeros(own.len());
        self.read(spec, |at, values| files::set_own(device, &mut buffer, &own, at, values))?;
        Ok(buffer)
    }

    /// All values of a parameter.
    fn values(&self, spec: &Spec) -> crate::Result<Vec<f32>> {
        let mut all = vec![0.0; spec.len()];
        self.read(spec, |at, values| all[at..at + values.len()].copy_from_slice(values))?;
        Ok(all)
    }

    /// A matrix as products take it.
    fn weight<D: Device>(&self, device: &D, spec: &Spec) -> crate::Result<D::Weight> {
        let blocks = match (self.quantise, spec.role, self.base) {
            _ if spec.trained => None,
            (Quantise::File, _, Some(base)) => stored_blocks(base, in_file(base, &self.specs, spec))?,
            (Quantise::Nf4, Role::Linear, _) => Some(vec![Blocks::nf4(&self.values(spec)?, spec.columns())]),
            (Quantise::Int8, Role::Linear, _) => {
                Some(vec![Blocks::int8(&self.values(spec)?, spec.columns())])
            }
            _ => None,
        };
        match blocks {
            Some(blocks) => Ok(device.quantised(blocks)),
            None => {
                let mut weight = device.weight_zeros(spec.len(), spec.trained);
                self.read(spec, |at, values| device.set_weight_values(&mut weight, at, values))?;
                Ok(weight)
            }
        }
    }

    /// What a parameter begins with; depends on how many were drawn before.
    fn drawn(&self, spec: &Spec) -> Vec<f32> {
        self.drawn.set(self.drawn.get() + 1);
        let key = mix(mix(self.seed, u64::from_be_bytes(*b"initial ")), self.drawn.get());
        let all = 0..spec.len() as u64;
        match spec.init {
            Init::Constant(value) => vec![value; spec.len()],
            Init::Normal(deviation) => all.map(|i| (deviation * normal(key, i)) as f32).collect(),
            Init::Uniform(bound) => all.map(|i| (bound * (2.0 * uniform(key, i) - 1.0)) as f32).collect(),
        }
    }
}

/// Number `i` of a standard normal stream (Box & Muller 1958).
fn normal(key: u64, i: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(key, 2 * i)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(key, 2 * i + 1)).cos()
}
