//! The tensors of files that parameters are read from and written to.

use std::borrow::Cow;
use std::collections::HashMap;
use std::iter;
use std::ops::Range;

use temper_kernels::quants::{Blocks, StoredType};
use temper_kernels::{Device, transpose};

use super::spec::{Role, Spec};
use super::weights::{Parameter, Weights};
use super::{Decoder, Error};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::save::{SavedTensor, ValuePieces};

/// How dense layers that are not trained are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantise {
    /// In the number format of products.
    None,
    /// As the file has them, where it has quantised blocks; tables too.
    File,
    /// In four bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314); tables as without.
    Nf4,
    /// In eight bits; tables as without.
    Int8,
}

/// What a parameter of the model is in its file: a head of its own begins as the embedding that it was tied to.
pub(super) fn in_file<'a>(base: &Checkpoint, specs: &'a Weights<Spec>, spec: &'a Spec) -> &'a Spec {
    if base.contains(&spec.parts[0].0) { spec } else { &specs.embedding }
}

/// The blocks of a parameter, when all its parts lie in the file as they lie in memory, and one of them is quantised.
pub(super) fn stored_blocks(checkpoint: &Checkpoint, spec: &Spec) -> crate::Result<Option<Vec<Blocks>>> {
    let mut parts = Vec::new();
    for (name, _) in &spec.parts {
        match checkpoint.blocks(name, spec.transposed)? {
            Some(blocks) => parts.push(blocks),
            None => return Ok(None),
        }
    }
    Ok(parts.iter().any(|part| part.stored().is_quantised()).then_some(parts))
}

/// Bytes of a parameter that stays in blocks; none where products take its values as they are.
pub fn block_bytes(base: &Checkpoint, specs: &Weights<Spec>, quantise: Quantise, spec: &Spec) -> Option<u64> {
    let rows_of = |stored: StoredType| Some((spec.shape[0] * stored.row_bytes(spec.columns())) as u64);
    match (quantise, spec.role) {
        _ if spec.trained || !spec.decays() => None,
        (Quantise::Nf4, Role::Linear) => rows_of(StoredType::NF4),
        (Quantise::Int8, Role::Linear) => rows_of(StoredType::Q8_0),
        (Quantise::File, _) => {
            let stored = |(name, _): &(String, usize)| base.stored_bytes(name, spec.transposed);
            let parts: Option<Vec<(StoredType, u64)>> =
                in_file(base, specs, spec).parts.iter().map(stored).collect();
            let parts = parts.filter(|parts| parts.iter().any(|(stored, _)| stored.is_quantised()))?;
            Some(parts.iter().map(|(_, bytes)| bytes).sum())
        }
        _ => None,
    }
}

/// Bytes of the parameters that are not trained, where products take `bytes` for a value of a matrix.
pub fn frozen_bytes(base: &Checkpoint, specs: &Weights<Spec>, quantise: Quantise, bytes: u64) -> u64 {
    let of_one = |spec: &Spec| {
        let each = if spec.decays() { bytes } else { 4 };
        block_bytes(base, specs, quantise, spec).unwrap_or(each * spec.len() as u64)
    };
    specs.iter().filter(|spec| !spec.trained).map(of_one).sum()
}

/// Calls `f` with the values of a parameter and where they begin, some at a time; its tensors have their names behind a
/// prefix.
///
/// # Errors
/// When one is missing, has another shape, or cannot be read.
pub fn read(
    checkpoint: &Checkpoint,
    prefix: &str,
    spec: &Spec,
    mut f: impl FnMut(usize, &[f32]),
) -> crate::Result<()> {
    let mut at = 0;
    for (name, rows) in &spec.parts {
        let name = format!("{prefix}{name}");
        checkpoint.expect(&name, &spec.file_shape(*rows))?;
        if spec.transposed {
            f(at, &transpose(&checkpoint.read(&name)?, *rows, spec.columns()));
        } else {
            checkpoint.read_pieces(&name, |start, values| f(at + start, values))?;
        }
        at += spec.part_len(*rows);
    }
    Ok(())
}

/// Puts those of `values`, which begin at element `at` of a parameter, into the buffer of its elements `own` that are
/// among them.
pub fn set_own<D: Device>(device: &D, buffer: &mut D::Buffer, own: &Range<usize>, at: usize, values: &[f32]) {
    let here = own.start.max(at)..own.end.min(at + values.len());
    if !here.is_empty() {
        device.set_values(buffer, here.start - own.start, &values[here.start - at..here.end - at]);
    }
}

/// The tensors of one parameter to be saved, one part at a time. `values` gives elements of the parameter, and may make them
/// for the purpose.
pub fn saved<'a>(
    spec: &'a Spec,
    prefix: &str,
    values: impl Fn(Range<usize>) -> Cow<'a, [f32]> + Copy + 'a,
) -> Vec<SavedTensor<'a>> {
    /// Elements of a piece.
    const PIECE: usize = 1 << 20;
    let mut at = 0;
    let part = |(name, rows): &'a (String, usize)| {
        let part = at..at + spec.part_len(*rows);
        at = part.end;
        let pieces = move || -> ValuePieces<'a> {
            let end = part.end;
            if spec.transposed {
                let whole = values(part.clone());
                // Nothing where another rank saves it.
                let saved =
                    if whole.is_empty() { whole } else { transpose(&whole, spec.columns(), *rows).into() };
                return Box::new(iter::once(saved));
            }
            Box::new(part.clone().step_by(PIECE).map(move |start| values(start..end.min(start + PIECE))))
        };
        SavedTensor {
            name: format!("{prefix}{name}"),
            shape: spec.file_shape(*rows),
            values: Box::new(pieces),
        }
    };
    spec.parts.iter().map(part).collect()
}

/// The tensors of the parameters that `chosen` says.
pub fn saved_weights<'a, D: Device>(
    device: &'a D,
    decoder: &'a Decoder<D>,
    prefix: &str,
    chosen: impl Fn(&Spec) -> bool,
) -> Vec<SavedTensor<'a>> {
    let Decoder { weights, specs, pieces, .. } = decoder;
    if let Some(pieces) = pieces {
        return pieces.saved(device, specs, prefix, chosen);
    }
    let all = specs.iter().zip(weights.parameters()).filter(|(spec, _)| chosen(spec));
    let tensors = all.flat_map(|(spec, parameter)| {
        saved(spec, prefix, move |range| match parameter {
            Parameter::Vector(vector) => elements(device.download(vector), range),
            Parameter::Matrix(matrix) => device.weight_values_in(matrix, range),
        })
    });
    tensors.collect()
}

/// Elements `range` of these.
pub fn elements(values: Cow<'_, [f32]>, range: Range<usize>) -> Cow<'_, [f32]> {
    match values {
        Cow::Borrowed(values) => Cow::Borrowed(&values[range]),
        Cow::Owned(values) => Cow::Owned(values[range].to_vec()),
    }
}

/// Compares the names and shapes of a checkpoint with the chosen parameters.
pub(super) fn check(
    checkpoint: &Checkpoint,
    prefix: &str,
    specs: &Weights<Spec>,
    chosen: impl Fn(&Spec) -> bool,
) -> Result<(), Error> {
    let mut problems = Vec::new();
    let mut expected = HashMap::new();
    for spec in specs.iter().filter(|spec| chosen(spec)) {
        for (name, rows) in &spec.parts {
            let (name, shape) = (format!("{prefix}{name}"), spec.file_shape(*rows));
            if !checkpoint.contains(&name) {
                problems.push(format!("missing    {name} {shape:?}"));
            }
            expected.insert(name, shape);
        }
    }
    for (name, shape) in checkpoint.tensors() {
        match expected.get(name) {
            None => problems.push(format!("unexpected {name} {shape:?}")),
            Some(wanted) if wanted != shape => {
                problems.push(format!("shape      {name} {shape:?}, expected {wanted:?}"));
            }
            Some(_) => {}
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: checkpoint.path.clone(), problems }) }
}
