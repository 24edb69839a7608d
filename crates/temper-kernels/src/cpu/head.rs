//! The language-model head in tiles of [`ROWS`] rows and [`TOKENS`] vocabulary entries. The logits of a tile exist until
//! the next, or until the backward where there is room for them.

use rayon::prelude::*;

use super::weight::Weight;
use super::{matmul, rows};
use crate::device::{Aside, Head, HeadOutput, Loss, Target};

pub(super) const ROWS: usize = 1024;
pub(super) const TOKENS: usize = 2048;

/// The online softmax of one row over the vocabulary.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    /// `Σ e^(z − max)`
    sum: f64,
    /// `Σ e^(z − max) (z − max)`
    weighted: f64,
    argmax: u32,
}

impl Running {
    const START: Running = Running { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, argmax: 0 };

    /// Takes in the logits of tokens from `first` on.
    fn add(&mut self, logits: &[f32], first: usize) {
        let max = rows::max(logits);
        if max > self.max {
            let keep = f64::from(self.max - max).exp();
            if self.sum > 0.0 {
                self.weighted = keep * (self.weighted + f64::from(self.max - max) * self.sum);
                self.sum *= keep;
            }
            self.max = max;
            self.argmax = (first + logits.iter().position(|&z| z == max).unwrap_or(0)) as u32;
        }
        let (sum, weighted) = rows::exp_moments(logits, self.max);
        self.sum += sum;
        self.weighted += weighted;
    }
}

/// The row tiles of `targets`, each with the targets inside it.
fn row_tiles<'a>(
    rows: usize,
    targets: &'a [Target],
) -> impl Iterator<Item = (std::ops::Range<usize>, std::ops::Range<usize>)> + 'a {
    (0..rows).step_by(ROWS).map(move |start| {
        let tile = start..rows.min(start + ROWS);
        let index = |row: usize| targets.partition_point(|target| (target.row as usize) < row);
        (tile.clone(), index(tile.start)..index(tile.end))
    })
}

/// Where the logits of tiles lie, one after another.
struct Tiles<'a> {
    /// Room that the forward and the backward share.
    kept: &'a mut [f32],
    /// A tile that finds none there.
    one: Vec<f32>,
}

impl<'a> Tiles<'a> {
    fn new(kept: &'a mut [f32]) -> Tiles<'a> {
        Tiles { kept, one: Vec::new() }
    }

    /// Room for the next tile, and whether it is kept.
    fn next(&mut self, len: usize) -> (&mut [f32], bool) {
        match std::mem::take(&mut self.kept).split_at_mut_checked(len) {
            Some((tile, rest)) => {
                self.kept = rest;
                (tile, true)
            }
            None => {
                self.one.resize(self.one.len().max(len), 0.0);
                (&mut self.one[..len], false)
            }
        }
    }
}

/// `z [rows, tokens] = hidden · weightᵀ` for tokens from `first` on.
fn logits(z: &mut [f32], hidden: &[f32], weight: &Weight, first: usize, width: usize) {
    let rows = hidden.len() / width;
    matmul::forward(z, hidden, weight, first, [rows, width, z.len() / rows]);
}

/// See [`crate::Device::head`].
pub fn forward(
    aside: Aside<'_, Vec<f32>>,
    hidden: &[f32],
    weight: &Weight,
    targets: &[Target],
    shape: Head,
) -> HeadOutput {
    let width = shape.width;
    let mut output = HeadOutput { logp: vec![0.0; targets.len()], ..HeadOutput::default() };
    let (kept, mut mean): (&mut [f32], Option<&mut [f32]>) = match aside {
        Aside::Nothing => (&mut [], None),
        Aside::Logits(logits) => (logits, None),
        Aside::Mean(mean) => (&mut [], Some(mean)),
    };
    let mut tiles = Tiles::new(kept);
    for (tile, here) in row_tiles(shape.rows, targets) {
        let hidden = &hidden[tile.start * width..tile.end * width];
        let mut running = vec![Running::START; tile.len()];
        for first in (0..shape.vocabulary).step_by(TOKENS) {
            let tokens = first..shape.vocabulary.min(first + TOKENS);
            let (z, _) = tiles.next(tile.len() * tokens.len());
            logits(z, hidden, weight, first, width);
            let before: Vec<f32> = running.iter().map(|running| running.max).collect();
            running
                .par_iter_mut()
                .zip(z.par_chunks_exact(tokens.len()))
                .for_each(|(running, z)| running.add(z, first));
            for (target, logp) in targets[here.clone()].iter().zip(&mut output.logp[here.clone()]) {
                if tokens.contains(&(target.token as usize)) {
                    *logp = z
                        [(target.row as usize - tile.start) * tokens.len() + target.token as usize - first]
                        .into();
                }
            }
            if let Some(mean) = &mut mean {
                // With the largest logit so far in place of the sum: what was added before shrinks when it grows.
                let mean = &mut mean[tile.start * width..tile.end * width];
                let rows = mean.par_chunks_exact_mut(width).zip(z.par_chunks_exact_mut(tokens.len()));
                rows.zip(&running).zip(&before).for_each(|(((mean, z), running), before)| {
                    let keep = (before - running.max).exp();
                    if first > 0 && keep < 1.0 {
                        mean.iter_mut().for_each(|mean| *mean *= keep);
                    }
                    rows::exp_each(z, 1.0, running.max);
                });
                let shape = [tile.len(), width, tokens.len()];
                matmul::backward_input(mean, z, weight, first, shape, first > 0);
            }
        }
        if let Some(mean) = &mut mean {
            let rows = mean[tile.start * width..tile.end * width].chunks_exact_mut(width);
            for (mean, running) in rows.zip(&running) {
                let scale = (1.0 / running.sum) as f32;
                mean.iter_mut().for_each(|mean| *mean *= scale);
            }
        }
        for running in &running {
            let log_sum = running.sum.ln();
            output.log_sum_exp.push(f64::from(running.max) + log_sum);
            output.entropy.push(log_sum - running.weighted / running.sum);
            output.argmax.push(running.argmax);
        }
        for (target, logp) in targets[here.clone()].iter().zip(&mut output.logp[here]) {
            *logp -= output.log_sum_exp[target.row as usize];
        }
    }
    output
}

/// See [`crate::Device::head_backward`]: `∂ logp(y) / ∂z = onehot(y) − softmax(z)`.
pub fn backward(
    dhidden: &mut [f32],
    dweight: &mut [f32],
    kept: &mut [f32],
    hidden: &[f32],
    weight: &Weight,
    Loss { targets, coefficients, log_sum_exp }: Loss<'_>,
    shape: Head,
    add: bool,
) {
    let width = shape.width;
    if shape.rows == 0 && !add {
        dweight.fill(0.0);
    }
    let mut tiles = Tiles::new(kept);
    for (tile, here) in row_tiles(shape.rows, targets) {
        let hidden = &hidden[tile.start * width..tile.end * width];
        let dhidden = &mut dhidden[tile.start * width..tile.end * width];
        let mut totals = vec![0.0; tile.len()]; // Σ of a row's coefficients
        for (target, c) in targets[here.clone()].iter().zip(&coefficients[here.clone()]) {
            totals[target.row as usize - tile.start] += c;
        }
        for first in (0..shape.vocabulary).step_by(TOKENS) {
            let tokens = first..shape.vocabulary.min(first + TOKENS);
            let n = tokens.len();
            let (z, kept) = tiles.next(tile.len() * n);
            if !kept {
                logits(z, hidden, weight, first, width);
            }
            z.par_chunks_exact_mut(n).zip(&totals).zip(&log_sum_exp[tile.clone()]).for_each(
                |((z, &total), &lse)| {
                    rows::exp_scaled(z, lse as f32, -total as f32);
                },
            );
            for (target, &c) in targets[here.clone()].iter().zip(&coefficients[here.clone()]) {
                if tokens.contains(&(target.token as usize)) {
                    z[(target.row as usize - tile.start) * n + target.token as usize - first] += c as f32;
                }
            }
            let shape = [tile.len(), width, n];
            matmul::backward_input(dhidden, z, weight, first, shape, first > 0);
            let dweight = &mut dweight[tokens.start * width..tokens.end * width];
            matmul::backward_weight(dweight, z, hidden, weight.kernel(), shape, add || tile.start > 0);
        }
    }
}

/// See [`crate::Device::head_backward_frozen`].
pub fn backward_frozen(
    dhidden: &mut [f32],
    mean: &[f32],
    weight: &Weight,
    Loss { targets, coefficients, .. }: Loss<'_>,
    Head { rows, width, .. }: Head,
) {
    dhidden[..rows * width].fill(0.0);
    let mut token = vec![0.0; width];
    for (target, &c) in targets.iter().zip(coefficients) {
        token.fill(0.0);
        weight.add_row(target.token as usize, &mut token);
        let row = target.row as usize * width..(target.row as usize + 1) * width;
        for ((d, w), mean) in dhidden[row.clone()].iter_mut().zip(&token).zip(&mean[row]) {
            *d += c as f32 * (w - mean);
        }
    }
}
