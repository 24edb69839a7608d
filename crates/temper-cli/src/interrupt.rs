//! Ctrl-C and the signal to terminate: the first asks a run to stop, a second ends the process at once. So does SIGUSR1,
//! which launchers of several processes pass on without ending them themselves, and SIGHUP, which comes when a terminal is
//! closed.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::output::{grouped, say};

/// Whether a signal has come, here or at another rank, and which came here. Signals are sent to a process.
static CAME: AtomicBool = AtomicBool::new(false);
static WHICH: AtomicI32 = AtomicI32::new(SIGINT);

/// Listens from now on; what it gives becomes true when a signal has come.
pub fn listen() -> Result<&'static AtomicBool> {
    let hangup = Some(SIGHUP).filter(|signal| !is_ignored(*signal));
    let listened = [SIGINT, SIGTERM, SIGUSR1].into_iter().chain(hangup);
    let mut signals = Signals::new(listened).context("cannot listen for signals")?;
    std::thread::spawn(move || {
        // Counted here: what another rank was told sets CAME too, and the same signal may reach this one after that.
        for (before, signal) in signals.forever().enumerate() {
            if before > 0 {
                low_level::exit(128 + signal);
            }
            WHICH.store(signal, Ordering::Relaxed);
            CAME.store(true, Ordering::Relaxed);
            say("stopping", "what was done before this step is saved; once more ends at once");
        }
    });
    Ok(&CAME)
}

/// Whether the process was started to ignore a signal, as `nohup` does.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Whether one has come.
pub fn has_come() -> bool {
    CAME.load(Ordering::Relaxed)
}

/// The end of what was asked to stop.
#[derive(Debug)]
pub struct Stopped {
    /// How far it came.
    how_far: String,
}

impl Stopped {
    /// Of a run that goes on after this step.
    pub fn after(step: u64) -> Stopped {
        let how_far = match step {
            0 => "before the first step".into(),
            step => format!("after step {}", grouped(step)),
        };
        Stopped { how_far }
    }

    /// Of a sweep with so many of its runs done.
    pub fn with(done: usize, runs: usize) -> Stopped {
        Stopped { how_far: format!("with {} of {} runs done", grouped(done), grouped(runs)) }
    }

    /// What a shell expects of a process that a signal ended.
    pub fn code(&self) -> u8 {
        128 + WHICH.load(Ordering::Relaxed) as u8
    }
}

impl Display for Stopped {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}; run the same command again to go on", self.how_far)
    }
}

impl std::error::Error for Stopped {}
