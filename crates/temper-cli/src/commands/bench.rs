//! `temper bench`: the operations alone, beside what the machine could do at best.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;
use temper_kernels::*;

use crate::args::Bench;
use crate::output::{results, say};

/// The shapes of a Llama of 135 million parameters.
const WIDTH: usize = 576;
const MLP: usize = 1536;
const HEADS: Heads = Heads { query: 9, key: 3, width: 64 };
const VOCABULARY: usize = 49_152;
/// Bytes that a cache may hold.
const CACHED: f64 = 5e7;

/// What an operation costs at least.
enum Work {
    Flops(f64),
    Bytes(f64),
}

/// Measures every operation, median of five.
pub fn run(options: &Bench) -> Result<()> {
    let cpu = options.compute.device()?;
    let mut out = results();
    let peaks = Peaks::measure(&cpu);
    writeln!(out, "{}", peaks.line(options.json))?;
    out.flush()?;
    let mut measure = |name: &str, shape: String, work: Work, run: &mut dyn FnMut(&Cpu)| -> Result<()> {
        run(&cpu);
        let mut seconds: Vec<f64> = (0..5)
            .map(|_| {
                let start = Instant::now();
                run(&cpu);
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        writeln!(out, "{}", peaks.compare(name, &shape, &work, seconds[2], options.json))?;
        out.flush()?;
        Ok(())
    };
    dense(options.rows, &mut measure)?;
    adapters(options.rows, &mut measure)?;
    attention(options.rows, &mut measure)?;
    head(options.rows, cpu.precision(), &mut measure)?;
    passes(options.rows, &mut measure)
}

/// Takes a name, a shape, the least work, and what does it.
type Measure<'a> = dyn FnMut(&str, String, Work, &mut dyn FnMut(&Cpu)) -> Result<()> + 'a;

/// Values that are neither equal nor large.
fn values(len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| uniform(7, i) as f32 - 0.5).collect()
}

fn dense(rows: usize, measure: &mut Measure<'_>) -> Result<()> {
    for (name, inputs, outputs) in [
        ("q, k, v", WIDTH, HEADS.fused()),
        ("output", HEADS.output(), WIDTH),
        ("gate, up", WIDTH, 2 * MLP),
        ("down", MLP, WIDTH),
    ] {
        let mut weight = None;
        let (x, dout) = (values(rows * inputs), values(rows * outputs));
        let (mut out, mut dx, mut dw) =
            (vec![0.0; rows * outputs], vec![0.0; rows * inputs], vec![0.0; inputs * outputs]);
        let shape = Linear { rows, inputs, outputs };
        let size = format!("{rows} × {inputs} × {outputs}");
        let product = 2.0 * (rows * inputs * outputs) as f64;
        measure(&format!("{name} forward"), size.clone(), Work::Flops(product), &mut |cpu| {
            let weight = weight.get_or_insert_with(|| cpu.weight(values(inputs * outputs), false));
            cpu.linear(&mut out, &x, weight, None, shape);
        })?;
        let Some(weight) = weight else { continue };
        measure(&format!("{name} backward"), size, Work::Flops(2.0 * product), &mut |cpu| {
            cpu.linear_backward(Some(&mut dx), Some(&mut dw), None, &dout, &x, &weight, shape, true);
        })?;
    }
    Ok(())
}

/// Adapters of rank 16 beside the same layers; their time over the layers' own is what LoRA costs.
fn adapters(rows: usize, measure: &mut Measure<'_>) -> Result<()> {
    const RANK: usize = 16;
    let qkv = [0..HEADS.keys(), HEADS.keys()..HEADS.values(), HEADS.values()..HEADS.fused()];
    let up = [0..MLP, MLP..2 * MLP];
    for (name, inputs, columns) in [
        ("q, k, v", WIDTH, &qkv[..]),
        ("output", HEADS.output(), &[0..WIDTH][..]),
        ("gate, up", WIDTH, &up[..]),
        ("down", MLP, &[0..WIDTH][..]),
    ] {
        let outputs = columns.iter().map(|columns| columns.end).max().unwrap_or(0);
        let parts = columns.iter().enumerate().map(|(i, columns)| Part {
            columns: columns.clone(),
            low: i * RANK..(i + 1) * RANK,
            scale: 2.0,
        });
        let parts: Vec<Part> = parts.collect();
        let dense = Linear { rows, inputs, outputs };
        let shape = LowRank { dense, parts: &parts, dropout: None };
        let (x, dout) = (values(rows * inputs), values(rows * outputs));
        let (mut out, mut dx) = (vec![0.0; rows * outputs], vec![0.0; rows * inputs]);
        let [mut low, mut dlow] = [0, 1].map(|_| vec![0.0; rows * shape.low()]);
        let mut da = vec![0.0; shape.low() * inputs];
        let mut db: Vec<Vec<f32>> = columns.iter().map(|columns| vec![0.0; columns.len() * RANK]).collect();
        let mut weights = None;
        let size = format!("{rows} × {inputs} × {outputs}, rank {RANK}");
        let product = 2.0 * (rows * (shape.low() * inputs + RANK * outputs)) as f64;
        measure(&format!("{name} adapters forward"), size.clone(), Work::Flops(product), &mut |cpu| {
            let (a, b) = weights.get_or_insert_with(|| {
                let b = columns.iter().map(|columns| cpu.weight(values(columns.len() * RANK), true));
                (cpu.weight(values(shape.low() * inputs), true), b.collect::<Vec<_>>())
            });
            cpu.low_rank(&mut out, &mut low, &x, a, b, shape);
        })?;
        let Some((a, b)) = &weights else { continue };
        measure(&format!("{name} adapters backward"), size, Work::Flops(2.0 * product), &mut |cpu| {
            let mut db: Vec<&mut Vec<f32>> = db.iter_mut().collect();
            cpu.low_rank_backward(Some(&mut dx), &mut da, &mut db, &mut dlow, &dout, &x, &low, a, b, shape);
        })?;
    }
    Ok(())
}

fn attention(rows: usize, measure: &mut Measure<'_>) -> Result<()> {
    let segments = [Segment { rows: 0..rows, context: vec![], own: 0 }];
    let shape = Attention { heads: HEADS, segments: &segments, window: None, dropout: None };
    let (qkv, dout) = (values(rows * HEADS.fused()), values(rows * HEADS.output()));
    let (mut out, mut lse) = (vec![0.0; rows * HEADS.output()], vec![0.0; rows * HEADS.query]);
    let mut dqkv = vec![0.0; qkv.len()];
    // Two products forward and five backward, over the half of the keys that a query sees.
    let product = (HEADS.query * HEADS.width * rows * rows) as f64;
    let name = |what| (format!("attention {what}"), format!("{rows} rows, {} heads", HEADS.query));
    let (title, size) = name("forward");
    measure(&title, size, Work::Flops(2.0 * product), &mut |cpu| {
        cpu.attention(&mut out, &mut lse, Columns::fused(&qkv, HEADS), shape);
    })?;
    let (title, size) = name("backward");
    measure(&title, size, Work::Flops(5.0 * product), &mut |cpu| {
        cpu.attention_backward(&mut dqkv, &dout, &qkv, &out, &lse, shape);
    })
}

fn head(rows: usize, precision: Precision, measure: &mut Measure<'_>) -> Result<()> {
    let shape = Head { rows, width: WIDTH, vocabulary: VOCABULARY };
    let targets: Vec<Target> = (0..rows as u32).map(|row| Target { row, token: row * 31 }).collect();
    let (hidden, coefficients) = (values(rows * WIDTH), vec![0.1; rows]);
    let mut weight = None;
    let mut log_sum_exp = Vec::new();
    let size = format!("{rows} × {WIDTH} × {VOCABULARY}");
    let product = 2.0 * (rows * WIDTH * VOCABULARY) as f64;
    let mut logits = vec![0.0; rows * VOCABULARY];
    measure("head forward", size.clone(), Work::Flops(product), &mut |cpu| {
        let weight = weight.get_or_insert_with(|| cpu.weight(values(WIDTH * VOCABULARY), false));
        log_sum_exp = cpu.head(Aside::Logits(&mut logits), &hidden, weight, &targets, shape).log_sum_exp;
    })?;
    let (mut dhidden, mut dweight) = (vec![0.0; rows * WIDTH], vec![0.0; WIDTH * VOCABULARY]);
    let Some(weight) = weight else { return Ok(()) };
    // One row, as in decoding: the weight exceeds the caches and is read once.
    let one = Linear { rows: 1, inputs: WIDTH, outputs: VOCABULARY };
    let mut of_one = vec![0.0; VOCABULARY];
    let bytes = if precision == Precision::Bf16 { 2 } else { 4 };
    let stored = bytes * WIDTH * VOCABULARY;
    measure(
        "head one row",
        format!("1 × {WIDTH} × {VOCABULARY}"),
        Work::Bytes(stored as f64),
        &mut |cpu| {
            cpu.linear(&mut of_one, &hidden, &weight, None, one);
        },
    )?;
    measure("head backward", size, Work::Flops(2.0 * product), &mut |cpu| {
        cpu.head_backward(
            &mut dhidden,
            &mut dweight,
            &mut logits,
            &hidden,
            &weight,
            Loss { targets: &targets, coefficients: &coefficients, log_sum_exp: &log_sum_exp },
            shape,
            true,
        );
    })
}

/// What is one pass over memory: reads and writes of four bytes.
fn passes(rows: usize, measure: &mut Measure<'_>) -> Result<()> {
    let shape = Norm { kind: NormKind::Rms, epsilon: 1e-5, rows, width: WIDTH };
    let (x, dout, gain) = (values(rows * WIDTH), values(rows * WIDTH), values(WIDTH));
    let (mut out, mut dgain) = (vec![0.0; rows * WIDTH], vec![0.0; WIDTH]);
    let moved = |times: usize, len: usize| Work::Bytes((4 * times * len) as f64);
    let size = format!("{rows} × {WIDTH}");
    measure("norm forward", size.clone(), moved(2, x.len()), &mut |cpu| {
        cpu.norm(&mut out, &x, &gain, None, shape);
    })?;
    measure("norm backward", size, moved(4, x.len()), &mut |cpu| {
        cpu.norm_backward(&mut out, Some(&mut dgain), None, &dout, &x, &gain, shape);
    })?;
    let (x, dout) = (values(2 * rows * MLP), values(rows * MLP));
    let (mut out, mut dx) = (vec![0.0; rows * MLP], vec![0.0; 2 * rows * MLP]);
    let size = format!("{rows} × {MLP}");
    measure("swiglu forward", size.clone(), moved(3, out.len()), &mut |cpu| {
        cpu.activation(Activation::SwiGlu, &mut out, &x, rows, MLP);
    })?;
    measure("swiglu backward", size, moved(5, out.len()), &mut |cpu| {
        cpu.activation_backward(Activation::SwiGlu, &mut dx, &dout, &x, rows, MLP);
    })?;
    let len = WIDTH * VOCABULARY;
    let (gradient, mut m, mut v) = (values(len), vec![0.0; len], vec![0.0; len]);
    let mut weight = None;
    let update = AdamW {
        learning_rate: 1e-6,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        scale: 1.0,
        step: 9,
        from: 0,
    };
    measure("adamw", format!("{len}"), moved(7, len), &mut |cpu| {
        let weight = weight.get_or_insert_with(|| cpu.weight(values(len), true));
        cpu.adamw_weight(weight, &gradient, [&mut m, &mut v], update);
    })
}

/// What the machine does at best, a second.
struct Peaks {
    f32: f64,
    bf16: Option<f64>,
    products: f64,
    read: f64,
}

impl Peaks {
    fn measure(cpu: &Cpu) -> Peaks {
        say("peaks", "measuring products in cache and reading from memory …");
        let f32 = cpu.peak_flops(Precision::F32);
        let bf16 = Cpu::has_bf16().then(|| cpu.peak_flops(Precision::Bf16));
        let products = bf16.filter(|_| cpu.precision() == Precision::Bf16).unwrap_or(f32);
        Peaks { f32, bf16, products, read: cpu.read_bandwidth() }
    }

    fn line(&self, as_json: bool) -> String {
        let (f32, bf16, read) = (self.f32 / 1e9, self.bf16.map(|bf16| bf16 / 1e9), self.read / 1e9);
        if as_json {
            return json!({ "peak": true, "f32_gflops": f32, "bf16_gflops": bf16, "read_gb_per_s": read })
                .to_string();
        }
        let bf16 = bf16.map_or("no bf16 hardware".to_owned(), |bf16| format!("bf16 {bf16:.0} GFLOP/s"));
        format!("peaks: f32 {f32:.0} GFLOP/s, {bf16}, memory read {read:.1} GB/s\n")
    }

    fn compare(&self, name: &str, shape: &str, work: &Work, seconds: f64, as_json: bool) -> String {
        let (rate, share, unit) = match work {
            Work::Flops(flops) => (flops / seconds, flops / seconds / self.products, "GFLOP/s"),
            Work::Bytes(bytes) => (bytes / seconds, bytes / seconds / self.read, "GB/s"),
        };
        // What fits the caches has nothing to do with memory's rate.
        let in_cache = matches!(work, Work::Bytes(bytes) if *bytes < CACHED);
        if as_json {
            return json!({ "operation": name, "shape": shape, "seconds": seconds, "rate": rate / 1e9, "unit": unit, "share_of_peak": (!in_cache).then_some(share) }).to_string();
        }
        let (milliseconds, rate) = (1e3 * seconds, rate / 1e9);
        let share =
            if in_cache { "in cache".to_owned() } else { format!("{:>4.0} % of peak", 100.0 * share) };
        format!("{name:<18} {shape:<20} {milliseconds:>9.3} ms {rate:>8.1} {unit:<8} {share}")
    }
}
