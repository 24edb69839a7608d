//! Adapters: from options or from PEFT's files.

use std::path::Path;

use anyhow::Result;
use temper::checkpoint::{AdapterFiles, open_adapter};
use temper::model::Adapted;
use temper::model::files::Quantise;
use temper::model::lora::{Lora, Targets};
use temper::model::spec::Spec;
use temper::model::weights::Weights;

use crate::args::{AdapterOptions, LoraOptions, Method, Variant};
use crate::config::Settings;
use crate::output::{grouped, say};

/// Adapters to put on a model.
pub struct Adapters {
    pub lora: Lora,
    /// Where their values come from; fresh ones without.
    pub files: Option<AdapterFiles>,
}

/// Opens the adapter in a folder.
pub fn open(path: &Path) -> Result<Adapters> {
    let files = open_adapter(path)?;
    let lora = Lora::from_peft(&files)?;
    say("adapter", format!("`{}`: {}", path.display(), described(&lora)));
    Ok(Adapters { lora, files: Some(files) })
}

impl Adapters {
    /// On a model that is kept in this way.
    pub fn adapted(&self, quantise: Quantise) -> Adapted<'_> {
        Adapted { lora: &self.lora, adapter: self.files.as_ref(), quantise }
    }
}

impl AdapterOptions {
    /// The adapter that is asked for.
    pub fn open(&self) -> Result<Option<Adapters>> {
        self.adapter.as_deref().map(open).transpose()
    }
}

impl LoraOptions {
    /// How weights that are not trained are kept.
    pub fn quantise(&self) -> Quantise {
        match self.method {
            Method::Full => Quantise::None,
            Method::Lora => self.quantize.unwrap_or(Quantise::File),
        }
    }

    /// The adapters to train, with every option resolved; none for training of all weights.
    pub fn adapters(&self, settings: &mut Settings) -> Result<Option<Adapters>> {
        if self.method == Method::Full {
            return Ok(None);
        }
        let mut adapters = match &self.adapter {
            Some(path) => open(path)?,
            None => Adapters { lora: self.fresh(), files: None },
        };
        let lora = &mut adapters.lora;
        lora.dropout = self.lora_dropout.unwrap_or(lora.dropout);
        settings.resolve("lora_dropout", lora.dropout);
        settings.resolve("lora_plus_ratio", self.lora_plus_ratio.unwrap_or(1.0));
        settings.resolve("quantize", crate::args::quantise_name(self.quantise()));
        if adapters.files.is_none() {
            settings.resolve("lora_r", lora.rank);
            settings.resolve("lora_alpha", lora.alpha);
            settings.resolve("lora_target", self.lora_target.as_deref().unwrap_or(ALL_LINEAR));
            settings.resolve("lora_variant", crate::args::variant_name(self.variant()));
        }
        Ok(Some(adapters))
    }

    fn variant(&self) -> Variant {
        self.lora_variant.unwrap_or(Variant::Lora)
    }

    fn fresh(&self) -> Lora {
        let names = |list: &str| list.split(',').map(|name| name.trim().to_owned()).collect();
        let default = Lora::default();
        Lora {
            rank: self.lora_r.unwrap_or(default.rank),
            alpha: self.lora_alpha.unwrap_or(default.alpha),
            rslora: self.variant() == Variant::RsLora,
            dora: self.variant() == Variant::Dora,
            targets: match self.lora_target.as_deref().unwrap_or(ALL_LINEAR) {
                ALL_LINEAR => Targets::AllLinear,
                list => Targets::Named(names(list)),
            },
            modules_to_save: self.modules_to_save.as_deref().map(names).unwrap_or_default(),
            ..default
        }
    }
}

const ALL_LINEAR: &str = "all-linear";

/// An adapter's kind in a few words.
fn described(lora: &Lora) -> String {
    let kind = match (lora.dora, lora.rslora) {
        (true, _) => "DoRA",
        (false, true) => "rank-stabilised LoRA",
        (false, false) => "LoRA",
    };
    let one = lora.rank_pattern.is_empty() && lora.alpha_pattern.is_empty();
    format!(
        "{kind} of rank {}, alpha {}{}",
        lora.rank,
        lora.alpha,
        if one { "" } else { ", others by pattern" }
    )
}

/// Says how much is trained.
pub fn introduce(adapters: &Adapters, specs: &Weights<Spec>, quantise: Quantise) {
    let count = |chosen: fn(&Spec) -> bool| -> usize {
        specs.iter().filter(|spec| chosen(spec)).map(Spec::len).sum()
    };
    let (trained, all) = (count(|spec| spec.trained), count(|spec| spec.trained || !spec.role.is_adapter()));
    let share = 100.0 * trained as f64 / all as f64;
    let kept = match quantise {
        Quantise::None => "the rest frozen",
        Quantise::File => "the rest frozen, as the file has it",
        Quantise::Nf4 => "the rest frozen, dense layers in NF4",
        Quantise::Int8 => "the rest frozen, dense layers in int8",
    };
    let (trained, kind) = (grouped(trained), described(&adapters.lora));
    say("lora", format!("{kind}: {trained} parameters trained ({share:.2} %), {kept}"));
}
