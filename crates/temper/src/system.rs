//! What the system says of memory.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A line in kB of a file of the system, in bytes; nothing where the system does not tell.
fn line(key: &str, file: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Resident memory of this process, in bytes.
pub fn resident_memory() -> Option<u64> {
    line("VmRSS:", "/proc/self/status")
}

/// Its peak, at most a tenth of a second ago, for asking takes longer than all the rest of a line of metrics.
pub fn peak_memory() -> Option<u64> {
    static LAST: Mutex<Option<(Instant, u64)>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, bytes)) = last.filter(|(when, _)| when.elapsed() < Duration::from_millis(100)) {
        return Some(bytes);
    }
    *last = Some((Instant::now(), line("VmHWM:", "/proc/self/status")?));
    last.map(|(_, bytes)| bytes)
}

/// Memory that the system could still give, in bytes.
pub fn available_memory() -> Option<u64> {
    line("MemAvailable:", "/proc/meminfo")
}
