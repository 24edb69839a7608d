//! The number formats that tensors are stored in, their decoding to f32, and matrices that stay in them.
//!
//! The block formats are those of ggml, and NF4: a block holds 32, 64 or 256 values that share scales. Multi-byte
//! fields are little-endian; nothing here needs alignment.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

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
    Q4_K,
    Q5_K,
    Q6_K,
    /// 64 values of four bits (Dettmers et al. 2023, arXiv 2305.14314, appendix E); no file holds it.
    NF4,
}

/// Values in a block of the K formats.
const SUPER_BLOCK: usize = 256;

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
            12 => StoredType::Q4_K,
            13 => StoredType::Q5_K,
            14 => StoredType::Q6_K,
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
            StoredType::Q4_K => "Q4_K",
            StoredType::Q5_K => "Q5_K",
            StoredType::Q6_K => "Q6_K",
            StoredType::NF4 => "NF4",
        }
    }

    /// Values in one block.
    pub fn block_values(self) -> usize {
        match self {
            StoredType::F64 | StoredType::F32 | StoredType::F16 | StoredType::BF16 => 1,
            StoredType::Q4_K | StoredType::Q5_K | StoredType::Q6_K => SUPER_BLOCK,
            StoredType::NF4 => 64,
            _ => 32,
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
            StoredType::Q4_K => 144,
            StoredType::Q5_K => 176,
            StoredType::Q6_K => 210,
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
        match self {
            StoredType::F64 => each(bytes, out, |block, [out]| *out = f64::from_le_bytes(*block) as f32),
            StoredType::F32 => each(bytes, out, |block, [out]| *out = f32::from_le_bytes(*block)),
            StoredType::F16 => each(bytes, out, |block, [out]| *out = f16::from_le_bytes(*block).to_f32()),
            StoredType::BF16 => each(bytes, out, |block, [out]| *out = bf16::from_le_bytes(*block).to_f32()),
            StoredType::Q8_0 => each(bytes, out, q8_0),
            StoredType::Q4_0 => each(bytes, out, q4_0),
            StoredType::Q4_1 => each(bytes, out, q4_1),
            StoredType::Q5_0 => each(bytes, out, q5_0),
            StoredType::Q5_1 => each(bytes, out, q5_1),
            StoredType::Q4_K => each(bytes, out, q4_k),
            StoredType::Q5_K => each(bytes, out, q5_k),
            StoredType::Q6_K => each(bytes, out, q6_k),
            StoredType::NF4 => each(bytes, out, nf4),
        }
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

/// Runs `decode` on every block; the array sizes let the compiler drop all bounds checks.
fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<VALUES>();
    for (block, out) in blocks.iter().zip(outs) {
        decode(block, out);
    }
}

/// The f16 at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `scale: f16, q: [i8; 32]`; value = q · scale.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * scale;
    }
}

/// `scale: f16, q: [u8; 16]`; low nibbles are the first 16 values; value = (q − 8) · scale.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = f32::from((q & 15) as i8 - 8) * scale;
        out[i + 16] = f32::from((q >> 4) as i8 - 8) * scale;
    }
}

/// `scale: f16, minimum: f16, q: [u8; 16]`; value = q · scale + minimum.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = f32::from(q & 15) * scale + minimum;
        out[i + 16] = f32::from(q >> 4) * scale + minimum;
    }
}

/// The fifth bits of values `i` and `i + 16` of a Q5 block, each as 0 or 16.
fn fifth_bits(bits: u32, i: usize) -> (u8, u8) {
    ((((bits >> i) & 1) << 4) as u8, (((bits >> (i + 16)) & 1) << 4) as u8)
}

/// `scale: f16, fifth bits: u32, q: [u8; 16]`; value = (q − 16) · scale.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    let bits = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, &q) in block[6..].iter().enumerate() {
        let (low, high) = fifth_bits(bits, i);
        out[i] = f32::from((q & 15 | low) as i8 - 16) * scale;
        out[i + 16] = f32::from((q >> 4 | high) as i8 - 16) * scale;
    }
}

/// `scale: f16, minimum: f16, fifth bits: u32, q: [u8; 16]`; value = q · scale + minimum.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (i, &q) in block[8..].iter().enumerate() {
        let (low, high) = fifth_bits(bits, i);
        out[i] = f32::from(q & 15 | low) * scale + minimum;
        out[i + 16] = f32::from(q >> 4 | high) * scale + minimum;
    }
}

/// The 6-bit scale and minimum of sub-block `i` (of 8), packed in 12 bytes.
fn scale_and_minimum(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// `scale: f16, minimum: f16, sub-scales: [u8; 12], q: [u8; 128]`; 8 sub-blocks of 32, in pairs that
/// share bytes; value = q · scale · sub-scale − minimum · sub-minimum.
fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (pair, (out, q)) in out.chunks_exact_mut(64).zip(block[16..].chunks_exact(32)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let (s, m) = scale_and_minimum(&block[4..16], 2 * pair);
        let (s, m) = (scale * s, minimum * m);
        for (out, &q) in low.iter_mut().zip(q) {
            *out = s * f32::from(q & 15) - m;
        }
        let (s, m) = scale_and_minimum(&block[4..16], 2 * pair + 1);
        let (s, m) = (scale * s, minimum * m);
        for (out, &q) in high.iter_mut().zip(q) {
            *out = s * f32::from(q >> 4) - m;
        }
    }
}

/// As [`q4_k`], with `fifth bits: [u8; 32]` before the nibbles: bit b of byte i belongs to value i of
/// sub-block b.
fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let fifth = &block[16..48];
    for (pair, (out, q)) in out.chunks_exact_mut(64).zip(block[48..].chunks_exact(32)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let (s, m) = scale_and_minimum(&block[4..16], 2 * pair);
        let (s, m) = (scale * s, minimum * m);
        for ((out, &q), &bits) in low.iter_mut().zip(q).zip(fifth) {
            *out = s * f32::from(q & 15 | (bits >> (2 * pair) & 1) << 4) - m;
        }
        let (s, m) = scale_and_minimum(&block[4..16], 2 * pair + 1);
        let (s, m) = (scale * s, minimum * m);
        for ((out, &q), &bits) in high.iter_mut().zip(q).zip(fifth) {
            *out = s * f32::from(q >> 4 | (bits >> (2 * pair + 1) & 1) << 4) - m;
        }
    }
}

/// `low nibbles: [u8; 128], high pairs of bits: [u8; 64], sub-scales: [i8; 16], scale: f16`; two halves
/// of 128 values, each four quarters of 32; value = (q − 32) · scale · sub-scale of its 16.
fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
    let scale = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * half..64 * half + 64];
        let high = &block[128 + 32 * half..160 + 32 * half];
        let sub_scales = &block[192 + 8 * half..200 + 8 * half];
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            // Quarters 0 and 1 are the low nibbles of the 64 bytes, 2 and 3 the high ones.
            let nibbles = &low[32 * (quarter % 2)..][..32];
            let shift = 4 * (quarter / 2);
            for (i, out) in out.iter_mut().enumerate() {
                let q = nibbles[i] >> shift & 15 | (high[i] >> (2 * quarter) & 3) << 4;
                let sub_scale = f32::from(sub_scales[2 * quarter + i / 16] as i8);
                *out = scale * sub_scale * f32::from(q as i8 - 32);
            }
        }
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
fn nf4(block: &[u8; 36], out: &mut [f32; 64]) {
    let largest = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let values = NF4.map(|value| value * largest);
    for (out, &q) in out.as_chunks_mut::<2>().0.iter_mut().zip(&block[4..]) {
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
