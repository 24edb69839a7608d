//! LoRA: which layers get adapters, what they are called in PEFT's files, and PEFT's configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::{Value, json};

use super::spec::{Role, Spec, Start, specs as all_specs};
use super::weights::{Adapter, Dense, Weights};
use super::{Config, Error};
use crate::checkpoint::adapter::CONFIG;
use crate::checkpoint::{AdapterFiles, Checkpoint};

/// Before every name in PEFT's adapter files.
pub const PREFIX: &str = "base_model.model.";

/// Keys of PEFT's configuration that [`Lora::from_peft`] reads.
const READ: [&str; 9] = [
    "peft_type",
    "bias",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "init_lora_weights",
];

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

/// Low-rank adapters instead of training the model's own weights (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rank of every adapter.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout of the adapters' inputs in training.
    pub dropout: f64,
    /// Scale by `alpha / √rank` instead (Kalajdzievski 2023, arXiv 2312.03732).
    pub rslora: bool,
    /// Train the norms of adapted rows apart from their directions (DoRA: Liu et al. 2024, arXiv 2402.09353).
    pub dora: bool,
    /// The layers with adapters.
    pub targets: Targets,
    /// Other modules that are trained whole and saved with the adapters.
    pub modules_to_save: Vec<String>,
}

/// Which dense layers get adapters.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// All of the blocks.
    AllLinear,
    /// Those with one of these names, or whose name ends with one of them after a dot.
    Named(Vec<String>),
    /// Those whose adapters a file has; what the model lacks is noticed when the tensors are read.
    Found(Vec<String>),
}

/// Whether a module goes by `name`, as PEFT decides it.
fn goes_by(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
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
    let modules = specs.iter().into_iter().flat_map(|spec| &spec.parts).map(|(part, _)| module(part));
    let (own, others): (BTreeSet<&str>, BTreeSet<&str>) =
        modules.filter(|module| module.ends_with(name)).partition(|module| goes_by(module, name));
    if others.is_empty() { vec![name.to_owned()] } else { own.into_iter().map(str::to_owned).collect() }
}

/// The module of a parameter's name.
fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}

/// The last component of a name.
fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

impl Lora {
    /// Factor of `B A`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The shape of the model: a head or embedding that is trained by itself is its own matrix.
    pub fn config(&self, config: &Config) -> Config {
        let tables = ["lm_head", "model.embed_tokens", "transformer.wte"];
        let untied = |name: &String| tables.iter().any(|table| goes_by(table, name));
        Config { tied: config.tied && !self.modules_to_save.iter().any(untied), ..config.clone() }
    }

    /// The parameters of [`Lora::config`] with adapters: trained are those, and the modules to save.
    ///
    /// # Errors
    /// When a name matches nothing, or the rank is no rank of an adapted layer.
    pub fn specs(&self, config: &Config) -> Result<Weights<Spec>, Error> {
        let mut specs = all_specs(&self.config(config));
        // A tied head can be named: it is untied then.
        let modules = Modules::of(&all_specs(&Config { tied: false, ..config.clone() }));
        if let Targets::Named(names) = &self.targets {
            modules.check("--lora-target", names, &modules.linear)?;
        }
        if !matches!(self.targets, Targets::Found(_)) {
            modules.check("--modules-to-save", &self.modules_to_save, &modules.others)?;
        }
        for spec in specs.iter_mut() {
            let saved = |name: &String| spec.parts.iter().any(|(part, _)| goes_by(module(part), name));
            spec.trained = self.modules_to_save.iter().any(saved);
        }
        for block in &mut specs.blocks {
            for dense in block.dense_mut() {
                self.adapt(dense)?;
            }
        }
        Ok(specs)
    }

    fn adapt(&self, dense: &mut Dense<Spec>) -> Result<(), Error> {
        let (inputs, rank) = (dense.weight.columns(), self.rank);
        let mut adapted: Vec<(&str, Range<usize>)> = Vec::new();
        let mut at = 0;
        for (name, rows) in &dense.weight.parts {
            let (module, columns) = (module(name), at..at + rows);
            at = columns.end;
            let is_target = match &self.targets {
                Targets::AllLinear => true,
                Targets::Named(names) | Targets::Found(names) => {
                    names.iter().any(|name| goes_by(module, name))
                }
            };
            if is_target {
                if rank == 0 || rank > inputs.min(*rows) {
                    let shape = [*rows, inputs];
                    return Err(Error::Rank { rank, module: module.to_owned(), shape });
                }
                adapted.push((module, columns));
            }
        }
        if adapted.is_empty() {
            return Ok(());
        }
        let parts = |suffix: &str, rows: fn(&Range<usize>, usize) -> usize| -> Vec<(String, usize)> {
            adapted.iter().map(|(name, columns)| (format!("{name}.{suffix}"), rows(columns, rank))).collect()
        };
        let uniform = Start::Uniform(1.0 / (inputs as f64).sqrt());
        let b = parts("lora_B.weight", |columns, _| columns.len());
        let b =
            b.into_iter().map(|part| Spec::new(Role::LowRankB, vec![part], Some(rank), Start::Constant(0.0)));
        let magnitude = || {
            let parts = parts("lora_magnitude_vector", |columns, _| columns.len());
            let magnitude = Spec::new(Role::Magnitude, parts, None, Start::Constant(1.0));
            [magnitude.clone(), Spec { role: Role::Norms, trained: false, ..magnitude }]
        };
        dense.adapter = Some(Adapter {
            a: Spec::new(Role::LowRankA, parts("lora_A.weight", |_, rank| rank), Some(inputs), uniform),
            b: b.collect(),
            magnitude: self.dora.then(magnitude),
            parts: adapted.iter().map(|(_, columns)| columns.clone()).collect(),
        });
        Ok(())
    }

    /// Reads PEFT's configuration. Which layers have adapters is seen from the tensors: `target_modules` may be a
    /// pattern, or left out layers.
    ///
    /// # Errors
    /// When it asks for something else than temper computes.
    pub fn from_peft(files: &AdapterFiles) -> Result<Lora, Error> {
        let AdapterFiles { path, config, tensors } = files;
        let wrong = |key: &str, expected: &str| Error::AdapterConfig {
            path: path.join(CONFIG),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: config.get(key).map_or_else(|| "nothing".to_owned(), Value::to_string),
        };
        let is_off = |value: &Value| {
            value.is_null()
                || *value == json!(false)
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(serde_json::Map::is_empty)
        };
        if config["peft_type"] != "LORA" {
            return Err(wrong("peft_type", "\"LORA\""));
        }
        if !matches!(config["bias"].as_str(), None | Some("none")) {
            return Err(wrong("bias", "\"none\""));
        }
        let all = config.as_object().into_iter().flatten();
        let mut others =
            all.filter(|(key, _)| !READ.contains(&key.as_str()) && !HARMLESS.contains(&key.as_str()));
        if let Some((key, _)) = others.find(|(_, value)| !is_off(value)) {
            return Err(wrong(key, "nothing: temper does not compute it"));
        }
        // The other ways change the base's weights, which a file of adapters does not have.
        let init = &config["init_lora_weights"];
        if !init.is_null()
            && !init.is_boolean()
            && !["gaussian", "eva", "orthogonal"].map(Value::from).contains(init)
        {
            return Err(wrong("init_lora_weights", "true, false, \"gaussian\", \"eva\" or \"orthogonal\""));
        }
        let rank = config["r"].as_u64().filter(|r| (1..=1 << 24).contains(r));
        let rank = rank.ok_or_else(|| wrong("r", "a whole number from 1"))? as usize;
        let number = |key: &str, default: f64| match &config[key] {
            Value::Null => Ok(default),
            value => value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| wrong(key, "a number")),
        };
        let flag = |key: &str| match &config[key] {
            Value::Null => Ok(false),
            value => value.as_bool().ok_or_else(|| wrong(key, "true or false")),
        };
        let mut names: Vec<String> = Vec::new();
        for (name, _) in tensors.tensors() {
            let name = name.strip_prefix(PREFIX).unwrap_or(name);
            names.extend(name.strip_suffix(".lora_A.weight").map(str::to_owned));
        }
        let saved = match &config["modules_to_save"] {
            Value::Null => Vec::new(),
            list => {
                let list = list.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
                let list: Vec<&str> = list.ok_or_else(|| wrong("modules_to_save", "a list of names"))?;
                let saved: BTreeSet<_> = list.into_iter().flat_map(|name| saved_by(name, tensors)).collect();
                saved.into_iter().collect()
            }
        };
        let dropout = number("lora_dropout", 0.0)?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(wrong("lora_dropout", "a number from 0 to below 1"));
        }
        Ok(Lora {
            rank,
            alpha: number("lora_alpha", 8.0)?,
            dropout,
            rslora: flag("use_rslora")?,
            dora: flag("use_dora")?,
            targets: Targets::Found(names),
            modules_to_save: saved,
        })
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
        // PEFT's own are whole numbers.
        let alpha = if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": alpha,
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

/// The modules of a model, by their last names.
struct Modules {
    /// Dense layers of the blocks.
    linear: BTreeSet<String>,
    /// Embeddings, norms, head.
    others: BTreeSet<String>,
    full: BTreeSet<String>,
}

impl Modules {
    fn of(specs: &Weights<Spec>) -> Modules {
        let names = |chosen: &dyn Fn(&Spec) -> bool| -> BTreeSet<String> {
            let specs = specs.iter().into_iter().filter(|spec| chosen(spec));
            specs.flat_map(|spec| &spec.parts).map(|(name, _)| module(name).to_owned()).collect()
        };
        let of_linear = names(&|spec| spec.role == Role::Linear);
        let full = names(&|_| true);
        let short = |names: Vec<&String>| names.into_iter().map(|name| last(name).to_owned()).collect();
        Modules {
            linear: short(of_linear.iter().collect()),
            others: short(full.difference(&of_linear).collect()),
            full,
        }
    }

    /// That every name matches a module of this kind.
    fn check(&self, option: &'static str, names: &[String], kind: &BTreeSet<String>) -> Result<(), Error> {
        let is_known = |name: &&String| {
            self.full.iter().any(|module| goes_by(module, name) && kind.contains(last(module)))
        };
        match names.iter().find(|name| !is_known(name)) {
            None => Ok(()),
            Some(name) => Err(Error::Module {
                option,
                name: name.clone(),
                known: kind.iter().cloned().collect::<Vec<_>>().join(", "),
            }),
        }
    }
}
