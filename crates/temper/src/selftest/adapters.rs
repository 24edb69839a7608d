//! Adapters that are off, or whose B is zero, change no bit.

use temper_kernels::Cpu;

use super::{Check, relative, tiny};
use crate::data::Forest;
use crate::model::decoder::{Decoder, StepDropout};
use crate::model::lora::{Lora, Targets};

/// A model with adapters that are switched off, or whose B is zero, against the model without: to the bit.
pub fn adapters(cpu: &Cpu) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, config) in tiny::configs() {
        let forest = Forest::new(&tiny::sequences(config.vocabulary));
        let logps = |decoder: &Decoder<Cpu>| {
            let mut a = decoder.activations(cpu, forest.rows(), false);
            decoder.forward(cpu, &forest, StepDropout::default(), None, &mut a);
            decoder.head(cpu, &forest, &a).logp
        };
        let base = logps(&tiny::decoder(cpu, &config));
        let all = Lora { modules_to_save: Vec::new(), ..tiny::loras(&config)[0].clone() };
        for lora in [all.clone(), Lora { dora: true, targets: Targets::AllLinear, ..all }] {
            let kind = if lora.dora { "DoRA" } else { "LoRA" };
            let mut off = tiny::adapted(cpu, &config, &lora, 1.0);
            off.adapters_on = false;
            let fresh = tiny::adapted(cpu, &config, &lora, 0.0);
            for (what, decoder) in [("off", off), ("with B = 0", fresh)] {
                let error = relative(&logps(&decoder), &base);
                checks.push(Check::new(format!("{name}: {kind} {what} ≡ base"), error, 0.0));
            }
        }
    }
    checks
}
