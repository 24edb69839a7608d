//! How attention knows the order of tokens: q and k are turned by angles that grow with the position.

use serde_json::{Map, Value, json};

use super::Error;
use super::keys::Keys;

/// Rotary embedding of q and k (Su et al. 2021, arXiv 2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// The base of the frequencies.
    pub theta: f64,
    /// Their scaling.
    pub scaling: RopeScaling,
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

impl Rotary {
    /// That of a `config.json`: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. `theta` is the family's, when
    /// none is given.
    pub(super) fn read(keys: &Keys, theta: f64) -> Result<Rotary, Error> {
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
        Rotary::read_inner(&inner, outer_theta, theta)
    }

    /// Gemma 3's, of layers that see everything and of those with a window: each its own object, or the older keys.
    pub(super) fn read_pair(keys: &Keys) -> Result<[Rotary; 2], Error> {
        let full = (keys.positive("rope_theta")?, 1_000_000.0);
        let local = (keys.positive("rope_local_base_freq")?, 10_000.0);
        let plain = |(outer, theta): (Option<f64>, f64)| Rotary {
            theta: outer.unwrap_or(theta),
            scaling: RopeScaling::None,
        };
        let Some(both) = keys.object("rope_parameters")? else {
            return Ok([Rotary::read(keys, full.1)?, plain(local)]);
        };
        if keys.value("rope_scaling").is_some() {
            return Err(keys.wrong("rope_scaling", "nothing beside `rope_parameters`"));
        }
        let both = Keys::new(both, "rope_parameters.");
        let read = |kind: &str, of: (Option<f64>, f64)| match both.object(kind)? {
            Some(one) => Rotary::read_inner(&Keys::new(one, &format!("rope_parameters.{kind}.")), of.0, of.1),
            None => Ok(plain(of)),
        };
        let pair = [read("full_attention", full)?, read("sliding_attention", local)?];
        both.finish(|_, _| false)?;
        Ok(pair)
    }

    /// With the base that stands `outside` the object, if there is one.
    fn read_inner(keys: &Keys, outside: Option<f64>, theta: f64) -> Result<Rotary, Error> {
        let inside = keys.positive("rope_theta")?;
        if let (Some(outside), Some(inside)) = (outside, inside)
            && outside != inside
        {
            return Err(keys.wrong("rope_theta", format!("`{outside}`, as it stands outside too")));
        }
        let theta = inside.or(outside).unwrap_or(theta);
        let scaling = RopeScaling::read(keys)?;
        keys.only("partial_rotary_factor", &[json!(1), json!(1.0)])?;
        keys.finish(|_, _| false)?;
        Ok(Rotary { theta, scaling })
    }

    /// The new form of `rope_parameters`.
    pub(super) fn to_json(self) -> Value {
        let theta = self.theta;
        match self.scaling {
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
        }
    }

    /// How far one position turns each pair of a head, `[head_width / 2]`: `theta^(−2i / head_width)`, scaled.
    pub(super) fn frequencies(self, head_width: usize) -> Vec<f64> {
        let plain = |i| self.theta.powf(-2.0 * i as f64 / head_width as f64);
        (0..head_width / 2).map(|i| self.scaling.of(plain(i))).collect()
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
