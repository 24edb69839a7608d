//! Ctrl-C and the signal to terminate: the first asks a run to stop, a second ends the process at once. So does SIGUSR1,
//! which launchers of several processes pass on without ending them themselves.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::output::{grouped, say};

/// Whether one has come, and which. Signals are sent to a process.
static CAME: AtomicBool = AtomicBool::new(false);
static WHICH: AtomicI32 = AtomicI32::new(SIGINT);

/// Listens from now on; what it gives becomes true when a signal has come.
pub fn listen() -> Result<&'static AtomicBool> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).context("cannot listen for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if CAME.load(Ordering::Relaxed) {
                low_level::exit(128 + signal);
            }
            WHICH.store(signal, Ordering::Relaxed);
            CAME.store(true, Ordering::Relaxed);
            say("stopping", "when the step in progress is finished and saved; once more ends at once");
        }
    });
    Ok(&CAME)
}

/// The end of a run that was asked to stop.
#[derive(Debug)]
pub struct Stopped {
    /// The step after which it goes on.
    pub step: u64,
}

impl Stopped {
    /// What a shell expects of a process that a signal ended.
    pub fn code(&self) -> u8 {
        128 + WHICH.load(Ordering::Relaxed) as u8
    }
}

impl Display for Stopped {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.step {
            0 => formatter.write_str("before the first step")?,
            step => write!(formatter, "after step {}", grouped(step))?,
        }
        formatter.write_str("; run the same command again to go on")
    }
}

impl std::error::Error for Stopped {}
