//! How a decoder knows the order of its tokens.

use serde_json::{Map, Value, json};

use super::Error;
use super::keys::Keys;

/// How a decoder knows the order of its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// A learned vector for each position, added to the embedding.
    Learned,
    /// Rotary embedding of q and k (Su et al. 2021, arXiv 2104.09864).
    Rotary {
        /// The base of the frequencies.
        theta: f64,
        /// Their scaling.
        scaling: RopeScaling,
    },
}

/// How the frequencies of rotary positions are changed for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As in the paper.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_context / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths shorter than `original_context / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// The context that the frequencies were trained for.
        original_context: usize,
    },
}

impl Positions {
    /// Rotary positions of a `config.json`: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. `theta` is the
    /// family's, when none is given.
    pub(super) fn rotary(keys: &Keys, theta: f64) -> Result<Positions, Error> {
        let outer_theta = keys.positive("rope_theta")?;
        let (parameters, scaling) = (keys.object("rope_parameters")?, keys.object("rope_scaling")?);
        let (key, object) = match (parameters, scaling) {
            (Some(_), Some(scaling)) if parameters != Some(scaling) => {
                return Err(keys.wrong("rope_scaling", "nothing beside `rope_parameters`"));
            }
            (Some(parameters), _) => ("rope_parameters.", parameters.clone()),
            (None, Some(scaling)) => ("rope_scaling.", scaling.clone()),
            (None, None) => ("rope_parameters.", Map::new()),
        };
        let inner = Keys::new(&object, key);
        let inner_theta = inner.positive("rope_theta")?;
        if let (Some(outer), Some(inner)) = (outer_theta, inner_theta)
            && outer != inner
        {
            return Err(keys.wrong("rope_theta", format!("`{inner}`, as `{key}rope_theta` says")));
        }
        let scaling = RopeScaling::read(&inner)?;
        inner.only("partial_rotary_factor", &[json!(1), json!(1.0)])?;
        inner.finish(|_, _| false)?;
        Ok(Positions::Rotary { theta: inner_theta.or(outer_theta).unwrap_or(theta), scaling })
    }

    /// The new form of `rope_parameters`, when they are rotary.
    pub(super) fn to_json(self) -> Option<Value> {
        let Positions::Rotary { theta, scaling } = self else { return None };
        Some(match scaling {
            RopeScaling::None => json!({ "rope_theta": theta, "rope_type": "default" }),
            RopeScaling::Linear { factor } => {
                json!({ "rope_theta": theta, "rope_type": "linear", "factor": factor })
            }
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_context } => {
                json!({
                    "rope_theta": theta,
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_frequency_factor,
                    "high_freq_factor": high_frequency_factor,
                    "original_max_position_embeddings": original_context,
                })
            }
        })
    }

    /// Angles of a position: one for each pair of a head, none for learned positions.
    pub(super) fn angles(self, head_width: usize) -> usize {
        match self {
            Positions::Learned => 0,
            Positions::Rotary { .. } => head_width / 2,
        }
    }

    /// How far one position turns each of them: `theta^(−2i / head_width)`, scaled.
    pub(super) fn frequencies(self, head_width: usize) -> Vec<f64> {
        let Positions::Rotary { theta, scaling } = self else { return Vec::new() };
        let plain = |i| theta.powf(-2.0 * i as f64 / head_width as f64);
        (0..self.angles(head_width)).map(|i| scaling.of(plain(i))).collect()
    }
}

impl RopeScaling {
    fn read(keys: &Keys) -> Result<RopeScaling, Error> {
        let (kind, old_kind) = (keys.string("rope_type")?, keys.string("type")?);
        if kind.is_some() && old_kind.is_some() && kind != old_kind {
            return Err(keys.wrong("type", format!("`{}`, as `rope_type` says", kind.unwrap_or_default())));
        }
        let key = if kind.is_some() { "rope_type" } else { "type" };
        match kind.or(old_kind).unwrap_or("default") {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: keys.required_positive("factor")? }),
            "llama3" => {
                let (low, high) =
                    (keys.required_positive("low_freq_factor")?, keys.required_positive("high_freq_factor")?);
                if low >= high {
                    let expected = format!("a number above `low_freq_factor`, {low}");
                    return Err(keys.wrong("high_freq_factor", expected));
                }
                Ok(RopeScaling::Llama3 {
                    factor: keys.required_positive("factor")?,
                    low_frequency_factor: low,
                    high_frequency_factor: high,
                    original_context: keys.required_size("original_max_position_embeddings")?,
                })
            }
            _ => Err(keys.wrong(key, "`default`, `linear` or `llama3`")),
        }
    }

    fn of(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_context,
            } => {
                let turns = original_context as f64 * frequency / std::f64::consts::TAU;
                let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
