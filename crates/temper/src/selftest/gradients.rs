//! Gradients of every operation and of whole models against central differences, in f64.

use temper_kernels::*;

use super::{Check, relative, tiny, values, worst};
use crate::data::Forest;
use crate::model::config;
use crate::model::decoder::{Decoder, StepDropout};

/// Half the distance of the two points of a difference.
const H: f64 = 1e-5;
const BOUND: f64 = 1e-6;

/// Compares `backward` with central differences of `Σ out · weights`.
fn finite_differences(
    name: &str,
    inputs: &[usize],
    forward: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    backward: impl Fn(&[Vec<f64>], &Vec<f64>) -> Vec<Vec<f64>>,
) -> Check {
    let mut x: Vec<Vec<f64>> =
        inputs.iter().enumerate().map(|(i, &len)| values(&format!("{name}{i}"), len)).collect();
    let weights = values("weights", forward(&x).len());
    let loss = |x: &[Vec<f64>]| forward(x).iter().zip(&weights).map(|(out, w)| out * w).sum::<f64>();
    let analytic = backward(&x, &weights);
    let mut errors = Vec::new();
    for (i, gradient) in analytic.iter().enumerate() {
        let numeric: Vec<f64> = (0..x[i].len())
            .map(|j| {
                let middle = x[i][j];
                let mut at = |value: f64| {
                    x[i][j] = value;
                    loss(&x)
                };
                let slope = (at(middle + H) - at(middle - H)) / (2.0 * H);
                x[i][j] = middle;
                slope
            })
            .collect();
        errors.push(relative(gradient, &numeric));
    }
    Check::new(name, worst(errors), BOUND)
}

/// Every operation, and whole models, against finite differences in f64.
pub fn gradients() -> Vec<Check> {
    let mut checks = operations();
    for (name, config) in tiny::configs() {
        for p in [0.0, 0.2] {
            let title = if p > 0.0 { format!("{name} with dropout") } else { name.to_string() };
            checks.push(model_gradients(&title, tiny::decoder(&Plain, &config), p));
        }
        for lora in tiny::loras(&config) {
            let title = format!("{name} with {}", if lora.dora { "DoRA" } else { "LoRA" });
            checks.push(model_gradients(&title, tiny::adapted(&Plain, &config, &lora, 1.0), 0.2));
        }
    }
    checks
}

fn operations() -> Vec<Check> {
    let d = Plain;
    let linear = Linear { rows: 3, inputs: 4, outputs: 5 };
    let mut checks = vec![
        finite_differences(
            "gather",
            &[20],
            |x| {
                let mut out = vec![0.0; 12];
                d.gather(&mut out, &x[0], &[3, 0, 3], 4);
                out
            },
            |_, dout| {
                let mut dtable = vec![0.0; 20];
                d.gather_backward(&mut dtable, dout, &[3, 0, 3], 4);
                vec![dtable]
            },
        ),
        finite_differences(
            "linear",
            &[12, 20, 5],
            |x| {
                let mut out = vec![0.0; 15];
                d.linear(&mut out, &x[0], &x[1], Some(&x[2]), linear);
                out
            },
            |x, dout| {
                let (mut dx, mut dw, mut db) = (vec![0.0; 12], vec![0.0; 20], vec![0.0; 5]);
                d.linear_backward(
                    Some(&mut dx),
                    Some(&mut dw),
                    Some(&mut db),
                    dout,
                    &x[0],
                    &x[1],
                    linear,
                    true,
                );
                vec![dx, dw, db]
            },
        ),
        head_gradients(),
        head_norm_gradients(NormKind::Rms),
        head_norm_gradients(NormKind::RmsFromOne),
        rope_gradients(),
        dropout_gradients(),
    ];
    checks.extend([NormKind::Layer, NormKind::Rms, NormKind::RmsFromOne].map(norm_gradients));
    checks
        .extend([Activation::SwiGlu, Activation::GeGluTanh, Activation::GeluTanh].map(activation_gradients));
    checks
        .extend([(None, 0.0), (Some(2), 0.0), (None, 0.3)].map(|(window, p)| attention_gradients(window, p)));
    checks
}

fn norm_gradients(kind: NormKind) -> Check {
    let shape = Norm { kind, epsilon: 1e-5, rows: 3, width: 5 };
    finite_differences(
        &format!("norm {kind:?}"),
        &[15, 5, 5],
        |x| {
            let mut out = vec![0.0; 15];
            Plain.norm(&mut out, &x[0], &x[1], Some(&x[2]), shape);
            out
        },
        |x, dout| {
            let (mut dx, mut dgain, mut dbias) = (vec![0.0; 15], vec![0.0; 5], vec![0.0; 5]);
            Plain.norm_backward(&mut dx, Some(&mut dgain), Some(&mut dbias), dout, &x[0], &x[1], shape);
            vec![dx, dgain, dbias]
        },
    )
}

fn activation_gradients(kind: Activation) -> Check {
    finite_differences(
        &format!("activation {kind:?}"),
        &[6 * kind.inputs()],
        |x| {
            let mut out = vec![0.0; 6];
            Plain.activation(kind, &mut out, &x[0], 2, 3);
            out
        },
        |x, dout| {
            let mut dx = vec![0.0; 6 * kind.inputs()];
            Plain.activation_backward(kind, &mut dx, dout, &x[0], 2, 3);
            vec![dx]
        },
    )
}

const HEADS: Heads = Heads { query: 4, key: 2, width: 4 };

fn head_norm_gradients(kind: NormKind) -> Check {
    let norm = Norm { kind, epsilon: 1e-6, rows: 3, width: HEADS.width };
    finite_differences(
        &format!("head norm {kind:?}"),
        &[3 * HEADS.fused(), 4, 4],
        |x| {
            let mut qkv = x[0].clone();
            Plain.head_norm(&mut qkv, [&x[1], &x[2]], HEADS, norm);
            qkv
        },
        |x, dout| {
            let (mut dqkv, mut dq, mut dk) = (dout.clone(), vec![0.0; 4], vec![0.0; 4]);
            let dgains = [Some(&mut dq), Some(&mut dk)];
            Plain.head_norm_backward(&mut dqkv, dgains, &x[0], [&x[1], &x[2]], HEADS, norm);
            vec![dqkv, dq, dk]
        },
    )
}

fn rope_gradients() -> Check {
    let angles = values("angles", 3 * HEADS.width / 2);
    let (sin, cos): (Vec<f64>, Vec<f64>) = angles.iter().map(|angle| angle.sin_cos()).unzip();
    finite_differences(
        "rope",
        &[3 * HEADS.fused()],
        |x| {
            let mut qkv = x[0].clone();
            Plain.rope(&mut qkv, &cos, &sin, HEADS, 3);
            qkv
        },
        |_, dout| {
            let mut dqkv = dout.clone();
            Plain.rope_backward(&mut dqkv, &cos, &sin, HEADS, 3);
            vec![dqkv]
        },
    )
}

fn dropout_gradients() -> Check {
    let dropout = Dropout { p: 0.4, key: 3, paths: &[5, 6, 7] };
    let apply = |x: &[f64]| {
        let mut x = x.to_vec();
        Plain.dropout(&mut x, 4, dropout);
        x
    };
    finite_differences("dropout", &[12], |x| apply(&x[0]), |_, dout| vec![apply(dout)])
}

fn attention_gradients(window: Option<usize>, p: f64) -> Check {
    let segments = [
        Segment { rows: 0..3, context: vec![], own: 0 },
        Segment { rows: 3..5, context: vec![0..3], own: 3 },
        Segment { rows: 5..7, context: vec![0..3], own: 5 },
    ];
    let paths = [1, 2, 3, 4, 5, 6, 7];
    let dropout = (p > 0.0).then_some(Dropout { p, key: 1, paths: &paths });
    let shape = Attention { heads: HEADS, segments: &segments, window, dropout };
    let forward = |qkv: &Vec<f64>| {
        let (mut out, mut lse) = (vec![0.0; 7 * HEADS.output()], vec![0.0; 7 * HEADS.query]);
        Plain.attention(&mut out, &mut lse, Columns::fused(qkv, HEADS), shape);
        (out, lse)
    };
    finite_differences(
        &format!("attention, window {window:?}, dropout {p}"),
        &[7 * HEADS.fused()],
        |x| forward(&x[0]).0,
        |x, dout| {
            let (out, lse) = forward(&x[0]);
            let mut dqkv = vec![0.0; x[0].len()];
            Plain.attention_backward(&mut dqkv, dout, &x[0], &out, &lse, shape);
            vec![dqkv]
        },
    )
}

fn head_gradients() -> Check {
    let targets = [Target { row: 0, token: 4 }, Target { row: 0, token: 1 }, Target { row: 1, token: 6 }];
    let shape = Head { rows: 2, width: 3, vocabulary: 7 };
    finite_differences(
        "head",
        &[6, 21],
        |x| Plain.head(Aside::Nothing, &x[0], &x[1], &targets, shape).logp,
        |x, dout| {
            let output = Plain.head(Aside::Nothing, &x[0], &x[1], &targets, shape);
            let (mut dhidden, mut dweight) = (vec![0.0; 6], vec![0.0; 21]);
            Plain.head_backward(
                &mut dhidden,
                &mut dweight,
                &mut Vec::new(),
                &x[0],
                &x[1],
                Loss { targets: &targets, coefficients: dout, log_sum_exp: &output.log_sum_exp },
                shape,
                true,
            );
            vec![dhidden, dweight]
        },
    )
}

fn model_gradients(name: &str, mut decoder: Decoder<Plain>, p: f64) -> Check {
    let forest = Forest::new(&tiny::sequences(decoder.config.vocabulary));
    let dropout =
        StepDropout { p: config::Dropout { embedding: p, attention: p, residual: p }, adapter: p, key: 17 };
    let coefficients = tiny::coefficients(&forest, 0);
    let (_, analytic) = tiny::loss_and_gradient(&Plain, &decoder, &forest, dropout, &coefficients);
    let mut a = decoder.activations(&Plain, forest.rows(), false);
    let mut loss = |decoder: &Decoder<Plain>| {
        decoder.forward(&Plain, &forest, dropout, None, &mut a);
        decoder
            .head(&Plain, &forest, &a)
            .logp
            .iter()
            .zip(&coefficients)
            .map(|(logp, c)| logp * c)
            .sum::<f64>()
    };
    let mut errors = Vec::new();
    for (tensor, gradient) in analytic.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        let probes: Vec<usize> = (0..gradient.len()).step_by(gradient.len().div_ceil(7)).collect();
        let numeric: Vec<f64> = probes
            .iter()
            .map(|&i| {
                let mut at = |shift: f64| {
                    decoder.weights.iter_mut().nth(tensor).into_iter().for_each(|values| values[i] += shift);
                    loss(&decoder)
                };
                let slope = (at(H) - at(-2.0 * H)) / (2.0 * H);
                at(H);
                slope
            })
            .collect();
        let chosen: Vec<f64> = probes.iter().map(|&i| gradient[i]).collect();
        let largest = gradient.iter().fold(f64::MIN_POSITIVE, |max, g| max.max(g.abs()));
        errors.extend(chosen.iter().zip(&numeric).map(|(a, n)| (a - n).abs() / largest));
    }
    Check::new(name, worst(errors), BOUND)
}
