//! Matrices of parameters in the forms that products take.

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;

use super::pack::Values;
use super::tile::Kernel;
use super::{Precision, crew, rows};
use crate::device::BLOCK;
use crate::quants::Blocks;

/// Values of a quantised matrix that exist in decoded form at a time.
pub(super) const DECODED: usize = 1 << 20;

/// Those that a thread decodes at a time for itself: they and their blocks stay in its cache.
const CACHED: usize = 1 << 15;

/// A matrix of parameters.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// Products take the values themselves.
    F32(Vec<f32>),
    /// Products take bf16, the upper halves of the values. A matrix that is trained has the lower ones too, and so
    /// its values to the last bit, see `rows::cut`.
    Bf16 {
        /// Upper halves.
        upper: Vec<u16>,
        /// Lower halves.
        lower: Option<Vec<u16>>,
    },
    /// Not trained, and decoded some rows at a time (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).
    Quantised {
        /// One below the other.
        parts: Vec<Blocks>,
        /// What products take the decoded values as.
        precision: Precision,
    },
}

thread_local! {
    /// Decoded rows, kept so that they need not be allocated and zeroed again.
    static DECODED_ROWS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static ROUNDED_ROWS: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

impl Weight {
    /// What products take its values as.
    pub(super) fn precision(&self) -> Precision {
        match self {
            Weight::F32(_) => Precision::F32,
            Weight::Bf16 { .. } => Precision::Bf16,
            Weight::Quantised { precision, .. } => *precision,
        }
    }

    /// The kernel of products with it.
    pub(super) fn kernel(&self) -> Kernel {
        Kernel::of(self.precision())
    }

    /// Calls `f` with pieces of some rows of `columns` values, and where in those rows a piece lies. What is not
    /// quantised is one piece.
    pub(super) fn by_stripes(
        &self,
        rows: Range<usize>,
        columns: usize,
        mut f: impl FnMut(Range<usize>, Values<'_>),
    ) {
        let (all, span) = (0..rows.len(), rows.start * columns..rows.end * columns);
        let (parts, precision) = match self {
            Weight::F32(values) => return f(all, Values::F32(&values[span])),
            Weight::Bf16 { upper, .. } => return f(all, Values::Bf16(&upper[span])),
            Weight::Quantised { parts, precision } => (parts, *precision),
        };
        let height = (DECODED / columns).max(1);
        let (mut decoded, mut rounded) = (DECODED_ROWS.take(), ROUNDED_ROWS.take());
        for start in (0..rows.len()).step_by(height) {
            let stripe = start..rows.len().min(start + height);
            let len = stripe.len() * columns;
            decoded.resize(decoded.len().max(len), 0.0);
            decode(parts, rows.start + stripe.start, columns, &mut decoded[..len]);
            match precision {
                Precision::F32 => f(stripe, Values::F32(&decoded[..len])),
                Precision::Bf16 => {
                    rounded.resize(rounded.len().max(len), 0);
                    crew::for_each_chunk(&mut rounded[..len], BLOCK, |i, out| {
                        rows::round_each(out, &decoded[i * BLOCK..][..out.len()]);
                    });
                    f(stripe, Values::Bf16(&rounded[..len]));
                }
            }
        }
        DECODED_ROWS.set(decoded);
        ROUNDED_ROWS.set(rounded);
    }

    /// As [`Weight::by_stripes`], for products of few rows, which take four at a time: all threads take pieces of up to
    /// `height` rows, and decode them in their caches.
    pub(super) fn by_pieces(
        &self,
        rows: Range<usize>,
        columns: usize,
        height: usize,
        f: impl Fn(Range<usize>, Values<'_>) + Sync,
    ) {
        let height = match self {
            Weight::Quantised { .. } => height.min((CACHED / columns).next_multiple_of(4).max(4)),
            _ => height,
        };
        crew::for_each(rows.len().div_ceil(height), |i| {
            let piece = i * height..rows.len().min((i + 1) * height);
            let first = rows.start + piece.start;
            let span = first * columns..(first + piece.len()) * columns;
            let (parts, precision) = match self {
                Weight::F32(values) => return f(piece, Values::F32(&values[span])),
                Weight::Bf16 { upper, .. } => return f(piece, Values::Bf16(&upper[span])),
                Weight::Quantised { parts, precision } => (parts, *precision),
            };
            let (mut decoded, mut rounded) = (DECODED_ROWS.take(), ROUNDED_ROWS.take());
            decoded.resize(decoded.len().max(span.len()), 0.0);
            let values = &mut decoded[..span.len()];
            decode_rows(parts, first, columns, values);
            match precision {
                Precision::F32 => f(piece, Values::F32(values)),
                Precision::Bf16 => {
                    rounded.resize(rounded.len().max(span.len()), 0);
                    rows::round_each(&mut rounded[..span.len()], values);
                    f(piece, Values::Bf16(&rounded[..span.len()]));
                }
            }
            DECODED_ROWS.set(decoded);
            ROUNDED_ROWS.set(rounded);
        });
    }

    /// Elements `range` as f32.
    pub(super) fn values(&self, range: Range<usize>) -> Cow<'_, [f32]> {
        let first = range.start;
        match self {
            Weight::F32(values) => Cow::Borrowed(&values[range]),
            Weight::Bf16 { upper, lower: Some(lower) } => {
                let mut out = vec![0.0; range.len()];
                rows::join(&mut out, [&upper[range.clone()], &lower[range]], first);
                Cow::Owned(out)
            }
            Weight::Bf16 { upper, lower: None } => Values::Bf16(&upper[range]).widened().into(),
            Weight::Quantised { parts, .. } => {
                let columns = parts.first().map_or(1, Blocks::columns);
                let rows = first / columns..range.end.div_ceil(columns);
                let mut out = vec![0.0; rows.len() * columns];
                decode(parts, rows.start, columns, &mut out);
                out.truncate(range.end - rows.start * columns);
                Cow::Owned(out.split_off(first - rows.start * columns))
            }
        }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        match self {
            Weight::F32(values) => values.len(),
            Weight::Bf16 { upper, .. } => upper.len(),
            Weight::Quantised { parts, .. } => parts.iter().map(|part| part.rows() * part.columns()).sum(),
        }
    }

    /// One row, added to `out`.
    pub(super) fn add_row(&self, row: usize, out: &mut [f32]) {
        let span = row * out.len()..(row + 1) * out.len();
        out.iter_mut().zip(&*self.values(span)).for_each(|(out, x)| *out += x);
    }
}

/// Decodes rows from `first` on into `out`, some at a time in parallel.
fn decode(parts: &[Blocks], first: usize, columns: usize, out: &mut [f32]) {
    /// Rows of a task.
    const ROWS: usize = 32;
    crew::for_each_chunk(out, ROWS * columns, |i, out| decode_rows(parts, first + i * ROWS, columns, out));
}

/// Decodes rows from `row` on into `out`, by this thread.
fn decode_rows(parts: &[Blocks], mut row: usize, columns: usize, mut out: &mut [f32]) {
    let mut before = 0;
    for part in parts {
        let rows = before..before + part.rows();
        before = rows.end;
        if rows.contains(&row) && !out.is_empty() {
            let here = row..rows.end.min(row + out.len() / columns);
            let (now, rest) = out.split_at_mut(here.len() * columns);
            part.decode(here.start - rows.start..here.end - rows.start, now);
            (out, row) = (rest, here.end);
        }
    }
}
