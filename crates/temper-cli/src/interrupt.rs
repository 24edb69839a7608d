//! Ctrl-C and the signal to terminate: the first asks a run to stop, a second ends the process at once. So does SIGUSR1,
//! which launchers of several processes pass on without ending them themselves.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::output::{grouped, say};

/// Whether a signal has come, here or at another rank, and which came here. Signals are sent to a process.
static CAME: AtomicBool = AtomicBool::new(false);
static WHICH: AtomicI32 = AtomicI32::new(SIGINT);

/// Listens from now on; what it gives becomes true when a signal has come.
pub fn listen() -> Result<&'static AtomicBool> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).context("cannot listen for signals")?;
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
