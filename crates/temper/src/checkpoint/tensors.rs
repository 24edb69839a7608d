//! Tensors as they lie in files, and the way from there to f32.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use temper_kernels::quants::{Blocks, StoredType};
use temper_kernels::transpose;

use super::Error;
use crate::hex;

/// Bytes that are read at a time: large enough to be fast, small enough to stay in the cache.
const CHUNK: usize = 1 << 18;

/// How stored rows and columns become Hugging Face's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// They are the same.
    Same,
    /// The file has values that are larger by one: whole factors, where Hugging Face has what they are beyond 1.
    OneAdded,
    /// The file has the transpose of the matrix.
    Transposed,
    /// Within each of so many heads, the file has rows of both halves alternating (llama.cpp's order for
    /// rotary positions), where Hugging Face has one half after the other.
    AlternatingHalves {
        /// Heads among the rows.
        heads: usize,
    },
}

/// A tensor in a file.
#[derive(Debug)]
pub(super) struct Tensor {
    /// Hugging Face's name.
    pub name: String,
    /// Hugging Face's shape, outermost dimension first.
    pub shape: Vec<usize>,
    pub stored: StoredType,
    pub layout: Layout,
    /// Index of its file.
    pub file: usize,
    /// From the start of the file.
    pub offset: u64,
    /// Stored bytes.
    pub bytes: usize,
}

/// A tensor in a few words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSummary<'a> {
    /// Hugging Face's name.
    pub name: &'a str,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// Name of the number format, as `BF16` or `Q4_K`.
    pub stored: &'static str,
    /// Bytes in the file.
    pub bytes: usize,
}

impl Tensor {
    /// The product of the shape; openers have checked that it does not overflow.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a matrix, or with `transposed` one whose transpose, lies in the file in rows of whole blocks.
    pub fn has_blocks(&self, transposed: bool) -> bool {
        let &[rows, columns] = &self.shape[..] else { return false };
        let in_file = (self.layout == Layout::Transposed) == transposed;
        in_file && if transposed { rows } else { columns }.is_multiple_of(self.stored.block_values())
    }

    pub fn summary(&self) -> TensorSummary<'_> {
        let Tensor { name, shape, stored, bytes, .. } = self;
        TensorSummary { name, shape, stored: stored.name(), bytes: *bytes }
    }
}

/// An open file of weights.
#[derive(Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub file: File,
    /// Bytes when it was opened.
    pub length: u64,
}

/// What stands in place of a large file where Git LFS has not fetched it.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// That a file's content is not a pointer to it.
pub fn check_no_pointer(path: &Path, content: &[u8]) -> Result<(), Error> {
    if content.starts_with(LFS_POINTER) { Err(Error::LfsPointer { path: path.to_owned() }) } else { Ok(()) }
}

impl Source {
    pub fn open(path: &Path) -> Result<Source, Error> {
        // Asked before opening, which would wait for ever on a pipe.
        let kind = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !kind.is_file() {
            return Err(Error::damaged(path, "kind", "a regular file", "another kind"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let source = Source { path: path.to_owned(), file, length };
        let mut start = [0; LFS_POINTER.len()];
        if length >= start.len() as u64 {
            source.read_at(0, &mut start)?;
        }
        check_no_pointer(path, &start)?;
        Ok(source)
    }

    /// Fills `bytes` from `offset`; a file that was cut short meanwhile is an error.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.file.read_exact_at(bytes, offset).map_err(Error::io("read", &self.path))
    }
}

/// All tensors of a checkpoint with their files.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    sources: Vec<Source>,
    list: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl Tensors {
    /// Adds a file and the tensors in it, whose `file` is set here.
    pub fn add(&mut self, source: Source, tensors: Vec<Tensor>) -> Result<(), Error> {
        for mut tensor in tensors {
            tensor.file = self.sources.len();
            if self.by_name.insert(tensor.name.clone(), self.list.len()).is_some() {
                let found = "a second one";
                return Err(Error::tensor(&source.path, &tensor.name, "one tensor of this name", found));
            }
            self.list.push(tensor);
        }
        self.sources.push(source);
        Ok(())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.list.iter()
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&index| &self.list[index])
    }

    pub fn file_bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.length).sum()
    }

    /// The file of a tensor.
    pub fn source(&self, tensor: &Tensor) -> &Source {
        &self.sources[tensor.file]
    }

    /// Whether `copy` is there and repeats `original` in form and bytes.
    pub fn is_copy(&self, copy: &str, original: &str) -> Result<bool, Error> {
        match (self.find(copy), self.find(original)) {
            (Some(copy), Some(original)) => self.same(copy, original),
            _ => Ok(false),
        }
    }

    /// Forgets a tensor.
    pub fn remove(&mut self, name: &str) {
        self.list.retain(|tensor| tensor.name != name);
        self.index();
    }

    /// Gives a tensor another name.
    pub fn rename(&mut self, from: &str, to: &str) {
        for tensor in self.list.iter_mut().filter(|tensor| tensor.name == from) {
            to.clone_into(&mut tensor.name);
        }
        self.index();
    }

    fn index(&mut self) {
        let names = self.list.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index));
        self.by_name = names.collect();
    }

    fn same(&self, a: &Tensor, b: &Tensor) -> Result<bool, Error> {
        if (&a.shape, a.stored, a.layout) != (&b.shape, b.stored, b.layout) {
            return Ok(false);
        }
        let (mut left, mut right) = (vec![0; CHUNK.min(a.bytes)], vec![0; CHUNK.min(a.bytes)]);
        for start in (0..a.bytes).step_by(CHUNK) {
            let length = CHUNK.min(a.bytes - start);
            self.source(a).read_at(a.offset + start as u64, &mut left[..length])?;
            self.source(b).read_at(b.offset + start as u64, &mut right[..length])?;
            if left[..length] != right[..length] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The values of `tensor` in Hugging Face's orientation.
    pub fn read(&self, tensor: &Tensor) -> Result<Vec<f32>, Error> {
        let mut stored = vec![0.0; tensor.values()];
        self.decode(tensor, 0, &mut stored)?;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        Ok(match tensor.layout {
            Layout::Same => stored,
            Layout::OneAdded => stored.into_iter().map(|value| value - 1.0).collect(),
            Layout::Transposed => transpose(&stored, rows, tensor.values() / rows),
            Layout::AlternatingHalves { heads } => {
                let mut values = vec![0.0; stored.len()];
                join_halves(&stored, rows, heads, &mut values);
                values
            }
        })
    }

    /// Calls `f` with the same values and where they begin, a piece at a time where the file has them in this order.
    pub fn read_pieces(&self, tensor: &Tensor, mut f: impl FnMut(usize, &[f32])) -> Result<(), Error> {
        /// Values of a piece, whole blocks of every format.
        const PIECE: usize = 1 << 20;
        if tensor.layout != Layout::Same {
            f(0, &self.read(tensor)?);
            return Ok(());
        }
        let mut piece = vec![0.0; PIECE.min(tensor.values())];
        for start in (0..tensor.values()).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(tensor.values() - start)];
            self.decode(tensor, start, piece)?;
            f(start, piece);
        }
        Ok(())
    }

    /// A matrix as it is stored, its rows in Hugging Face's order; with `transposed`, the transpose of Hugging Face's
    /// matrix. None when the file has it the other way.
    pub fn blocks(&self, tensor: &Tensor, transposed: bool) -> Result<Option<Blocks>, Error> {
        if !tensor.has_blocks(transposed) {
            return Ok(None);
        }
        let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
        let shape = if transposed { [columns, rows] } else { [rows, columns] };
        let mut bytes = vec![0; tensor.bytes];
        self.source(tensor).read_at(tensor.offset, &mut bytes)?;
        if let Layout::AlternatingHalves { heads } = tensor.layout {
            let stored = bytes.clone();
            join_halves(&stored, rows, heads, &mut bytes);
        }
        Ok(Blocks::new(tensor.stored, shape, bytes))
    }

    /// Reads values of `tensor` from `first` on, where a block begins, as f32 in the file's order, chunks in parallel.
    fn decode(&self, tensor: &Tensor, first: usize, out: &mut [f32]) -> Result<(), Error> {
        let (source, stored) = (self.source(tensor), tensor.stored);
        let start = tensor.offset + (first / stored.block_values() * stored.block_bytes()) as u64;
        let blocks = CHUNK / stored.block_bytes();
        let chunk_bytes = blocks * stored.block_bytes();
        out.par_chunks_mut(blocks * stored.block_values()).enumerate().try_for_each_init(
            || vec![0; chunk_bytes.min(tensor.bytes)],
            |buffer, (chunk, out)| {
                let buffer = &mut buffer[..out.len() / stored.block_values() * stored.block_bytes()];
                source.read_at(start + (chunk * chunk_bytes) as u64, buffer)?;
                stored.decode(buffer, out);
                Ok(())
            },
        )
    }

    /// See [`super::Checkpoint::content_hash`]; independent of the order and number of files.
    pub fn content_hash(&self, config: &Value) -> Result<String, Error> {
        let mut hash = Sha256::new();
        hash.update(config.to_string());
        let mut order: Vec<&Tensor> = self.list.iter().collect();
        order.sort_by(|a, b| a.name.cmp(&b.name));
        let mut buffer = vec![0; CHUNK];
        for tensor in order {
            hash.update(format!("\n{} {:?} {}\n", tensor.name, tensor.shape, tensor.stored.name()));
            for start in (0..tensor.bytes).step_by(CHUNK) {
                let buffer = &mut buffer[..CHUNK.min(tensor.bytes - start)];
                self.source(tensor).read_at(tensor.offset + start as u64, buffer)?;
                hash.update(buffer);
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

/// Puts the rows of each head's first half before those of its second half.
fn join_halves<T: Copy>(stored: &[T], rows: usize, heads: usize, out: &mut [T]) {
    let width = out.len() / rows;
    let head_rows = rows / heads;
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        let (head, row) = (row / head_rows, row % head_rows);
        let (half, place) = (row / (head_rows / 2), row % (head_rows / 2));
        let from = head * head_rows + 2 * place + half;
        out.copy_from_slice(&stored[from * width..][..width]);
    }
}
