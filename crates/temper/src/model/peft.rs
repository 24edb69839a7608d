//! LoRA as PEFT's files have it: `adapter_config.json`, and what its tensors are called.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::lora::{Lora, Targets, goes_by, last, module};
use super::spec::{Role, Spec};
use super::weights::Weights;
use super::{Config, Error, Patterns};
use crate::checkpoint::adapter::CONFIG;
use crate::checkpoint::{AdapterFiles, Checkpoint};

/// Before every name in PEFT's adapter files.
pub const PREFIX: &str = "base_model.model.";

/// Keys that change nothing: what has adapters is seen from the tensors, and how they lie from the base.
const HARMLESS: [&str; 15] = [
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
];

impl Lora {
    /// Reads PEFT's configuration. Which layers have adapters is seen from the tensors: `target_modules` may be a
    /// pattern, or left out layers.
    ///
    /// # Errors
    /// When it asks for something else than temper computes.
    pub fn from_peft(files: &AdapterFiles) -> Result<Lora, Error> {
        let AdapterFiles { path, config, tensors } = files;
        let (path, none) = (path.join(CONFIG), Map::new());
        let keys = Keys::of_adapter(config.as_object().unwrap_or(&none), &path);
        if keys.string("peft_type")? != Some("LORA") {
            return Err(keys.wrong("peft_type", "`\"LORA\"`"));
        }
        keys.only("bias", &[json!("none")])?;
        // Other ways change the base's weights, which a file of adapters does not have.
        let ways = [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")];
        keys.only("init_lora_weights", &ways)?;
        let names = tensors.tensors().filter_map(|(name, _)| {
            name.strip_prefix(PREFIX).unwrap_or(name).strip_suffix(".lora_A.weight").map(str::to_owned)
        });
        let saved = keys.strings("modules_to_save")?.into_iter().flat_map(|name| saved_by(name, tensors));
        let saved: BTreeSet<String> = saved.collect();
        let lora = Lora {
            rank: keys.required_size("r")?,
            alpha: keys.number("lora_alpha", 8.0)?,
            rank_pattern: Patterns::read(&keys, "rank_pattern", "an integer above 0", |rank| {
                rank.as_u64().filter(|rank| *rank > 0).and_then(|rank| rank.try_into().ok())
            })?,
            alpha_pattern: Patterns::read(&keys, "alpha_pattern", "a number", |alpha| {
                alpha.as_f64().filter(|alpha| alpha.is_finite())
            })?,
            dropout: keys.probability("lora_dropout", 0.0)?,
            rslora: keys.boolean("use_rslora", false)?,
            dora: keys.boolean("use_dora", false)?,
            targets: Targets::Found(names.collect()),
            modules_to_save: saved.into_iter().collect(),
        };
        keys.finish(|key, value| HARMLESS.contains(&key) || is_off(value))?;
        Ok(lora)
    }

    /// `adapter_config.json` as PEFT writes it; `base` is what it is called there.
    pub fn to_peft(&self, config: &Config, specs: &Weights<Spec>, base: &str) -> Value {
        let mut modules: BTreeMap<&str, (usize, usize)> = BTreeMap::new(); // by last name: all, adapted
        let mut adapted = BTreeSet::new();
        for spec in specs.iter() {
            for (name, _) in &spec.parts {
                match spec.role {
                    Role::Linear => modules.entry(last(module(name))).or_default().0 += 1,
                    Role::LowRankA => {
                        let module = module(module(name));
                        modules.entry(last(module)).or_default().1 += 1;
                        adapted.insert(module);
                    }
                    _ => {}
                }
            }
        }
        let whole = modules.values().all(|(all, adapted)| *adapted == 0 || all == adapted);
        let short = || modules.iter().filter(|(_, (_, adapted))| *adapted > 0).map(|(name, _)| *name);
        let targets: Vec<&str> = if whole { short().collect() } else { adapted.into_iter().collect() };
        let saved = self.modules_to_save.iter().flat_map(|name| unambiguous(name, specs));
        let saved: Vec<String> = saved.collect();
        let saved = (!saved.is_empty()).then_some(saved);
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": alpha(self.alpha),
            "rank_pattern": self.rank_pattern.to_json(Value::from),
            "alpha_pattern": self.alpha_pattern.to_json(alpha),
            "lora_dropout": self.dropout,
            "target_modules": targets,
            "modules_to_save": saved,
            "bias": "none",
            "fan_in_fan_out": config.is_gpt2(),
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "init_lora_weights": true,
            "inference_mode": true,
        })
    }
}

/// An alpha as PEFT writes it: without a fraction where there is none.
fn alpha(alpha: f64) -> Value {
    if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) }
}

/// Whether a value asks for nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Number(_) | Value::String(_) => false,
    }
}

/// The modules that PEFT saved whole because of a name: all that end with its letters. The name, when there is none.
fn saved_by(name: &str, tensors: &Checkpoint) -> Vec<String> {
    let names = tensors.tensors().map(|(tensor, _)| tensor.strip_prefix(PREFIX).unwrap_or(tensor));
    let whole = names.filter(|tensor| !tensor.contains(".lora_")).map(module);
    let found: BTreeSet<&str> = whole.filter(|module| module.ends_with(name)).collect();
    if found.is_empty() { vec![name.to_owned()] } else { found.into_iter().map(str::to_owned).collect() }
}

/// A name of modules to save as PEFT reads it: in full where other modules end with its letters too.
fn unambiguous(name: &str, specs: &Weights<Spec>) -> Vec<String> {
    let modules = specs.iter().flat_map(|spec| &spec.parts).map(|(part, _)| module(part));
    let (own, others): (BTreeSet<&str>, BTreeSet<&str>) =
        modules.filter(|module| module.ends_with(name)).partition(|module| goes_by(module, name));
    if others.is_empty() { vec![name.to_owned()] } else { own.into_iter().map(str::to_owned).collect() }
}
