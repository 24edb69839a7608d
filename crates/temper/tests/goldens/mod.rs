//! What the golden files of `reference/` have in common, and the pass whose gradients they are compared with.

use serde_json::Value;
use temper::data::{Forest, Sequence};
use temper::model::Decoder;
use temper::model::decoder::{ParameterGradients, StepDropout};
use temper::model::weights::Weights;
use temper::optim::Adam;
use temper_kernels::Device;

/// The optimizer that the ten steps of a `golden.json` were made with.
pub fn adam(golden: &Value) -> Adam {
    let number = |key: &str| golden["adamw"][key].as_f64().unwrap();
    Adam {
        beta1: number("beta1"),
        beta2: number("beta2"),
        epsilon: number("epsilon"),
        weight_decay: number("weight_decay"),
        max_grad_norm: number("max_grad_norm"),
        lora_plus: 1.0,
    }
}

/// An F64 tensor of a safetensors file.
pub fn tensor(bytes: &[u8], name: &str) -> Vec<f64> {
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let (values, _) = file.tensor(name).unwrap().data().as_chunks::<8>();
    values.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
}

/// One coefficient for every target: the loss is their mean.
pub fn mean(forest: &Forest) -> Vec<f64> {
    vec![-1.0 / forest.targets.len() as f64; forest.targets.len()]
}

/// By parameter, of the loss that is the log-probabilities of the targets times the coefficients.
pub fn gradients<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    sequences: &[Sequence],
    coefficients: impl Fn(&Forest) -> Vec<f64>,
) -> Weights<Option<D::Buffer>> {
    let forest = &Forest::new(sequences);
    let (mut a, mut g, mut dw) = (
        decoder.activations(device, forest.rows(), true),
        decoder.gradients(device, forest.rows()),
        decoder.zeros(device),
    );
    let off = StepDropout::default();
    decoder.forward(device, forest, off, None, &mut a);
    let lse = decoder.head_before_backward(device, forest, &mut a).log_sum_exp;
    let sums = ParameterGradients { sums: &mut dw, add: true, ready: &mut |_, _| {} };
    decoder.backward(device, forest, off, &coefficients(forest), &lse, &mut a, &mut g, sums);
    dw
}
