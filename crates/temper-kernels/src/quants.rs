//! The number formats that tensors are stored in, their decoding to f32, and matrices that stay in them.
//!
//! The block formats are those of ggml, and NF4: a block holds 32, 64 or 256 values that share scales.

mod ggml;

use std::hint::black_box;
use std::ops::Range;

use half::{bf16, f16};
use multiversion::multiversion;
use rayon::prelude::*;

use ggml::SUPER_BLOCK;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs, reason = "the formats' own names")]
pub enum StoredType {
    F64,
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    /// 64 values of four bits (Dettmers et al. 2023, arXiv 2305.14314, appendix E); no file holds it.
    NF4,
}

impl StoredType {
    /// The format for ggml's type number, or none when temper does not read it.
    pub fn from_ggml(number: u32) -> Option<StoredType> {
        Some(match number {
            0 => StoredType::F32,
            1 => StoredType::F16,
            2 => StoredType::Q4_0,
            3 => StoredType::Q4_1,
            6 => StoredType::Q5_0,
            7 => StoredType::Q5_1,
            8 => StoredType::Q8_0,
            10 => StoredType::Q2_K,
            11 => StoredType::Q3_K,
            12 => StoredType::Q4_K,
            13 => StoredType::Q5_K,
            14 => StoredType::Q6_K,
            20 => StoredType::IQ4_NL,
            23 => StoredType::IQ4_XS,
            28 => StoredType::F64,
            30 => StoredType::BF16,
            _ => return None,
        })
    }

    /// The name that people know the format by.
    pub fn name(self) -> &'static str {
        match self {
            StoredType::F64 => "F64",
            StoredType::F32 => "F32",
            StoredType::F16 => "F16",
            StoredType::BF16 => "BF16",
            StoredType::Q8_0 => "Q8_0",
            StoredType::Q4_0 => "Q4_0",
            StoredType::Q4_1 => "Q4_1",
            StoredType::Q5_0 => "Q5_0",
            StoredType::Q5_1 => "Q5_1",
            StoredType::Q2_K => "Q2_K",
            StoredType::Q3_K => "Q3_K",
            StoredType::Q4_K => "Q4_K",
            StoredType::Q5_K => "Q5_K",
            StoredType::Q6_K => "Q6_K",
            StoredType::IQ4_NL => "IQ4_NL",
            StoredType::IQ4_XS => "IQ4_XS",
            StoredType::NF4 => "NF4",
        }
    }

    /// Values in one block.
    pub fn block_values(self) -> usize {
        match self {
            StoredType::F64 | StoredType::F32 | StoredType::F16 | StoredType::BF16 => 1,
            StoredType::Q8_0
            | StoredType::Q4_0
            | StoredType::Q4_1
            | StoredType::Q5_0
            | StoredType::Q5_1
            | StoredType::IQ4_NL => 32,
            StoredType::Q2_K
            | StoredType::Q3_K
            | StoredType::Q4_K
            | StoredType::Q5_K
            | StoredType::Q6_K
            | StoredType::IQ4_XS => SUPER_BLOCK,
            StoredType::NF4 => 64,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            StoredType::F64 => 8,
            StoredType::F32 => 4,
            StoredType::F16 | StoredType::BF16 => 2,
            StoredType::Q8_0 => 34,
            StoredType::Q4_0 => 18,
            StoredType::Q4_1 => 20,
            StoredType::Q5_0 => 22,
            StoredType::Q5_1 => 24,
            StoredType::Q2_K => 84,
            StoredType::Q3_K => 110,
            StoredType::Q4_K => 144,
            StoredType::Q5_K => 176,
            StoredType::Q6_K => 210,
            StoredType::IQ4_NL => 18,
            StoredType::IQ4_XS => 136,
            StoredType::NF4 => 36,
        }
    }

    /// Bytes of `values` values; none when they are no whole blocks or too many.
    pub fn bytes_of(self, values: usize) -> Option<usize> {
        if !values.is_multiple_of(self.block_values()) {
            return None;
        }
        (values / self.block_values()).checked_mul(self.block_bytes())
    }

    /// Decodes whole blocks; `bytes` and `out` must match as [`StoredType::bytes_of`] says.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(self.bytes_of(out.len()), Some(bytes.len()));
        decode(self, bytes, out);
    }

    /// Bytes of a row of `columns` values that begins with a block.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns.div_ceil(self.block_values()) * self.block_bytes()
    }

    /// Whether values share blocks.
    pub fn is_quantised(self) -> bool {
        self.block_values() > 1
    }
}

/// A matrix that stays as it is stored, row by row, and is decoded where it is used. Rows begin with a block; a last
/// block that a row does not fill ends in zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    stored: StoredType,
    rows: usize,
    columns: usize,
    bytes: Vec<u8>,
}

impl Blocks {
    /// Rows as a file has them; none when the bytes are not theirs.
    pub fn new(stored: StoredType, [rows, columns]: [usize; 2], bytes: Vec<u8>) -> Option<Blocks> {
        let blocks = Blocks { stored, rows, columns, bytes };
        (rows.checked_mul(blocks.row_bytes()) == Some(blocks.bytes.len())).then_some(blocks)
    }

    /// Rows of `columns` values in eight bits: blocks of 32 with a scale of f16, ggml's Q8_0.
    pub fn int8(values: &[f32], columns: usize) -> Blocks {
        Blocks::encode(StoredType::Q8_0, values, columns, encode_q8_0)
    }

    /// Rows of `columns` values in NF4.
    pub fn nf4(values: &[f32], columns: usize) -> Blocks {
        Blocks::encode(StoredType::NF4, values, columns, encode_nf4)
    }

    fn encode<const VALUES: usize>(
        stored: StoredType,
        values: &[f32],
        columns: usize,
        block: impl Fn(&[f32; VALUES], &mut [u8]) + Sync,
    ) -> Blocks {
        let rows = values.len() / columns;
        let mut blocks = Blocks { stored, rows, columns, bytes: Vec::new() };
        blocks.bytes = vec![0; rows * blocks.row_bytes()];
        let row_bytes = blocks.row_bytes();
        blocks.bytes.par_chunks_mut(row_bytes).zip(values.par_chunks(columns)).for_each(|(bytes, row)| {
            for (bytes, values) in bytes.chunks_mut(stored.block_bytes()).zip(row.chunks(VALUES)) {
                let mut whole = [0.0; VALUES];
                whole[..values.len()].copy_from_slice(values);
                block(&whole, bytes);
            }
        });
        blocks
    }

    /// How it is stored.
    pub fn stored(&self) -> StoredType {
        self.stored
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Stored bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn row_bytes(&self) -> usize {
        self.stored.row_bytes(self.columns)
    }

    /// Writes the values of some rows.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let bytes = &self.bytes[rows.start * self.row_bytes()..rows.end * self.row_bytes()];
        if self.columns.is_multiple_of(self.stored.block_values()) {
            return self.stored.decode(bytes, out);
        }
        let mut whole = vec![0.0; self.columns.next_multiple_of(self.stored.block_values())];
        for (bytes, out) in bytes.chunks(self.row_bytes()).zip(out.chunks_mut(self.columns)) {
            self.stored.decode(bytes, &mut whole);
            out.copy_from_slice(&whole[..self.columns]);
        }
    }

    /// All values.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        self.decode(0..self.rows, &mut values);
        values
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn decode(stored: StoredType, bytes: &[u8], out: &mut [f32]) {
    // Loops of this function itself: a function that another one calls for each block would not always be compiled for
    // the same instruction set. The sizes of blocks let the compiler drop all bounds checks.
    macro_rules! values {
        ($bytes:ident => $value:expr) => {
            for (&$bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = $value;
            }
        };
    }
    macro_rules! blocks {
        ($decode:path) => {
            for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                $decode(block, out);
            }
        };
    }
    match stored {
        StoredType::F64 => values!(bytes => f64::from_le_bytes(bytes) as f32),
        StoredType::F32 => values!(bytes => f32::from_le_bytes(bytes)),
        StoredType::F16 => values!(bytes => f16::from_le_bytes(bytes).to_f32_const()),
        StoredType::BF16 => values!(bytes => bf16::from_le_bytes(bytes).to_f32_const()),
        StoredType::Q8_0 => blocks!(ggml::q8_0),
        StoredType::Q4_0 => blocks!(ggml::q4_0),
        StoredType::Q4_1 => blocks!(ggml::q4_1),
        StoredType::Q5_0 => blocks!(ggml::q5_0),
        StoredType::Q5_1 => blocks!(ggml::q5_1),
        StoredType::Q2_K => blocks!(ggml::q2_k),
        StoredType::Q3_K => blocks!(ggml::q3_k),
        StoredType::Q4_K => blocks!(ggml::q4_k),
        StoredType::Q5_K => blocks!(ggml::q5_k),
        StoredType::Q6_K => blocks!(ggml::q6_k),
        StoredType::IQ4_NL => blocks!(ggml::iq4_nl),
        StoredType::IQ4_XS => blocks!(ggml::iq4_xs),
        StoredType::NF4 => blocks!(nf4),
    }
}

/// The sixteen values of NF4: quantiles of a normal distribution, scaled to [−1, 1], with a zero.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// `largest: f32, q: [u8; 32]`; the high nibble is the earlier value; value = NF4[q] · largest.
#[inline(always)]
fn nf4(block: &[u8; 36], out: &mut [f32; 64]) {
    let largest = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let values = NF4.map(|value| value * largest);
    for (out, &q) in out.as_chunks_mut::<2>().0.iter_mut().zip(black_box(&block[4..])) {
        *out = [values[usize::from(q >> 4)], values[usize::from(q & 15)]];
    }
}

/// The largest absolute value; not-a-number when one of them is, and then so are all values of the block.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |most, x| if most.is_nan() || x.abs() <= most { most } else { x.abs() })
}

fn encode_nf4(values: &[f32; 64], out: &mut [u8]) {
    let largest = largest(values);
    let nearest = |value: f32| {
        let scaled = if largest > 0.0 { value / largest } else { 0.0 };
        (0..15).filter(|&i| scaled > (NF4[i] + NF4[i + 1]) / 2.0).count() as u8
    };
    out[..4].copy_from_slice(&largest.to_le_bytes());
    for (out, &[high, low]) in out[4..].iter_mut().zip(values.as_chunks::<2>().0) {
        *out = nearest(high) << 4 | nearest(low);
    }
}

fn encode_q8_0(values: &[f32; 32], out: &mut [u8]) {
    let largest = largest(values);
    let scale = f16::from_f32(largest / 127.0);
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    out[..2].copy_from_slice(&scale.to_le_bytes());
    for (out, value) in out[2..].iter_mut().zip(values) {
        *out = (value * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uniform;

    fn values(len: usize) -> Vec<f32> {
        (0..len as u64).map(|i| 0.1 * (uniform(5, i) as f32 - 0.5)).collect()
    }

    /// Half a step of eight bits, rounding of the scale included, and half the widest gap of NF4; also where rows end
    /// inside a block.
    #[test]
    fn encoding_is_the_nearest() {
        for columns in [64, 70, 1] {
            let values = values(9 * columns);
            for (blocks, step) in
                [(Blocks::int8(&values, columns), 0.51 / 127.0), (Blocks::nf4(&values, columns), 0.152)]
            {
                let decoded = blocks.values();
                let width = blocks.stored().block_values();
                for (row, found) in values.chunks(columns).zip(decoded.chunks(columns)) {
                    for (row, found) in row.chunks(width).zip(found.chunks(width)) {
                        let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
                        for (x, y) in row.iter().zip(found) {
                            assert!((x - y).abs() <= step * largest, "{columns}: {x} became {y}");
                        }
                    }
                }
            }
        }
    }

    /// What is a value of the format comes back exactly, and some rows are those of the whole.
    #[test]
    fn decoding_gives_the_codes() {
        let row: Vec<f32> = (0..64).map(|i| NF4[(7 * i) % 16] * 0.5).collect();
        let blocks = Blocks::nf4(&row, 64);
        assert_eq!(blocks.values(), row);
        assert_eq!(blocks.bytes(), 36);
        let blocks = Blocks::int8(&values(5 * 40), 40);
        let mut some = vec![0.0; 2 * 40];
        blocks.decode(2..4, &mut some);
        assert_eq!(some, blocks.values()[80..160]);
        assert_eq!(Blocks::new(StoredType::Q4_1, [2, 64], vec![0; 79]), None);
    }

    /// A broken weight stays visible: its block decodes to it, and only its block.
    #[test]
    fn what_is_no_number_stays_none() {
        for broken in [0, 17, 63] {
            let mut row = values(128);
            row[broken] = f32::NAN;
            for blocks in [Blocks::int8(&row, 128), Blocks::nf4(&row, 128)] {
                let decoded = blocks.values();
                assert!(decoded[broken].is_nan() && decoded[64..].iter().all(|x| x.is_finite()));
            }
        }
    }
}
