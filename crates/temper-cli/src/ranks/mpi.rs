//! Messages between ranks over MPI.
//!
//! MPI makes no progress by itself: requests move when they are tested. A thread tests those that are under way, so that
//! they move while this rank computes; so does every wait. All calls are made while the state is locked, one at a time.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{Debug, Formatter};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mpi::Threading;
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::ffi::{self, MPI_Request};
use mpi::raw::AsRaw;
use mpi::topology::{Communicator, SimpleCommunicator};
use temper::parallel::{Link, Ticket};

use crate::output::warn;

/// Words of a message to MPI: counts are C's `int`, and this many bytes are sent at once anyway.
const CHUNK: usize = 1 << 26;
const TAG: i32 = 7;
/// How long a wait tests without a pause, and the pause between tests afterwards.
const SPIN: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(200);
/// How often a wait looks whether the other rank still lives.
const LOOK: Duration = Duration::from_secs(1);

/// This process among the ranks of MPI's world.
pub struct Mpi {
    rank: usize,
    size: usize,
    timeout: Duration,
    /// Processes of the ranks on this machine, to see whether they live.
    pub neighbours: HashMap<usize, u32>,
    shared: Arc<Shared>,
    mover: Option<JoinHandle<()>>,
}

/// What the thread that lets messages move shares with the others.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to move, or the end has come.
    changed: Condvar,
}

/// Messages on their way.
#[derive(Default)]
struct State {
    sending: Vec<Message>,
    receiving: BTreeMap<Ticket, Message>,
    /// How many were asked of each rank.
    asked: Vec<u64>,
    /// MPI is about to be finalised.
    ended: bool,
}

/// A message, as MPI sees it until its requests are done.
struct Message {
    words: Vec<u32>,
    requests: Vec<MPI_Request>,
}

// SAFETY: a request is a handle of MPI, which was initialised for calls from any thread, one at a time; all calls are made
// while `state` is locked.
unsafe impl Send for State {}

/// Initialises MPI; what is returned with the link finalises it.
pub fn begin(timeout: Duration) -> Result<(Universe, Mpi)> {
    let (universe, threading) =
        mpi::initialize_with_threading(Threading::Serialized).context("MPI is initialised already")?;
    ensure!(
        threading >= Threading::Serialized,
        "the MPI library does not allow calls from another thread than the first (MPI_THREAD_SERIALIZED)"
    );
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    // A rank that panicked would wait for the others on its way out, and they for it.
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        warn(format!("rank {rank} cannot go on"));
        abort(1);
    }));
    let state = Mutex::new(State { asked: vec![0; size], ..State::default() });
    let shared = Arc::new(Shared { state, ..Shared::default() });
    let moved = shared.clone();
    let mover = Some(thread::spawn(move || moved.keep_moving()));
    Ok((universe, Mpi { rank, size, timeout, neighbours: HashMap::new(), shared, mover }))
}

/// Ends all ranks.
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets messages move until the end; sleeps while there are none.
    fn keep_moving(&self) {
        let mut state = self.state();
        while !state.ended {
            if state.move_on() {
                drop(state);
                thread::sleep(NAP);
                state = self.state();
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Mpi {
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// Ends all ranks, because one of them does not answer.
    fn lost(&self, rank: usize, why: &str) -> ! {
        warn(format!("rank {}: rank {rank} {why}; the run ends, its last checkpoint is whole", self.rank));
        abort(1)
    }
}

impl Message {
    /// Nothing of it has begun.
    fn new(words: Vec<u32>) -> Message {
        Message { words, requests: Vec::new() }
    }

    fn begin(&mut self, call: impl Fn(*mut u32, i32, &mut MPI_Request)) {
        for chunk in self.words.chunks_mut(CHUNK) {
            // SAFETY: any bits are a handle until MPI has written one.
            let mut request: MPI_Request = unsafe { std::mem::zeroed() };
            call(chunk.as_mut_ptr(), chunk.len() as i32, &mut request);
            self.requests.push(request);
        }
    }

    /// Whether all of it has gone or come.
    fn is_done(&mut self) -> bool {
        while let Some(request) = self.requests.last_mut() {
            let mut done = 0;
            // SAFETY: the request was made by MPI and is not done; the words it moves live as long as this message.
            unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            if done == 0 {
                return false;
            }
            self.requests.pop();
        }
        true
    }
}

impl State {
    /// Lets everything move on, and forgets what has gone. False when nothing is under way.
    fn move_on(&mut self) -> bool {
        self.sending.retain_mut(|message| !message.is_done());
        let coming = self.receiving.values_mut().filter_map(|message| (!message.is_done()).then_some(()));
        coming.count() > 0 || !self.sending.is_empty()
    }
}

impl Link for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&self, to: usize, words: Vec<u32>) {
        let (world, kind) = (SimpleCommunicator::world(), u32::equivalent_datatype());
        let mut state = self.state();
        let mut message = Message::new(words);
        message.begin(|words, count, request| {
            // SAFETY: `count` words lie there, and live until the request is done: the message is kept until then.
            unsafe {
                ffi::MPI_Isend(words.cast(), count, kind.as_raw(), to as i32, TAG, world.as_raw(), request)
            };
        });
        state.sending.push(message);
        self.shared.changed.notify_one();
    }

    fn receive(&self, from: usize, len: usize) -> Ticket {
        let (world, kind) = (SimpleCommunicator::world(), u32::equivalent_datatype());
        let mut state = self.state();
        let ticket = Ticket { from, number: state.asked[from] };
        state.asked[from] += 1;
        let mut message = Message::new(vec![0; len]);
        message.begin(|words, count, request| {
            // SAFETY: as for sending.
            unsafe {
                ffi::MPI_Irecv(words.cast(), count, kind.as_raw(), from as i32, TAG, world.as_raw(), request)
            };
        });
        state.receiving.insert(ticket, message);
        self.shared.changed.notify_one();
        ticket
    }

    fn wait(&self, ticket: Ticket) -> Vec<u32> {
        let begun = Instant::now();
        let mut looked = begun;
        loop {
            let mut state = self.state();
            state.move_on();
            if state.receiving.get_mut(&ticket).is_none_or(Message::is_done) {
                return state.receiving.remove(&ticket).map(|message| message.words).unwrap_or_default();
            }
            drop(state);
            if begun.elapsed() < SPIN {
                thread::yield_now();
                continue;
            }
            thread::sleep(NAP);
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                if self.neighbours.get(&ticket.from).is_some_and(|&process| !lives(process)) {
                    self.lost(ticket.from, "is gone");
                }
            }
            if begun.elapsed() > self.timeout {
                self.lost(ticket.from, &format!("has not answered for {} s", self.timeout.as_secs()));
            }
        }
    }
}

impl Drop for Mpi {
    /// What was sent must have gone before MPI is finalised.
    fn drop(&mut self) {
        let begun = Instant::now();
        while begun.elapsed() < self.timeout {
            let mut state = self.state();
            state.move_on();
            if state.sending.is_empty() {
                state.ended = true;
                drop(state);
                self.shared.changed.notify_one();
                let _ = self.mover.take().map(JoinHandle::join);
                return;
            }
            drop(state);
            thread::sleep(NAP);
        }
        warn(format!("rank {}: some messages to other ranks could not be delivered", self.rank));
        abort(1);
    }
}

impl Debug for Mpi {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "rank {} of {}", self.rank, self.size)
    }
}

/// Whether a process is there and is not only waiting to be counted as dead.
fn lives(process: u32) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{process}/stat")) else { return false };
    let state = text.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, Some('Z' | 'X'))
}
