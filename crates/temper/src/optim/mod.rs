//! The optimizer: AdamW over all parameters, clipping by the global norm, learning-rate schedules.

mod schedule;

use temper_kernels::{AdamW, Device};

pub use schedule::{Schedule, Scheduler};

use crate::model::spec::{Role, Spec};
use crate::model::weights::{Parameter, Weights};
use crate::parallel::Ranks;

/// AdamW's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay of matrices; biases and norms are never decayed.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// How many times faster adapters' B learns (LoRA+: Hayou et al. 2024, arXiv 2402.12354).
    pub lora_plus: f64,
}

/// First and second moments of every trained parameter.
#[derive(Debug)]
pub struct Moments<B> {
    /// Means of gradients.
    pub first: Weights<Option<B>>,
    /// Means of squared gradients.
    pub second: Weights<Option<B>>,
}

impl<B> Moments<B> {
    /// Zeros for parameters like these: for the elements that this rank updates.
    pub fn new<D: Device<Buffer = B>>(device: &D, specs: &Weights<Spec>, ranks: &Ranks) -> Moments<B> {
        // Written too, by all threads: a page that is read before it was ever written is given twice by the system (in a
        // profile of SmolLM2's first step 2.2 s of processor time).
        let written = |len: usize| {
            let mut buffer = device.zeros(len);
            device.clear(&mut buffer);
            buffer
        };
        let zeros = || specs.map(|spec| spec.trained.then(|| written(ranks.updated(spec.len()).len())));
        Moments { first: zeros(), second: zeros() }
    }
}

/// One update of all parameters.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Its number, from 1.
    pub step: u64,
    /// Without the factor of LoRA+.
    pub learning_rate: f64,
    /// Norm of all gradients together.
    pub grad_norm: f64,
}

/// Updates every trained parameter, of which this rank holds what is in `parameters`. Gradients whose norm exceeds the limit
/// are scaled by `limit / (norm + 1e-6)`, as PyTorch's `clip_grad_norm_` does.
pub fn update<D: Device>(
    device: &D,
    parameters: Vec<Parameter<&mut D::Buffer, &mut D::Weight>>,
    gradients: &Weights<Option<D::Buffer>>,
    moments: &mut Moments<D::Buffer>,
    specs: &Weights<Spec>,
    adam: &Adam,
    Update { step, learning_rate, grad_norm }: Update,
    ranks: &Ranks,
) {
    let limit = adam.max_grad_norm;
    let scale = if limit > 0.0 { (limit / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
    let moments = moments.first.iter_mut().zip(moments.second.iter_mut());
    let parameters = parameters.into_iter().zip(gradients.iter()).zip(specs.iter());
    for (((parameter, gradient), spec), (first, second)) in parameters.zip(moments) {
        let (Some(gradient), Some(first), Some(second)) = (gradient, first, second) else { continue };
        let weight_decay = if spec.decays() { adam.weight_decay } else { 0.0 };
        let learning_rate = if spec.role == Role::LowRankB { adam.lora_plus } else { 1.0 } * learning_rate;
        let (Adam { beta1, beta2, epsilon, .. }, from) = (*adam, ranks.updated_from(spec.len()));
        let update = AdamW { learning_rate, beta1, beta2, epsilon, weight_decay, scale, step, from };
        match parameter {
            Parameter::Vector(vector) => device.adamw(vector, gradient, [first, second], update),
            Parameter::Matrix(matrix) => device.adamw_weight(matrix, gradient, [first, second], update),
        }
    }
}
