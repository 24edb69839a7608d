//! LoRA: which layers get adapters, and which other modules are trained beside them.

use std::collections::BTreeSet;

use temper_kernels::Part;

use super::spec::{Init, Role, Spec, specs as all_specs};
use super::weights::{Adapter, Dense, Weights};
use super::{Config, Error, Patterns};

/// Low-rank adapters instead of training the model's own weights (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct Lora {
    /// Rank of the adapters that no pattern gives another.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Other ranks, from a file.
    pub rank_pattern: Patterns<usize>,
    /// Other alphas, from a file.
    pub alpha_pattern: Patterns<f64>,
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

impl Default for Lora {
    /// Fresh adapters of rank 16 on all dense layers.
    fn default() -> Lora {
        Lora {
            rank: 16,
            alpha: 32.0,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            dropout: 0.0,
            rslora: false,
            dora: false,
            targets: Targets::AllLinear,
            modules_to_save: Vec::new(),
        }
    }
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
pub(super) fn goes_by(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// The module of a parameter's name.
pub(super) fn module(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}

/// The last component of a name.
pub(super) fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

impl Lora {
    /// Rank of a module's adapter, and the factor of its `B A`.
    fn rank_and_scale(&self, module: &str) -> (usize, f64) {
        let rank = self.rank_pattern.of(module).unwrap_or(self.rank);
        let alpha = self.alpha_pattern.of(module).unwrap_or(self.alpha);
        (rank, alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 })
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
            modules.check(TARGET, names, &modules.linear)?;
        }
        if !matches!(self.targets, Targets::Found(_)) {
            modules.check(SAVE, &self.modules_to_save, &modules.others)?;
        }
        for spec in specs.iter_mut() {
            let saves = |part: &str| self.modules_to_save.iter().any(|name| goes_by(module(part), name));
            let (saved, others): (Vec<&str>, Vec<&str>) =
                spec.parts.iter().map(|(part, _)| part.as_str()).partition(|part| saves(part));
            if let ([saved, ..], [other, ..]) = (&saved[..], &others[..]) {
                let [saved, other] = [saved, other].map(|part| module(part).to_owned());
                return Err(Error::Together { saved, other });
            }
            spec.trained = !saved.is_empty();
        }
        for block in &mut specs.blocks {
            for dense in block.dense_mut() {
                self.adapt(dense)?;
            }
        }
        Ok(specs)
    }

    fn adapt(&self, dense: &mut Dense<Spec>) -> Result<(), Error> {
        let inputs = dense.weight.columns();
        let mut adapted: Vec<(&str, Part)> = Vec::new();
        let (mut column, mut row) = (0, 0); // of the layer's output, and of A
        for (name, outputs) in &dense.weight.parts {
            let (module, columns) = (module(name), column..column + outputs);
            column = columns.end;
            let is_target = match &self.targets {
                Targets::AllLinear => true,
                Targets::Named(names) | Targets::Found(names) => {
                    names.iter().any(|name| goes_by(module, name))
                }
            };
            if is_target {
                // A file may have more than a layer's side, which is of no use but does no harm.
                let most =
                    if let Targets::Found(_) = self.targets { usize::MAX } else { inputs.min(*outputs) };
                let (rank, scale) = self.rank_and_scale(module);
                if rank == 0 || rank > most {
                    let shape = [*outputs, inputs];
                    return Err(Error::Rank { rank, module: module.to_owned(), shape });
                }
                adapted.push((module, Part { columns, low: row..row + rank, scale }));
                row += rank;
            }
        }
        if adapted.is_empty() {
            return Ok(());
        }
        let named = |suffix: &str, rows: fn(&Part) -> usize| -> Vec<(String, usize)> {
            adapted.iter().map(|(name, part)| (format!("{name}.{suffix}"), rows(part))).collect()
        };
        let uniform = Init::Uniform(1.0 / (inputs as f64).sqrt());
        let b = named("lora_B.weight", |part| part.columns.len()).into_iter().zip(&adapted).map(
            |(b, (_, part))| Spec::new(Role::LowRankB, vec![b], Some(part.low.len()), Init::Constant(0.0)),
        );
        let magnitude = || {
            let parts = named("lora_magnitude_vector", |part| part.columns.len());
            let magnitude = Spec::new(Role::Magnitude, parts, None, Init::Constant(1.0));
            [magnitude.clone(), Spec { role: Role::Norms, trained: false, ..magnitude }]
        };
        dense.adapter = Some(Adapter {
            a: Spec::new(
                Role::LowRankA,
                named("lora_A.weight", |part| part.low.len()),
                Some(inputs),
                uniform,
            ),
            b: b.collect(),
            magnitude: self.dora.then(magnitude),
            parts: adapted.iter().map(|(_, part)| part.clone()).collect(),
        });
        Ok(())
    }
}

/// The options that name modules.
const TARGET: &str = "--lora-target";
const SAVE: &str = "--modules-to-save";

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
            let specs = specs.iter().filter(|spec| chosen(spec));
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
                other: self.full.iter().any(|module| goes_by(module, name)).then_some(match option {
                    TARGET => SAVE,
                    _ => TARGET,
                }),
            }),
        }
    }
}
