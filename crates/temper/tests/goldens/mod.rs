//! What the golden files of `reference/` have in common.

use serde_json::Value;
use temper::optim::Adam;

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
