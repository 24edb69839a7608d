//! Open pages that are told what changes. There is room for a few; who does not keep up is let go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::folder::Change;

/// Open streams, at most.
pub const MOST: usize = 16;

/// Events that wait for a reader, at most.
const WAITING: usize = 64;

/// An event as it is sent, one for all.
pub type Event = Arc<str>;

type Senders = Vec<(u64, SyncSender<Event>)>;

/// All that are open.
#[derive(Debug, Default)]
pub struct Streams {
    open: Mutex<Senders>,
    opened: Condvar,
    number: AtomicU64,
}

/// One of them; it closes when it is dropped.
#[derive(Debug)]
pub struct Stream<'a> {
    all: &'a Streams,
    number: u64,
    pub events: Receiver<Event>,
}

impl Streams {
    /// A new one, if there is room.
    pub fn open(&self) -> Option<Stream<'_>> {
        let mut open = self.all();
        if open.len() >= MOST {
            return None;
        }
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = sync_channel(WAITING);
        open.push((number, sender));
        self.opened.notify_all();
        Some(Stream { all: self, number, events })
    }

    /// Sends to all; those that are full are closed.
    pub fn send(&self, event: &Event) {
        self.all().retain(|(_, sender)| sender.try_send(event.clone()).is_ok());
    }

    /// Waits until one is open.
    pub fn wait(&self) {
        let waiting = self.opened.wait_while(self.all(), |open| open.is_empty());
        drop(waiting);
    }

    fn all(&self) -> MutexGuard<'_, Senders> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        self.all.all().retain(|(number, _)| *number != self.number);
    }
}

/// A change as a server-sent event. JSON has no end of line in it.
pub fn event(change: &Change) -> Event {
    let (name, data) = match change {
        Change::Runs(data) => ("runs", data),
        Change::Points(data) => ("points", data),
        Change::Run(data) => ("run", data),
    };
    format!("event: {name}\ndata: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_bounded_and_slow_ones_are_let_go() {
        let streams = Streams::default();
        let mut open: Vec<Stream> = (0..MOST).map(|_| streams.open().unwrap()).collect();
        assert!(streams.open().is_none());
        open.pop();
        let quick = streams.open().unwrap();
        for _ in 0..=WAITING {
            streams.send(&"event".into());
            quick.events.recv().unwrap();
        }
        assert_eq!(streams.all().len(), 1);
        assert_eq!(open[0].events.iter().count(), WAITING);
        drop(quick);
        assert!(streams.all().is_empty());
    }
}
