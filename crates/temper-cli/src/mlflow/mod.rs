//! `--log-to mlflow=URI`: what a run writes into metrics.jsonl, on an MLflow server too.
//!
//! The file is the queue: a thread sends what the file has and the server has not, and `mlflow.json` in the run directory
//! says how far that is. A server that is away stops nothing and loses nothing.

mod address;
mod mirror;
mod server;

use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use temper::train::directory::METRICS;
use temper::train::{Event, Outcome};

use crate::output::{grouped, say, warn};
pub use address::Address;
use mirror::{Mirror, State};
use server::Failure;

/// How often the file is looked at, and the first pause after a failure; each further one is twice as long.
const LOOK: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long the end of a run waits for the server.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// A run's way to its server, if it has one.
pub struct Tracking<'a> {
    address: Option<&'a Address>,
    out: &'a Path,
    sender: Option<Thread>,
}

/// The thread that sends.
struct Thread {
    /// Takes the run's last status.
    ending: Sender<&'static str>,
    /// Closed when all is done, or nothing more will be.
    done: Receiver<()>,
}

impl<'a> Tracking<'a> {
    /// Of the run in a directory.
    pub fn new(address: Option<&'a Address>, out: &'a Path) -> Tracking<'a> {
        Tracking { address, out, sender: None }
    }

    /// Begins with the first line that is written: before, the directory may be another run's, or its file be cut.
    pub fn see(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Step(_) | Event::Sampled(..)) {
            self.begin();
        }
    }

    fn begin(&mut self) {
        let (Some(address), None) = (self.address, &self.sender) else { return };
        let mirror = match Mirror::new(address, self.out) {
            Ok(mirror) => mirror,
            Err(error) => return warn(format!("nothing is sent to the MLflow server: {error:#}")),
        };
        let (ending, statuses) = mpsc::channel();
        let (open, done) = mpsc::channel();
        thread::spawn(move || {
            send(mirror, &statuses);
            drop::<Sender<()>>(open);
        });
        self.sender = Some(Thread { ending, done });
    }

    /// Sends what is missing and how the run ended; says what could not be sent.
    pub fn end(mut self, outcome: &temper::Result<Outcome>) {
        let Some(address) = self.address else { return };
        let status = match outcome {
            Ok(Outcome::Finished(_) | Outcome::AlreadyFinished(_)) => "FINISHED",
            Ok(Outcome::Stopped(_)) => "KILLED",
            Err(_) => "FAILED",
        };
        let missing = || State::read(self.out, address).missing(self.out, status);
        if missing().is_none() {
            return;
        }
        // What went wrong before the first line was may be that the directory is another run's.
        if outcome.is_ok() && self.out.join(METRICS).exists() {
            self.begin();
        }
        let Some(Thread { ending, done }) = &self.sender else { return };
        // A thread that has given up has said why.
        let _ = ending.send(status);
        let mut before = missing();
        while done.recv_timeout(LAST_WAIT) == Err(RecvTimeoutError::Timeout) {
            let now = missing();
            // Who starts a finished run again has nothing else to wait for.
            if now >= before || !matches!(outcome, Ok(Outcome::AlreadyFinished(_))) {
                break;
            }
            before = now;
        }
        if let Some(lines) = missing() {
            let what = match lines {
                0 => "how the run ended has".to_owned(),
                lines => format!("{} of the lines of metrics.jsonl have", grouped(lines)),
            };
            warn(format!("{what} not reached `{}`; the same command sends what is missing", address.uri));
        }
    }
}

/// Sends until the run has ended and all is there, or until the server refuses.
fn send(mut mirror: Mirror, statuses: &Receiver<&'static str>) {
    let (mut pause, mut lost, mut status) = (LOOK, false, None);
    loop {
        let sent = mirror.catch_up().and_then(|()| status.map(|status| mirror.end(status)).transpose());
        match sent {
            Ok(ended) => {
                if lost {
                    say("mlflow", "the server is back, and has all");
                }
                if ended.is_some() {
                    return;
                }
                (pause, lost) = (LOOK, false);
            }
            Err(Failure::Lost(reason)) => {
                if !lost {
                    let uri = mirror.uri();
                    warn(format!(
                        "the MLflow server `{uri}` is away ({reason}); training does not wait for it"
                    ));
                }
                lost = true;
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
            Err(Failure::Refused { message, .. }) => {
                let uri = mirror.uri();
                return warn(format!("the MLflow server `{uri}` refuses: {message}; nothing more is sent"));
            }
        }
        match statuses.recv_timeout(if status.is_some() { LOOK } else { pause }) {
            Ok(last) => status = Some(last),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
