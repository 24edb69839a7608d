//! Finds Llama 3's frequency scaling again in the factors that a GGUF file keeps of it.

use std::f64::consts::TAU;

use serde_json::{Value, json};

/// Llama 3's ramp; every model that uses the formula has these two.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
/// Where the formula leaves the original context open, because no frequency lies on the ramp.
const USUAL_CONTEXT: f64 = 8192.0;
/// The factors are stored as f32 and were computed in f32.
const TOLERANCE: f64 = 1e-4;

/// The `rope_parameters` (without `rope_theta`) that give `factors`, the divisors of the frequencies
/// `theta^(-2i / (2 * factors.len()))`; none when Llama 3's formula does not give them.
pub(super) fn recover(factors: &[f32], theta: f64) -> Option<Value> {
    let wavelengths: Vec<f64> =
        (0..factors.len()).map(|i| TAU * theta.powf(i as f64 / factors.len() as f64)).collect();
    let factors: Vec<f64> = factors.iter().map(|&factor| f64::from(factor)).collect();
    let near = |a: f64, b: f64| (a - b).abs() <= TOLERANCE * b.abs();
    let &factor = factors.last()?;
    if factors.iter().all(|&factor| near(factor, 1.0)) {
        return Some(json!({ "rope_type": "default" }));
    }
    let ramp = factors.iter().position(|&f| !near(f, 1.0) && !near(f, factor));
    let context = match ramp {
        // On the ramp 1/f = (1 - s)/factor + s with s = (context/wavelength - LOW) / (HIGH - LOW).
        Some(i) => {
            let s = (1.0 / factors[i] - 1.0 / factor) / (1.0 - 1.0 / factor);
            (wavelengths[i] * (s * (HIGH - LOW) + LOW)).round()
        }
        None => USUAL_CONTEXT,
    };
    let fits = |(&wavelength, &found): (&f64, &f64)| near(found, divisor(wavelength, factor, context));
    // A NaN or an infinity among the factors never fits.
    (context >= 1.0 && wavelengths.iter().zip(&factors).all(fits)).then(|| {
        json!({
            "rope_type": "llama3",
            "factor": if near(factor, factor.round()) { factor.round() } else { factor },
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": context as u64,
        })
    })
}

/// Llama 3's divisor of the frequency with this wavelength.
fn divisor(wavelength: f64, factor: f64, context: f64) -> f64 {
    let turns = context / wavelength;
    if turns < LOW {
        factor
    } else if turns > HIGH {
        1.0
    } else {
        let smooth = (turns - LOW) / (HIGH - LOW);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}
