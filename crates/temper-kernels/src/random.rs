//! Randomness as a function of counters: the same numbers whatever runs first.

/// Mixes a value into a key; the finalizer of SplitMix64 (Steele, Lea & Flood 2014) over their combination.
#[inline]
pub fn mix(key: u64, value: u64) -> u64 {
    let mut z = (key ^ value.wrapping_mul(0xd1342543de82ef95)).wrapping_add(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
    z ^ (z >> 31)
}

/// Number `index` of the stream `key`, uniform in `[0, 1)`.
#[inline]
pub fn uniform(key: u64, index: u64) -> f64 {
    (mix(key, index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
