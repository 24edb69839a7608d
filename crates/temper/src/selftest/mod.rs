//! Checks a user can run: gradients against finite differences, forests against single sequences, the identity
//! behind DPO, attention against stored values. The test suite runs the same.

mod stored;

use temper_kernels::textbook::{self, Masks, Real, Shape};
use temper_kernels::*;

use crate::data::{Forest, Sequence};
use crate::model::config::{self, Config, Family, Positions, RopeScaling};
use crate::model::decoder::{Decoder, ParameterGradients, StepDropout};
use crate::model::lora::{Lora, Targets};
use crate::model::spec::{Role, Spec, specs};
use crate::model::weights::{Parameters, Weights};
use crate::objective::{Dpo, Pair};

/// One checked quantity.
#[derive(Debug, Clone)]
pub struct Check {
    /// What was compared.
    pub name: String,
    /// The worst error found.
    pub error: f64,
    /// The error allowed.
    pub bound: f64,
}

impl Check {
    fn new(name: impl Into<String>, error: f64, bound: f64) -> Check {
        Check { name: name.into(), error, bound }
    }

    /// Whether the error is within its bound; not a number is not.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// Values in (−1, 1), a function of a name.
fn values(name: &str, len: usize) -> Vec<f64> {
    let key = name.bytes().fold(11, |key, byte| mix(key, byte.into()));
    (0..len).map(|i| 2.0 * uniform(key, i as u64) - 1.0).collect()
}

/// `max |a − b| / max |b|`.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    let largest = b.iter().fold(f64::MIN_POSITIVE, |max, b| max.max(b.abs()));
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs() / largest)
        .fold(0.0, |max, error| if error <= max { max } else { error })
}

// ---- attention ----

/// The summed absolute error of f32 attention against PyTorch's f64 values, without and with a mask.
pub fn attention() -> [Check; 2] {
    let shape = Shape { batch: 1, heads: 1, tokens: 3, width: 4 };
    let mask = [true, true, false, false, true, false, true, true, true];
    let error = |mask: Option<&[bool]>, expected: &[f64; 12]| {
        let [q, k, v] = &stored::QKV;
        let out = textbook::self_attention(
            [&q[..], &k[..], &v[..]],
            shape,
            Masks { attention: mask, padding: None },
            |_, _, _, _| f32::of(1.0),
        );
        out.iter().zip(expected).map(|(&out, expected)| (f64::from(out) - expected).abs()).sum()
    };
    [
        Check::new("Absolute error without mask", error(None, &stored::ATTENDED[0]), 1e-6),
        Check::new("Absolute error with mask", error(Some(&mask), &stored::ATTENDED[1]), 1e-6),
    ]
}

// ---- gradients ----

const STEP: f64 = 1e-4;
const FINITE_DIFFERENCE_BOUND: f64 = 1e-6;

/// Compares `backward` with central differences of `Σ out · weights`.
fn operation(
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
    let mut worst = 0f64;
    for (i, gradient) in analytic.iter().enumerate() {
        let numeric: Vec<f64> = (0..x[i].len())
            .map(|j| {
                let middle = x[i][j];
                let mut at = |value: f64| {
                    x[i][j] = value;
                    loss(&x)
                };
                let slope = (at(middle + STEP) - at(middle - STEP)) / (2.0 * STEP);
                x[i][j] = middle;
                slope
            })
            .collect();
        worst = worst.max(relative(gradient, &numeric));
    }
    Check::new(name, worst, FINITE_DIFFERENCE_BOUND)
}

/// Every operation, and whole models, against finite differences in f64.
pub fn gradients() -> Vec<Check> {
    let mut checks = operations();
    for (name, config) in tiny_configs() {
        for p in [0.0, 0.2] {
            let title = if p > 0.0 { format!("{name} with dropout") } else { name.to_string() };
            checks.push(model_gradients(&title, tiny(&Plain, &config), p));
        }
        for lora in loras(&config) {
            let title = format!("{name} with {}", if lora.dora { "DoRA" } else { "LoRA" });
            checks.push(model_gradients(&title, tiny_adapted(&Plain, &config, &lora, 1.0), 0.2));
        }
    }
    checks
}

// ---- adapters ----

/// Adapters of some layers beside a head that is trained whole, and DoRA's of all.
fn loras(config: &Config) -> [Lora; 2] {
    let names = if config.is_gpt2() { ["attn.c_attn", "mlp.c_proj"] } else { ["v_proj", "down_proj"] };
    let some = Lora {
        rank: 2,
        alpha: 3.0,
        dropout: 0.0,
        rslora: true,
        dora: false,
        targets: Targets::Named(names.map(str::to_owned).to_vec()),
        modules_to_save: vec!["lm_head".into()],
    };
    let all = Lora { dora: true, targets: Targets::AllLinear, modules_to_save: Vec::new(), ..some.clone() };
    [some, all]
}

/// A model with adapters that are switched off, or whose B is zero, against the model without: to the bit.
pub fn adapters(cpu: &Cpu) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, config) in tiny_configs() {
        let forest = Forest::new(&sequences(config.vocabulary));
        let logps = |decoder: &Decoder<Cpu>| {
            let mut a = decoder.activations(cpu, forest.rows(), false);
            decoder.forward(cpu, &forest, StepDropout::default(), None, &mut a);
            decoder.head(cpu, &forest, &a).logp
        };
        let base = logps(&tiny(cpu, &config));
        let all = Lora { modules_to_save: Vec::new(), ..loras(&config)[0].clone() };
        for lora in [all.clone(), Lora { dora: true, targets: Targets::AllLinear, ..all }] {
            let kind = if lora.dora { "DoRA" } else { "LoRA" };
            let mut off = tiny_adapted(cpu, &config, &lora, 1.0);
            off.adapters_on = false;
            let fresh = tiny_adapted(cpu, &config, &lora, 0.0);
            for (what, decoder) in [("off", off), ("with B = 0", fresh)] {
                let error = relative(&logps(&decoder), &base);
                checks.push(Check::new(format!("{name}: {kind} {what} ≡ base"), error, 0.0));
            }
        }
    }
    checks
}

fn operations() -> Vec<Check> {
    let d = Plain;
    let linear = Linear { rows: 3, inputs: 4, outputs: 5 };
    let mut checks = vec![
        operation(
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
        operation(
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
        head_norm_gradients(),
        rope_gradients(),
        dropout_gradients(),
    ];
    checks.extend([NormKind::Layer, NormKind::Rms].map(norm_gradients));
    checks.extend([Activation::SwiGlu, Activation::GeluTanh].map(activation_gradients));
    checks
        .extend([(None, 0.0), (Some(2), 0.0), (None, 0.3)].map(|(window, p)| attention_gradients(window, p)));
    checks
}

fn norm_gradients(kind: NormKind) -> Check {
    let shape = Norm { kind, epsilon: 1e-5, rows: 3, width: 5 };
    operation(
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
    operation(
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

fn head_norm_gradients() -> Check {
    operation(
        "head norm",
        &[3 * HEADS.fused(), 4, 4],
        |x| {
            let mut qkv = x[0].clone();
            Plain.head_norm(&mut qkv, [&x[1], &x[2]], HEADS, 3, 1e-6);
            qkv
        },
        |x, dout| {
            let (mut dqkv, mut dq, mut dk) = (dout.clone(), vec![0.0; 4], vec![0.0; 4]);
            let dgains = Some([&mut dq, &mut dk]);
            Plain.head_norm_backward(&mut dqkv, dgains, &x[0], [&x[1], &x[2]], HEADS, 3, 1e-6);
            vec![dqkv, dq, dk]
        },
    )
}

fn rope_gradients() -> Check {
    let angles = values("angles", 3 * HEADS.width / 2);
    let (sin, cos): (Vec<f64>, Vec<f64>) = angles.iter().map(|angle| angle.sin_cos()).unzip();
    operation(
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
    operation("dropout", &[12], |x| apply(&x[0]), |_, dout| vec![apply(dout)])
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
    operation(
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
    operation(
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

// ---- whole models ----

/// A tiny model of each kind of block.
fn tiny_configs() -> Vec<(&'static str, Config)> {
    let llama = Config {
        family: Family::Llama,
        vocabulary: 19,
        width: 12,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_width: 4,
        mlp_width: 10,
        context: 32,
        norm_epsilon: 1e-5,
        positions: Positions::Rotary { theta: 100.0, scaling: RopeScaling::None },
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: true,
        sliding_window: None,
        dropout: config::Dropout::default(),
        bos: None,
        eos: Vec::new(),
    };
    let gpt2 = Config {
        family: Family::Gpt2,
        kv_heads: 4,
        head_width: 3,
        positions: Positions::Learned,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        ..llama.clone()
    };
    let qwen3 = Config { family: Family::Qwen3, qk_norm: true, tied: false, head_width: 6, ..llama.clone() };
    let mistral =
        Config { family: Family::Mistral, sliding_window: Some(3), qkv_bias: true, ..llama.clone() };
    vec![
        ("GPT-2", gpt2),
        ("Llama", llama),
        ("Qwen3 (head norms, own head)", qwen3),
        ("Mistral (window), biases", mistral),
    ]
}

/// Sequences that share prefixes, partly.
fn sequences(vocabulary: usize) -> Vec<Sequence> {
    let token = |i: usize| ((i * i + 3 * i) % vocabulary) as u32;
    let make = |prefix: usize, own: usize, len: usize, trained| Sequence {
        tokens: (0..prefix).map(token).chain((0..len).map(|i| token(own + 5 * i))).collect(),
        trained,
        prompt: prefix,
    };
    vec![
        make(5, 2, 4, vec![5..9]),
        make(5, 3, 3, vec![2..4, 6..8]),
        make(0, 7, 6, vec![1..6]),
        make(5, 2, 6, vec![5..11]),
    ]
}

/// A decoder whose parameters are large enough that nothing is flat.
fn tiny<D: Device>(device: &D, config: &Config) -> Decoder<D> {
    Decoder::new(config.clone(), tiny_weights(device, &specs(config)))
}

/// The same with adapters, their B scaled. With B = 0, DoRA's magnitudes are the norms.
fn tiny_adapted<D: Device>(device: &D, config: &Config, lora: &Lora, b: f32) -> Decoder<D> {
    let Ok(specs) = lora.specs(config) else { unreachable!("the names are those of the tiny models") };
    let weights = tiny_weights(device, &specs);
    let mut decoder = Decoder::adapted(device, config, lora, specs, weights);
    for block in &mut decoder.weights.blocks {
        for dense in block.dense_mut() {
            for matrix in dense.adapter.iter_mut().flat_map(|adapter| &mut adapter.b) {
                let scaled = device.weight_values(matrix).iter().map(|x| b * x).collect();
                *matrix = device.weight(scaled, true);
            }
        }
    }
    decoder.refresh_norms(device);
    if b == 0.0 {
        decoder.magnitudes_from_norms(device);
    }
    decoder
}

fn tiny_weights<D: Device>(device: &D, specs: &Weights<Spec>) -> Parameters<D> {
    let start = |spec: &Spec| -> Vec<f32> {
        let scale = if spec.decays() { 0.4 } else { 0.2 };
        let name = &spec.parts[0].0;
        let around_one =
            name.ends_with("norm.weight") || name.contains("ln_") || spec.role == Role::Magnitude;
        let base = if around_one { 1.0 } else { 0.0 };
        values(name, spec.len()).iter().map(|x| (base + scale * x) as f32).collect()
    };
    specs.map_each(|spec| device.upload(start(spec)), |spec| device.weight(start(spec), true))
}

/// `Σ coefficient · logp` over the targets of one forest and its gradient, parameter by parameter.
fn loss_and_gradient<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    forest: &Forest,
    dropout: StepDropout,
    coefficients: &[f64],
) -> (f64, Vec<Option<D::Buffer>>) {
    let mut a = decoder.activations(device, forest.rows(), true);
    let mut g = decoder.gradients(device, forest.rows());
    let mut dw = decoder.zeros(device);
    decoder.forward(device, forest, dropout, None, &mut a);
    let output = decoder.head_before_backward(device, forest, &mut a);
    let sums = ParameterGradients { sums: &mut dw, add: true, ready: &mut |_, _| {} };
    decoder.backward(device, forest, dropout, coefficients, &output.log_sum_exp, &mut a, &mut g, sums);
    let loss = output.logp.iter().zip(coefficients).map(|(logp, c)| logp * c).sum();
    (loss, dw.iter_mut().into_iter().map(Option::take).collect())
}

/// A coefficient for each target that depends on its token and sequence, not on the batch.
fn coefficients(forest: &Forest, first_sequence: usize) -> Vec<f64> {
    let weight =
        |owner: u32, token: u32| uniform(first_sequence as u64 + u64::from(owner), token.into()) - 0.3;
    forest.owners.iter().zip(&forest.targets).map(|(&owner, target)| weight(owner, target.token)).collect()
}

fn model_gradients(name: &str, mut decoder: Decoder<Plain>, p: f64) -> Check {
    let forest = Forest::new(&sequences(decoder.config.vocabulary));
    let dropout =
        StepDropout { p: config::Dropout { embedding: p, attention: p, residual: p }, adapter: p, key: 17 };
    let coefficients = coefficients(&forest, 0);
    let (_, analytic) = loss_and_gradient(&Plain, &decoder, &forest, dropout, &coefficients);
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
    let mut worst = 0f64;
    for (tensor, gradient) in analytic.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        let probes: Vec<usize> = (0..gradient.len()).step_by(gradient.len().div_ceil(7)).collect();
        let numeric: Vec<f64> = probes
            .iter()
            .map(|&i| {
                let mut at = |shift: f64| {
                    decoder.weights.iter_mut()[tensor][i] += shift;
                    loss(&decoder)
                };
                let slope = (at(STEP) - at(-2.0 * STEP)) / (2.0 * STEP);
                at(STEP);
                slope
            })
            .collect();
        let chosen: Vec<f64> = probes.iter().map(|&i| gradient[i]).collect();
        let largest = gradient.iter().fold(f64::MIN_POSITIVE, |max, g| max.max(g.abs()));
        let error = chosen.iter().zip(&numeric).map(|(a, n)| (a - n).abs() / largest).fold(0.0, f64::max);
        worst = worst.max(error);
    }
    Check::new(name, worst, FINITE_DIFFERENCE_BOUND)
}

// ---- forest ----

/// A forest of sequences against each sequence alone, and a step split into micro-batches against the whole, in
/// value and in gradient: f64 to rounding, f32 to its own.
pub fn forest(cpu: &Cpu) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, config) in tiny_configs() {
        checks.extend(forest_on(&Plain, name, &config, "f64", 1e-12));
        checks.extend(forest_on(cpu, name, &config, "f32", 2e-5));
    }
    checks
}

fn forest_on<D: Device>(device: &D, name: &str, config: &Config, precision: &str, bound: f64) -> Vec<Check> {
    let decoder = tiny(device, config);
    let sequences = sequences(config.vocabulary);
    let dropout = StepDropout {
        p: config::Dropout { embedding: 0.1, attention: 0.1, residual: 0.1 },
        adapter: 0.0,
        key: 23,
    };
    // Batches as ranges of sequences; gradients add up over them.
    let run = |batches: &[std::ops::Range<usize>]| {
        let (mut losses, mut sum) = (0.0, Vec::<f64>::new());
        for range in batches {
            let forest = Forest::new(&sequences[range.clone()]);
            let (loss, gradients) =
                loss_and_gradient(device, &decoder, &forest, dropout, &coefficients(&forest, range.start));
            losses += loss;
            let flat: Vec<f64> = gradients
                .iter()
                .flatten()
                .flat_map(|g| device.download(g).iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
                .collect();
            sum = if sum.is_empty() { flat } else { sum.iter().zip(&flat).map(|(a, b)| a + b).collect() };
        }
        (losses, sum)
    };
    // Downloads are f32: a difference of one rounding is the floor of the f64 check.
    let bound_gradient = bound.max(1e-6);
    let (loss, gradient) = run(&[0..1, 1..2, 2..3, 3..4]);
    let mut checks = Vec::new();
    for (what, batches) in [("one forest", &[0..4][..]), ("two micro-batches", &[0..2, 2..4])] {
        let (batched_loss, batched_gradient) = run(batches);
        checks.push(Check::new(
            format!("{name}, {precision}: {what} ≡ one by one, value"),
            (batched_loss - loss).abs() / loss.abs(),
            bound,
        ));
        checks.push(Check::new(
            format!("{name}, {precision}: {what} ≡ one by one, gradient"),
            relative(&batched_gradient, &gradient),
            bound_gradient,
        ));
    }
    checks
}

// ---- DPO identity ----

/// For a random policy, reference and pairs: the implicit reward of the answer given the prompt differs from that
/// of prompt and answer together by the same amount for both answers, so that the loss and its gradient do not
/// see the prompt's probability (docs/theory.md, section 7).
pub fn dpo_identity() -> Vec<Check> {
    let (_, config) = tiny_configs().swap_remove(1);
    let policy = tiny(&Plain, &config);
    let mut reference = tiny(&Plain, &config);
    for (i, weight) in reference.weights.iter_mut().into_iter().enumerate() {
        let noise = values(&format!("reference{i}"), weight.len());
        weight.iter_mut().zip(noise).for_each(|(w, noise)| *w += 0.05 * noise);
    }
    let dpo = Dpo { beta: 0.1, label_smoothing: 0.0 };
    let (mut values_error, mut gradient_error) = (0f64, 0f64);
    for pair in 0..8 {
        let random = |name: &str, len: usize| -> Vec<u32> {
            values(&format!("{name}{pair}"), len).iter().map(|x| ((x + 1.0) * 9.4) as u32).collect()
        };
        let prompt = random("prompt", 6);
        let [answer, joint] = [prompt.len(), 1].map(|first_trained| {
            ["chosen", "rejected"].map(|which| {
                let tokens = [prompt.clone(), random(which, 5)].concat();
                Sequence { trained: vec![first_trained..tokens.len()], tokens, prompt: prompt.len() }
            })
        });
        let sides = [answer, joint].map(|sequences| {
            let forest = Forest::new(&sequences);
            let logps = |decoder: &Decoder<Plain>| {
                let mut a = decoder.activations(&Plain, forest.rows(), false);
                decoder.forward(&Plain, &forest, StepDropout::default(), None, &mut a);
                let sums = forest.sum_by_sequence(&decoder.head(&Plain, &forest, &a).logp);
                Pair { chosen: sums[0], rejected: sums[1] }
            };
            let loss = dpo.loss(logps(&policy), logps(&reference));
            let coefficients: Vec<f64> = forest
                .owners
                .iter()
                .map(|&owner| if owner == 0 { loss.coefficient } else { -loss.coefficient })
                .collect();
            let (_, gradients) =
                loss_and_gradient(&Plain, &policy, &forest, StepDropout::default(), &coefficients);
            (
                loss.rewards.chosen - loss.rewards.rejected,
                gradients.into_iter().flatten().flatten().collect::<Vec<f64>>(),
            )
        });
        values_error = values_error.max((sides[0].0 - sides[1].0).abs());
        gradient_error = gradient_error.max(relative(&sides[0].1, &sides[1].1));
    }
    vec![
        Check::new("|LHS − RHS|", values_error, 1e-12),
        Check::new("difference of the two gradients", gradient_error, 1e-12),
    ]
}
