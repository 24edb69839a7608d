//! One body for every device: each operation, forward and backward, on shapes that hit tile edges. `Cpu` must
//! agree with `Plain`, and with itself for any number of threads, bit for bit.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ops::Range;

use temper_kernels::quants::{Blocks, StoredType};
use temper_kernels::*;

/// Values in about (−1, 1), a function of the name and the index.
fn values(name: &str, len: usize) -> Vec<f32> {
    let key = name.bytes().fold(7, |key, byte| mix(key, byte.into()));
    (0..len).map(|i| (2.0 * uniform(key, i as u64) - 1.0) as f32).collect()
}

/// Results by name.
type Results = Vec<(String, Vec<f32>)>;

struct Run<'a, D: Device> {
    device: &'a D,
    results: Results,
}

impl<D: Device> Run<'_, D> {
    fn input(&self, name: &str, len: usize) -> D::Buffer {
        self.device.upload(values(name, len))
    }

    fn weight(&self, name: &str, len: usize) -> D::Weight {
        self.device.weight(values(name, len), true)
    }

    fn note(&mut self, name: String, buffer: &D::Buffer) {
        self.results.push((name, self.device.download(buffer).into_owned()));
    }

    fn linear(&mut self, rows: usize, inputs: usize, outputs: usize) {
        let d = self.device;
        let shape = Linear { rows, inputs, outputs };
        let [x, b, dout] = [("x", rows * inputs), ("b", outputs), ("dout", rows * outputs)]
            .map(|(name, len)| self.input(name, len));
        let w = self.weight("w", inputs * outputs);
        let mut out = d.zeros(rows * outputs);
        d.linear(&mut out, &x, &w, Some(&b), shape);
        let (mut dx, mut dw, mut db) =
            (d.zeros(rows * inputs), self.input("dw", inputs * outputs), self.input("db", outputs));
        let mut written = self.input("junk", inputs * outputs);
        d.linear_backward(Some(&mut dx), Some(&mut dw), Some(&mut db), &dout, &x, &w, shape, true);
        d.linear_backward(None, Some(&mut written), None, &dout, &x, &w, shape, false);
        for (name, buffer) in [("out", out), ("dx", dx), ("dw", dw), ("dw, written", written), ("db", db)] {
            self.note(format!("linear {rows}x{inputs}x{outputs} {name}"), &buffer);
        }
    }

    /// Adapters of some columns, with and without dropout, and DoRA's magnitudes on top; each part has a rank of one
    /// more than the part before, and a smaller scale.
    fn low_rank(&mut self, rows: usize, inputs: usize, columns: &[Range<usize>], rank: usize, p: f64) {
        let d = self.device;
        let outputs = columns.iter().map(|columns| columns.end).max().unwrap() + 3;
        let adapted: usize = columns.iter().map(ExactSizeIterator::len).sum();
        let mut start = 0;
        let parts = columns.iter().enumerate().map(|(i, columns)| {
            let low = start..start + rank + i;
            start = low.end;
            Part { columns: columns.clone(), low, scale: 0.7 / (1 + i) as f64 }
        });
        let parts: Vec<Part> = parts.collect();
        let paths: Vec<u64> = (0..rows as u64).collect();
        let dropout = (p > 0.0).then_some(Dropout { p, key: 4, paths: &paths });
        let dense = Linear { rows, inputs, outputs };
        let shape = LowRank { dense, parts: &parts, dropout };
        let of_b: Vec<usize> = parts.iter().map(|part| part.columns.len() * part.low.len()).collect();
        let low_columns = shape.low();
        let (w, a) = (self.weight("w", outputs * inputs), self.weight("a", low_columns * inputs));
        let b: Vec<D::Weight> = of_b.iter().map(|&len| self.weight("b", len)).collect();
        let [x, bias, magnitude] = [("x", rows * inputs), ("bias", outputs), ("magnitude", adapted)]
            .map(|(name, len)| self.input(name, len));
        let (mut out, mut low) = (self.input("out", rows * outputs), d.zeros(rows * low_columns));
        d.low_rank(&mut out, &mut low, &x, &a, &b, shape);
        let mut norms = d.zeros(adapted);
        d.low_rank_norms(&mut norms, &w, &a, &b, shape);
        let y = d.upload(d.download(&out).into_owned());
        d.magnitude(&mut out, &magnitude, &norms, Some(&bias), shape);
        let (mut dout, mut dmagnitude) = (self.input("dout", rows * outputs), self.input("dm", adapted));
        d.magnitude_backward(&mut dout, &mut dmagnitude, &y, &magnitude, &norms, shape);
        let (mut dx, mut da) = (self.input("dx", rows * inputs), self.input("da", low_columns * inputs));
        let mut db: Vec<D::Buffer> = of_b.iter().map(|&len| self.input("db", len)).collect();
        let mut dlow = d.zeros(rows * low_columns);
        let mut dbs: Vec<&mut D::Buffer> = db.iter_mut().collect();
        d.low_rank_backward(Some(&mut dx), &mut da, &mut dbs, &mut dlow, &dout, &x, &low, &a, &b, shape);
        let named =
            [("out", out), ("norms", norms), ("dout", dout), ("dm", dmagnitude), ("dx", dx), ("da", da)];
        for (name, buffer) in named.into_iter().chain(db.into_iter().map(|db| ("db", db))) {
            self.note(format!("low rank {rows}x{inputs}, rank {rank}, dropout {p}: {name}"), &buffer);
        }
    }

    /// A frozen weight in blocks of several kinds, in an embedding, a dense layer and a head.
    fn quantised(&mut self, rows: usize, inputs: usize, heights: [usize; 3]) {
        let d = self.device;
        let [int8, nf4, f32s] = ["int8", "nf4", "exact"];
        let outputs: usize = heights.iter().sum();
        let values = |name: &str, height: usize| values(name, height * inputs);
        let exact: Vec<u8> = values(f32s, heights[2]).iter().flat_map(|x| x.to_le_bytes()).collect();
        let w = d.quantised(vec![
            Blocks::int8(&values(int8, heights[0]), inputs),
            Blocks::nf4(&values(nf4, heights[1]), inputs),
            Blocks::new(StoredType::F32, [heights[2], inputs], exact).unwrap(),
        ]);
        let shape = Linear { rows, inputs, outputs };
        let (x, dout) = (self.input("x", rows * inputs), self.input("dout", rows * outputs));
        let (mut out, mut dx) = (d.zeros(rows * outputs), d.zeros(rows * inputs));
        d.linear(&mut out, &x, &w, None, shape);
        d.linear_backward(Some(&mut dx), None, None, &dout, &x, &w, shape, true);
        let mut embedded = d.zeros(3 * inputs);
        d.embed(&mut embedded, &w, &[0, outputs as u32 - 1, heights[0] as u32], inputs, false);
        let targets =
            [Target { row: 0, token: 1 }, Target { row: rows as u32 - 1, token: outputs as u32 - 1 }];
        let shape = Head { rows, width: inputs, vocabulary: outputs };
        let [mut mean, mut dhidden] = [d.zeros(rows * inputs), d.zeros(rows * inputs)];
        let found = d.head(Aside::Mean(&mut mean), &x, &w, &targets, shape);
        let loss = Loss { targets: &targets, coefficients: &[0.5, -0.3], log_sum_exp: &found.log_sum_exp };
        d.head_backward_frozen(&mut dhidden, &mean, &w, loss, shape);
        self.results.push(("quantised logp".into(), found.logp.iter().map(|&x| x as f32).collect()));
        let all = d.weight_values(&w).into_owned();
        for range in [0..1, 3..outputs * inputs - 1, inputs..2 * inputs] {
            assert_eq!(d.weight_values_in(&w, range.clone())[..], all[range]);
        }
        self.results.push(("quantised values".into(), all));
        for (name, buffer) in [("out", out), ("dx", dx), ("embedded", embedded), ("dhidden", dhidden)] {
            self.note(format!("quantised {rows}x{inputs} {name}"), &buffer);
        }
    }

    fn norm(&mut self, kind: NormKind, rows: usize, width: usize) {
        let d = self.device;
        let shape = Norm { kind, epsilon: 1e-5, rows, width };
        let [x, gain, bias, dout] =
            [("x", rows * width), ("gain", width), ("bias", width), ("dout", rows * width)]
                .map(|(name, len)| self.input(name, len));
        let layer = kind == NormKind::Layer;
        let mut out = d.zeros(rows * width);
        d.norm(&mut out, &x, &gain, layer.then_some(&bias), shape);
        let (mut dx, mut dgain, mut dbias) = (self.input("dx", rows * width), d.zeros(width), d.zeros(width));
        d.norm_backward(&mut dx, Some(&mut dgain), layer.then_some(&mut dbias), &dout, &x, &gain, shape);
        for (name, buffer) in [("out", out), ("dx", dx), ("dgain", dgain), ("dbias", dbias)] {
            self.note(format!("norm {kind:?} {rows}x{width} {name}"), &buffer);
        }
    }

    fn heads_in_place(&mut self, kind: NormKind, rows: usize, heads: Heads) {
        let d = self.device;
        let len = rows * heads.fused();
        let raw = self.input("raw", len);
        let gains = [self.input("gain q", heads.width), self.input("gain k", heads.width)];
        let mut qkv = self.input("raw", len);
        let norm = Norm { kind, epsilon: 1e-6, rows, width: heads.width };
        d.head_norm(&mut qkv, [&gains[0], &gains[1]], heads, norm);
        let mut dqkv = self.input("dqkv", len);
        let [mut dq, mut dk] = [d.zeros(heads.width), d.zeros(heads.width)];
        let dgains = [Some(&mut dq), Some(&mut dk)];
        d.head_norm_backward(&mut dqkv, dgains, &raw, [&gains[0], &gains[1]], heads, norm);
        let (mut dqkv_again, mut dk_alone) = (self.input("dqkv", len), d.zeros(heads.width));
        let dgains = [None, Some(&mut dk_alone)];
        d.head_norm_backward(&mut dqkv_again, dgains, &raw, [&gains[0], &gains[1]], heads, norm);
        let [cos, sin] = ["cos", "sin"].map(|name| self.input(name, rows * heads.width / 2));
        let (mut turned, mut back) = (self.input("raw", len), self.input("raw", len));
        d.rope(&mut turned, &cos, &sin, heads, rows);
        d.rope_backward(&mut back, &cos, &sin, heads, rows);
        for (name, buffer) in [
            ("norm", qkv),
            ("dnorm", dqkv),
            ("dq", dq),
            ("dk", dk),
            ("dk alone", dk_alone),
            ("rope", turned),
            ("drope", back),
        ] {
            self.note(format!("heads {name}"), &buffer);
        }
    }

    fn attention(&mut self, name: &str, heads: Heads, segments: &[Segment], window: Option<usize>, p: f64) {
        let d = self.device;
        let rows = segments.iter().map(|s| s.rows.end).max().unwrap();
        let paths: Vec<u64> = (0..rows as u64).collect();
        let dropout = (p > 0.0).then_some(Dropout { p, key: 5, paths: &paths });
        let shape = Attention { heads, segments, window, dropout };
        let [qkv, dout] = [("qkv", rows * heads.fused()), ("dout", rows * heads.output())]
            .map(|(name, len)| self.input(name, len));
        let (mut out, mut lse, mut dqkv) = (
            d.zeros(rows * heads.output()),
            d.zeros(rows * heads.query),
            self.input("junk", rows * heads.fused()),
        );
        d.attention(&mut out, &mut lse, Columns::fused(&qkv, heads), shape);
        d.attention_backward(&mut dqkv, &dout, &qkv, &out, &lse, shape);
        for (what, buffer) in [("out", out), ("lse", lse), ("dqkv", dqkv)] {
            self.note(format!("attention {name} {what}"), &buffer);
        }
    }

    fn activation(&mut self, kind: Activation, rows: usize, width: usize) {
        let d = self.device;
        let inputs = width * kind.inputs();
        let x = d.upload(values("x", rows * inputs).iter().map(|x| 6.0 * x).collect());
        let dout = self.input("dout", rows * width);
        let (mut out, mut dx) = (d.zeros(rows * width), d.zeros(rows * inputs));
        d.activation(kind, &mut out, &x, rows, width);
        d.activation_backward(kind, &mut dx, &dout, &x, rows, width);
        self.note(format!("{kind:?} out"), &out);
        self.note(format!("{kind:?} dx"), &dx);
    }

    /// With room for so many logits.
    fn head(&mut self, [rows, width, vocabulary]: [usize; 3], room: usize, add: bool) {
        let d = self.device;
        let shape = Head { rows, width, vocabulary };
        let hidden = self.input("hidden", rows * width);
        let weight = self.weight("weight", vocabulary * width);
        let mut targets = Vec::new();
        for row in 0..rows as u32 {
            for i in 0..1 + row % 2 {
                targets.push(Target { row, token: ((row + 1) * 7919 + i * 31) % vocabulary as u32 });
            }
        }
        let coefficients: Vec<f64> = (0..targets.len()).map(|i| uniform(3, i as u64) - 0.5).collect();
        let mut mean = self.input("junk", rows * width);
        let found = d.head(Aside::Mean(&mut mean), &hidden, &weight, &targets, shape);
        let mut frozen = d.zeros(rows * width);
        let (coefficients, log_sum_exp) = (&coefficients[..], &found.log_sum_exp[..]);
        let loss = Loss { targets: &targets, coefficients, log_sum_exp };
        d.head_backward_frozen(&mut frozen, &mean, &weight, loss, shape);
        self.note("head mean".into(), &mean);
        self.note("head dhidden, frozen".into(), &frozen);
        let mut logits = d.zeros(room);
        let again = d.head(Aside::Logits(&mut logits), &hidden, &weight, &targets, shape);
        assert_eq!(found, again);
        let (mut dhidden, mut dweight) = (d.zeros(rows * width), self.input("dweight", vocabulary * width));
        d.head_backward(&mut dhidden, &mut dweight, &mut logits, &hidden, &weight, loss, shape, add);
        self.note("head dhidden".into(), &dhidden);
        self.note("head dweight".into(), &dweight);
        for (name, values) in
            [("logp", &found.logp), ("lse", &found.log_sum_exp), ("entropy", &found.entropy)]
        {
            self.results.push((format!("head {name}"), values.iter().map(|&x| x as f32).collect()));
        }
        self.results.push(("head argmax".into(), found.argmax.iter().map(|&x| x as f32).collect()));
    }

    fn rest(&mut self) {
        let d = self.device;
        let indices = [3, 0, 3, 9, 1];
        let (rows, table) = (self.input("table", 10 * 24), self.weight("table", 10 * 24));
        let [mut gathered, mut embedded, mut out] = ["out"; 3].map(|name| self.input(name, 5 * 24));
        d.gather(&mut gathered, &rows, &indices, 24);
        d.embed(&mut embedded, &table, &indices, 24, false);
        d.embed(&mut out, &table, &indices, 24, true);
        let mut dtable = self.input("dtable", 10 * 24);
        d.gather_backward(&mut dtable, &out, &indices, 24);
        let paths: Vec<u64> = (0..100).collect();
        let mut dropped = self.input("dropped", 100 * 24);
        d.dropout(&mut dropped, 24, Dropout { p: 0.3, key: 9, paths: &paths });
        let len = 40_000;
        let [mut p, g, mut m, mut v] = ["p", "g", "m", "v"].map(|name| self.input(name, len));
        d.add(&mut v, &g, &m, len);
        d.scale(&mut v, 1.5, len);
        v = d.upload(d.download(&v).iter().map(|v| v * v).collect());
        let mut matrix = self.weight("p", len);
        // A process that has the moments of some elements updates these.
        let [mut m2, mut v2] = [&m, &v].map(|moments| d.upload(d.download(moments)[BLOCK..30_000].to_vec()));
        let update = AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.1,
            scale: 0.5,
            step: 3,
            from: 0,
        };
        d.adamw(&mut p, &g, [&mut m, &mut v], update);
        d.adamw_weight(&mut matrix, &g, [&mut m2, &mut v2], AdamW { from: BLOCK, ..update });
        d.set_weight_values(&mut matrix, 2 * BLOCK, &d.download(&g)[..5000]);
        self.results.push(("matrix".into(), d.weight_values(&matrix).into_owned()));
        let mut moved = self.input("moved", len);
        d.set_values(&mut moved, 10, &d.download(&g)[..20_000]);
        d.add_values(&mut moved, 15_000, &d.download(&g)[..20_000]);
        self.note("set and added".into(), &moved);
        let sums = d.sums_of_squares(&g, BLOCK..len);
        self.results.push(("sums of squares".into(), sums.into_iter().map(|sum| sum as f32).collect()));
        for (name, buffer) in [
            ("gather", gathered),
            ("embed", embedded),
            ("embed and add", out),
            ("dgather", dtable),
            ("dropout", dropped),
            ("p", p),
            ("m", m),
            ("v", v),
        ] {
            self.note(name.into(), &buffer);
        }
    }
}

fn segment(rows: Range<usize>, context: Vec<Range<usize>>) -> Segment {
    Segment { own: rows.start, rows, context }
}

/// A tree with a long prompt and branches, a lone sequence, and a branch of a branch.
fn forest() -> Vec<Segment> {
    vec![
        segment(0..300, vec![]),
        segment(300..370, vec![0..300]),
        segment(370..371, vec![0..300]),
        segment(371..401, vec![0..300, 370..371]),
        segment(401..417, vec![]),
        segment(417..420, vec![401..417]),
    ]
}

/// A tree whose backward is done in parts, between two short ones.
fn long() -> Vec<Segment> {
    vec![
        segment(0..5, vec![]),
        segment(5..605, vec![]),
        segment(605..680, vec![5..605]),
        segment(680..690, vec![]),
    ]
}

fn run<D: Device>(device: &D) -> Results {
    let mut run = Run { device, results: Vec::new() };
    for [rows, inputs, outputs] in [
        [1, 64, 130],
        [2, 5, 6],
        [3, 33, 65],
        [5, 96, 7],
        [12, 1237, 70],
        [13, 1237, 70],
        [40, 576, 213],
        [64, 40, 9],
        [65, 40, 9],
        [130, 72, 200],
        [300, 701, 99],
    ] {
        run.linear(rows, inputs, outputs);
    }
    for p in [0.0, 0.3] {
        run.low_rank(1, 20, &[0..9], 2, p);
        // A rank above both sides.
        run.low_rank(30, 8, &[0..6], 20, p);
        run.low_rank(70, 50, &[2..40, 47..90], 5, p);
        run.low_rank(300, 96, &[0..64, 64..80, 80..96], 16, p);
    }
    // Norms of more rows than are widened at a time.
    run.low_rank(1, 1100, &[0..1000], 2, 0.0);
    run.quantised(2, 70, [3, 2, 1]);
    run.quantised(30, 640, [1700, 70, 33]);
    run.quantised(90, 640, [1700, 70, 33]);
    for kind in [NormKind::Layer, NormKind::Rms, NormKind::RmsFromOne] {
        run.norm(kind, 1, 5);
        run.norm(kind, 131, 72);
    }
    run.heads_in_place(NormKind::Rms, 70, Heads { query: 4, key: 2, width: 16 });
    run.heads_in_place(NormKind::RmsFromOne, 70, Heads { query: 4, key: 2, width: 16 });
    let grouped = Heads { query: 6, key: 2, width: 16 };
    run.attention("forest", grouped, &forest(), None, 0.0);
    run.attention("window", grouped, &forest(), Some(33), 0.0);
    run.attention("window of one", grouped, &forest(), Some(1), 0.0);
    run.attention("long", Heads { query: 4, key: 2, width: 16 }, &long(), None, 0.0);
    run.attention("dropout", Heads { query: 2, key: 2, width: 24 }, &forest(), None, 0.2);
    for kind in [Activation::SwiGlu, Activation::GeGluTanh, Activation::GeluTanh] {
        run.activation(kind, 67, 50);
    }
    run.head([0, 32, 100], 0, false);
    run.head([1, 32, 100], 0, true);
    run.head([1, 32, 100], 100, false);
    run.head([530, 24, 4100], 530 * 3000, true);
    run.head([1030, 2, 70], 1030 * 70, false);
    run.rest();
    run.results
}

/// `max |Δ| / max |reference|` of an f32 result: a few hundred roundings of 6e-8; and of one whose operands were
/// rounded to bf16, each by up to 2e-3.
const TOLERANCES: [(Precision, f32); 2] = [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)];

#[test]
fn cpu_agrees_with_plain() {
    for (precision, tolerance) in TOLERANCES {
        for ((name, expected), (_, found)) in run(&Plain).iter().zip(run(&Cpu::new(2, precision).unwrap())) {
            assert_eq!(expected.len(), found.len(), "{name}");
            // A rounded logit can make another token the likeliest.
            if name == "head argmax" && precision == Precision::Bf16 {
                continue;
            }
            let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
            for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
                assert!(
                    (e - f).abs() <= tolerance * scale,
                    "{precision:?} {name}[{i}]: plain {e}, cpu {f}, largest {scale}"
                );
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let one = run(&Cpu::new(1, precision).unwrap());
        for threads in [2, 3] {
            let cpu = Cpu::new(threads, precision).unwrap();
            for (way, several) in [("asleep", run(&cpu)), ("awake", cpu.awake(1, || run(&cpu)))] {
                for ((name, a), (_, b)) in one.iter().zip(&several) {
                    assert!(
                        a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{precision:?} {name} with {threads} threads {way}"
                    );
                }
            }
        }
    }
}

/// `Plain`'s forest attention against the textbook's dense one, path by path.
#[test]
fn plain_attention_is_the_textbooks() {
    let heads = Heads { query: 6, key: 2, width: 8 };
    let segments = [
        Segment { rows: 0..5, context: vec![], own: 0 },
        Segment { rows: 5..9, context: vec![0..5], own: 5 },
        Segment { rows: 9..12, context: vec![0..5], own: 9 },
    ];
    for window in [None, Some(3)] {
        let qkv = Plain.upload(values("qkv", 12 * heads.fused()));
        let (mut out, mut lse) = (Plain.zeros(12 * heads.output()), Plain.zeros(12 * heads.query));
        Plain.attention(
            &mut out,
            &mut lse,
            Columns::fused(&qkv, heads),
            Attention { heads, segments: &segments, window, dropout: None },
        );
        for path in [(0..9).collect::<Vec<_>>(), (0..5).chain(9..12).collect()] {
            let tokens = path.len();
            // (1, h, T, d) with each key head repeated for its group.
            let gather = |start: usize, group: usize| -> Vec<f64> {
                (0..heads.query)
                    .flat_map(|head| {
                        path.iter().flat_map(move |&row| {
                            (0..heads.width)
                                .map(move |c| row * heads.fused() + start + head / group * heads.width + c)
                        })
                    })
                    .map(|i| qkv[i])
                    .collect()
            };
            let [q, k, v] = [gather(0, 1), gather(heads.keys(), 3), gather(heads.values(), 3)];
            let mask: Vec<bool> = (0..tokens * tokens)
                .map(|i| (i / tokens, i % tokens))
                .map(|(query, key)| key <= query && window.is_none_or(|w| key + w > query))
                .collect();
            let shape = textbook::Shape { batch: 1, heads: heads.query, tokens, width: heads.width };
            let expected = textbook::self_attention(
                [&q, &k, &v],
                shape,
                textbook::Masks { attention: Some(&mask), padding: None },
                |_, _, _, _| 1.0,
            );
            for (t, &row) in path.iter().enumerate() {
                for head in 0..heads.query {
                    for c in 0..heads.width {
                        let (e, f) = (
                            expected[(head * tokens + t) * heads.width + c],
                            out[row * heads.output() + head * heads.width + c],
                        );
                        assert!((e - f).abs() < 1e-14, "row {row} head {head}: {e} {f}");
                    }
                }
            }
        }
    }
}

#[test]
fn textbook_rows_that_see_nothing_are_zero() {
    let x = [0.3; 2 * 3];
    let shape = textbook::Shape { batch: 1, heads: 1, tokens: 2, width: 3 };
    let masks =
        textbook::Masks { attention: Some(&[true, true, false, false]), padding: Some(&[true, false]) };
    let out = textbook::self_attention([&x, &x, &x], shape, masks, |_, _, _, _| 1.0);
    assert_eq!(out, [0.3, 0.3, 0.3, 0.0, 0.0, 0.0]);
}

/// On each path of a product: dot products, thin products, packed tiles.
#[test]
fn a_row_has_the_same_bits_whatever_rows_are_beside_it() {
    let cpu = Cpu::new(2, Precision::F32).unwrap();
    let (inputs, outputs) = (1237, 131);
    let values = |len: usize, key: u64| (0..len as u64).map(|i| uniform(key, i) as f32 - 0.5).collect();
    let (weight, x): (_, Vec<f32>) = (cpu.weight(values(inputs * outputs, 1), true), values(150 * inputs, 2));
    let product = |rows: usize, x: &[f32]| {
        let mut out = cpu.zeros(rows * outputs);
        cpu.linear(&mut out, &x.to_vec(), &weight, None, Linear { rows, inputs, outputs });
        out
    };
    for [many, fewer] in [[7, 1], [60, 13], [150, 70]] {
        let together = product(many, &x[..many * inputs]);
        for start in (0..=many - fewer).step_by(fewer) {
            let apart = product(fewer, &x[start * inputs..(start + fewer) * inputs]);
            assert_eq!(
                together[start * outputs..][..fewer * outputs],
                apart,
                "{fewer} rows of {many} from {start}"
            );
        }
    }
}

/// A trained matrix keeps its values to the last bit, whatever products take of them.
#[test]
fn halves_of_values_make_them_again() {
    let bits = |i: u64| f32::from_bits((uniform(9, i) * 2f64.powi(32)) as u32);
    let special = [0.0, -0.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(1)];
    let mut values: Vec<f32> = (0..100_000).map(bits).chain(special).collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let cpu = Cpu::new(2, precision).unwrap();
        let mut weight = cpu.weight(values.clone(), true);
        values.reverse();
        cpu.set_weight_values(&mut weight, 0, &values);
        for range in [0..values.len(), 70_001..70_500] {
            for (found, value) in cpu.weight_values_in(&weight, range.clone()).iter().zip(&values[range]) {
                assert!(found.to_bits() == value.to_bits() || found.is_nan() && value.is_nan());
            }
        }
    }
}

/// Updates far below a step of bf16 (here 1/128) move the copy that products take by as much on average, wherever the
/// values lie: on a bf16, between two, or exactly in the middle.
#[test]
fn small_updates_move_a_bf16_copy_as_much_as_its_values() {
    let cpu = Cpu::new(1, Precision::Bf16).unwrap();
    let (inputs, rate) = (1 << 16, 1e-3);
    for value in [1.0, 1.0 + 1.0 / 256.0, 1.0 + 1.0 / 300.0] {
        let mut weight = cpu.weight(vec![value; inputs], true);
        let ones = cpu.upload(vec![1.0; inputs]);
        let mean = |weight: &cpu::Weight| {
            let mut out = cpu.zeros(1);
            cpu.linear(&mut out, &ones, weight, None, Linear { rows: 1, inputs, outputs: 1 });
            f64::from(out[0]) / inputs as f64
        };
        let before = mean(&weight);
        assert!((before - f64::from(value)).abs() < 1e-5, "{value}: {before}");
        let (mut m, mut v) = (cpu.zeros(inputs), cpu.zeros(inputs));
        let update = AdamW {
            learning_rate: rate,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            scale: 1.0,
            step: 1,
            from: 0,
        };
        cpu.adamw_weight(&mut weight, &ones, [&mut m, &mut v], update);
        let moved = before - mean(&weight);
        assert!((moved - rate).abs() < 0.02 * rate, "{value}: moved by {moved}, its values by {rate}");
    }
}

fn magnitudes_of_zeros<D: Device>(device: &D) -> Vec<f32> {
    let dense = Linear { rows: 1, inputs: 2, outputs: 2 };
    let parts = [Part { columns: 0..2, low: 0..1, scale: 1.0 }];
    let shape = LowRank { dense, parts: &parts, dropout: None };
    let weight = device.weight(vec![0.0, 0.0, 3.0, 4.0], false);
    let (a, b) = (device.weight(vec![1.0, 1.0], true), [device.weight(vec![0.0, 0.0], true)]);
    let mut norms = device.zeros(2);
    device.low_rank_norms(&mut norms, &weight, &a, &b, shape);
    let mut out = device.upload(vec![0.0, 7.0]);
    device.magnitude(&mut out, &norms, &norms, None, shape);
    device.download(&out).into_owned()
}

/// A row of zeros in DoRA's base stays one, and no NaN.
#[test]
fn a_row_of_zeros_can_be_divided_by_its_norm() {
    assert_eq!(magnitudes_of_zeros(&Plain), [0.0, 7.0]);
    assert_eq!(magnitudes_of_zeros(&Cpu::new(1, Precision::F32).unwrap()), [0.0, 7.0]);
}
