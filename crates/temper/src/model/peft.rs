//! LoRA as PEFT's files have it: `adapter_config.json`, and what its tensors are called.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::keys::{Keys, LARGEST};
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
    /// Reads PEFT's configuration. Which layers have adapters is seen from the tensors, as `target_modules` may be a
    /// pattern, or leave out layers; where it is a list of all, what the tensors lack is missed.
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
        let [adapted, saved] = modules(&keys, tensors)?;
        let lora = Lora {
            rank: keys.required_size("r")?,
            alpha: keys.number("lora_alpha", 8.0)?,
            rank_pattern: Patterns::read(&keys, "rank_pattern", "ranks from 1 to 2^24 by name", |rank| {
                rank.as_u64().filter(|rank| (1..=LARGEST).contains(rank)).map(|rank| rank as usize)
            })?,
            alpha_pattern: Patterns::read(&keys, "alpha_pattern", "numbers by name", |alpha| {
                alpha.as_f64().filter(|alpha| alpha.is_finite())
            })?,
            dropout: keys.probability("lora_dropout", 0.0)?,
            rslora: keys.boolean("use_rslora", false)?,
            dora: keys.boolean("use_dora", false)?,
            targets: Targets::Found(adapted),
            modules_to_save: saved,
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
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(alpha as i64) } else { json!(alpha) }
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

/// The modules that a file has adapters of, and those that it has whole.
fn modules(keys: &Keys<'_>, tensors: &Checkpoint) -> Result<[Vec<String>; 2], Error> {
    let names = || tensors.tensors().map(|(name, _)| name.strip_prefix(PREFIX).unwrap_or(name));
    let mut adapted: BTreeSet<&str> =
        names().filter_map(|name| name.strip_suffix(".lora_A.weight")).collect();
    if adapted.contains("lm_head") || names().any(|name| name.contains(".lora_embedding_")) {
        return Err(keys.wrong("target_modules", "dense layers of the blocks, no embedding and no head"));
    }
    let whole: BTreeSet<&str> = names().filter(|name| !name.contains(".lora_")).map(module).collect();
    let asked = keys.strings("modules_to_save")?;
    if let Some(other) = whole.iter().find(|module| !asked.iter().any(|name| is_saved(module, name))) {
        let expected = format!("`{other}` too, which the adapter's file has whole");
        return Err(keys.wrong("modules_to_save", expected));
    }
    // What is asked for and not there stays, to be missed with the tensors.
    let some = |key| keys.value(key).is_some_and(|value| !is_off(value));
    if keys.value("target_modules").is_some_and(Value::is_array)
        && !some("layers_to_transform")
        && !some("exclude_modules")
    {
        let is_free = |name: &&str| !whole.iter().any(|module| goes_by(module, name));
        adapted.extend(keys.strings("target_modules")?.into_iter().filter(is_free));
    }
    if adapted.is_empty() && whole.is_empty() {
        return Err(keys.wrong("target_modules", "layers whose adapters the file has; it has none"));
    }
    let missed = asked.iter().filter(|name| !whole.iter().any(|module| is_saved(module, name)));
    let saved: BTreeSet<&str> = whole.iter().chain(missed).copied().collect();
    Ok([adapted, saved].map(|modules| modules.into_iter().map(str::to_owned).collect()))
}

/// Whether PEFT saves a module whole because of a name: it, or one that it lies in, ends with its letters.
fn is_saved(module: &str, name: &str) -> bool {
    let ends = module.match_indices('.').map(|(end, _)| end).chain([module.len()]);
    ends.into_iter().any(|end| module[..end].ends_with(name))
}

/// A name of modules to save as PEFT reads it: in full where other modules end with its letters too.
fn unambiguous(name: &str, specs: &Weights<Spec>) -> Vec<String> {
    let modules = specs.iter().flat_map(|spec| &spec.parts).map(|(part, _)| module(part));
    let (own, others): (BTreeSet<&str>, BTreeSet<&str>) =
        modules.filter(|module| module.ends_with(name)).partition(|module| goes_by(module, name));
    if others.is_empty() { vec![name.to_owned()] } else { own.into_iter().map(str::to_owned).collect() }
}
