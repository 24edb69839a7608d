//! ggml's blocks to f32, each function for the compiler to turn into vectors in [`super::decode`]. Multi-byte fields are little-endian; nothing here needs alignment.

use std::hint::black_box;

use half::f16;

/// Values in a block of the K formats.
pub(super) const SUPER_BLOCK: usize = 256;

/// The f16 at byte `at`; `to_f32` would look up what the processor can each time.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32_const()
}

/// `scale: f16, q: [i8; 32]`; value = q · scale.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * scale;
    }
}

/// The low nibbles of 16 bytes, then the high ones. The bytes are hidden from the compiler, which would otherwise make
/// vectors of values of several blocks, gathered one by one (Q4_1 on Zen 3: 1.5 instead of 5.9 values a nanosecond).
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    let mut q = [0; 32];
    for (i, &byte) in black_box(bytes)[..16].iter().enumerate() {
        (q[i], q[i + 16]) = (byte & 15, byte >> 4);
    }
    q
}

/// `scale: f16, q: [u8; 16]`; low nibbles are the first 16 values; value = (q − 8) · scale.
#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(nibbles(&block[2..])) {
        *out = f32::from(q as i8 - 8) * scale;
    }
}

/// `scale: f16, minimum: f16, q: [u8; 16]`; value = q · scale + minimum.
#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (out, q) in out.iter_mut().zip(nibbles(&block[4..])) {
        *out = f32::from(q) * scale + minimum;
    }
}

/// The fifth bit of value `i` of a Q5 block, as 0 or 16.
#[inline(always)]
fn fifth_bit(bits: u32, i: usize) -> u8 {
    ((bits >> i & 1) << 4) as u8
}

/// `scale: f16, fifth bits: u32, q: [u8; 16]`; value = (q − 16) · scale.
#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    let bits = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, (out, q)) in out.iter_mut().zip(nibbles(&block[6..])).enumerate() {
        *out = f32::from((q | fifth_bit(bits, i)) as i8 - 16) * scale;
    }
}

/// `scale: f16, minimum: f16, fifth bits: u32, q: [u8; 16]`; value = q · scale + minimum.
#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (i, (out, q)) in out.iter_mut().zip(nibbles(&block[8..])).enumerate() {
        *out = f32::from(q | fifth_bit(bits, i)) * scale + minimum;
    }
}

/// The 6-bit scale and minimum of sub-block `i` (of 8), packed in 12 bytes.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// `sub-scales: [u8; 16], q: [u8; 64], scale: f16, minimum: f16`; two halves of 128 values, each four quarters of 32
/// that share bytes, two bits each; value = q · scale · low nibble − minimum · high nibble of the sub-scale of its 16.
#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; SUPER_BLOCK]) {
    let (scale, minimum) = (half_at(block, 80), half_at(block, 82));
    for (sixteen, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, quarter, odd) = (sixteen / 8, sixteen / 2 % 4, sixteen % 2);
        let (s, m) = (scale * f32::from(block[sixteen] & 15), minimum * f32::from(block[sixteen] >> 4));
        for (out, &q) in out.iter_mut().zip(&block[16 + 32 * half + 16 * odd..]) {
            *out = s * f32::from(q >> (2 * quarter) & 3) - m;
        }
    }
}

/// `third bits: [u8; 32], q: [u8; 64], sub-scales: [u8; 12], scale: f16`; the two bits lie as those of [`q2_k`], bit b of
/// byte i belongs to value i of the b-th 32; value = (q − 4) · scale · (sub-scale − 32).
#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; SUPER_BLOCK]) {
    let scale = half_at(block, 108);
    let packed = &block[96..108];
    for (sixteen, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, quarter, odd) = (sixteen / 8, sixteen / 2 % 4, sixteen % 2);
        // Of the sixteen sub-scales of 6 bits, nibbles come first, then the pairs above them, four to a byte.
        let low = packed[sixteen % 8] >> (4 * half) & 15;
        let high = packed[8 + sixteen % 4] >> (2 * (sixteen / 4)) & 3;
        let s = scale * f32::from((low | high << 4) as i8 - 32);
        let third = &block[16 * odd..];
        let two = &block[32 + 32 * half + 16 * odd..];
        for ((out, &q), &bits) in out.iter_mut().zip(two).zip(third) {
            let q = q >> (2 * quarter) & 3 | (bits >> (sixteen / 2) & 1) << 2;
            *out = s * f32::from(q as i8 - 4);
        }
    }
}

/// `scale: f16, minimum: f16, sub-scales: [u8; 12], q: [u8; 128]`; 8 sub-blocks of 32, in pairs that
/// share bytes; value = q · scale · sub-scale − minimum · sub-minimum.
#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; SUPER_BLOCK]) {
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
#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; SUPER_BLOCK]) {
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
#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; SUPER_BLOCK]) {
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

/// The sixteen values of the IQ4 formats, closer together around zero.
const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// `scale: f16, q: [u8; 16]`; low nibbles are the first 16 values; value = IQ4[q] · scale.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    iq4(half_at(block, 0), &block[2..], out);
}

/// `scale: f16, high pairs of bits: u16, low nibbles: [u8; 4], q: [u8; 128]`; 8 sub-blocks of 32, as those of
/// [`iq4_nl`], with the scale scale · (sub-scale − 32).
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; SUPER_BLOCK]) {
    let scale = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let blocks = out.as_chunks_mut::<32>().0.iter_mut().zip(block[8..].chunks_exact(16));
    for (i, (out, q)) in blocks.enumerate() {
        let sub_scale = block[4 + i / 2] >> (4 * (i % 2)) & 15 | ((high >> (2 * i) & 3) as u8) << 4;
        iq4(scale * f32::from(sub_scale as i8 - 32), q, out);
    }
}

#[inline(always)]
fn iq4(scale: f32, q: &[u8], out: &mut [f32; 32]) {
    for (i, &q) in black_box(q).iter().enumerate() {
        out[i] = scale * IQ4[usize::from(q & 15)];
        out[i + 16] = scale * IQ4[usize::from(q >> 4)];
    }
}
