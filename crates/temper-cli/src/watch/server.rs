//! Who asks, for what, and the answer. Names in a path are looked up among what was found, and are never part of a
//! path of files; nothing is written.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use super::access::Access;
use super::curves;
use super::folder::{Change, Folder, Watched};
use super::http::{Answer, Request, finish};
use super::page;
use super::streams::{Streams, event};

/// Connections at a time.
const CONNECTIONS: usize = 64;

/// How often files are looked at, while anybody follows.
const EVERY: Duration = Duration::from_secs(1);

/// Who takes nothing for so long is let go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs that are compared at a time.
const COMPARED: usize = 16;

/// All that threads share.
#[derive(Debug)]
pub struct Server {
    folder: Mutex<Folder>,
    streams: Streams,
    access: Access,
    /// Held while curves are read, so that they are in memory once.
    reading: Mutex<()>,
    connections: AtomicUsize,
}

impl Server {
    /// Over a folder.
    pub fn new(folder: Folder, access: Access) -> Server {
        let (streams, reading, connections) = Default::default();
        Server { folder: Mutex::new(folder), streams, access, reading, connections }
    }

    /// Answers until the process ends.
    pub fn serve(&self, listener: &TcpListener) {
        std::thread::scope(|scope| {
            scope.spawn(|| self.follow());
            loop {
                // Out of files, for example: others will be closed.
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let taken = self.connections.fetch_add(1, Ordering::Relaxed);
                let begun = taken < CONNECTIONS
                    && std::thread::Builder::new().spawn_scoped(scope, || self.attend(stream)).is_ok();
                if !begun {
                    self.connections.fetch_sub(1, Ordering::Relaxed);
                }
            }
        });
    }

    /// Looks for changes while anybody wants to know them.
    fn follow(&self) {
        loop {
            self.streams.wait();
            drop(self.look(EVERY / 2));
            std::thread::sleep(EVERY);
        }
    }

    /// The folder as it is now, or was a moment ago; streams are told what is new.
    fn look(&self, at_most_every: Duration) -> MutexGuard<'_, Folder> {
        let mut folder = self.folder.lock().unwrap_or_else(PoisonError::into_inner);
        for change in folder.refresh(at_most_every) {
            self.streams.send(&event(&change));
        }
        folder
    }

    fn attend(&self, mut stream: TcpStream) {
        // Who is gone needs no answer.
        let _ = self.answer(&mut stream).and_then(|()| finish(&mut stream));
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    fn answer(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let answer = match Request::read(stream) {
            Err(status) => Answer::words(status, "this is no request that can be answered"),
            Ok(request) => match self.refused(&request) {
                Some(answer) => answer,
                None if request.path == "/events" => return self.send_events(stream),
                None => self.answer_to(&request),
            },
        };
        answer.write(stream)
    }

    /// What is answered to who may not ask.
    fn refused(&self, request: &Request) -> Option<Answer> {
        let host = request.header("host");
        if !self.access.is_host(host) {
            let words = "this address is not served: use the one that `temper watch` says, with its port";
            return Some(Answer::words(403, words));
        }
        // A page of another site may lead here, but not ask from there.
        let site = request.header("sec-fetch-site");
        let origin = request.header("origin");
        let foreign = ["cross-site", "same-site"].contains(&site) && request.path != "/";
        if foreign || !["", "null", &format!("http://{host}")].contains(&origin) {
            return Some(Answer::words(403, "pages of other sites may not ask"));
        }
        let logs_in = self.access.token().is_some() && request.path == "/login";
        if request.method != if logs_in { "POST" } else { "GET" } {
            let mut answer = Answer::words(405, "this only shows");
            answer.more.push(("Allow", if logs_in { "POST" } else { "GET" }.into()));
            return Some(answer);
        }
        let known = logs_in || self.access.is_known(request.header("cookie"));
        (!known).then(|| Answer::page(401, page::login("")))
    }

    fn answer_to(&self, request: &Request) -> Answer {
        let parts: Vec<&str> = request.path.split('/').skip(1).collect();
        let found = match parts[..] {
            [""] => Some(self.page()),
            ["login"] if self.access.token().is_some() => Some(self.login(&request.body)),
            ["runs"] => Some(Answer::json(&self.look(EVERY / 2).list())),
            ["favicon.ico"] => Some(Answer::words(204, "")),
            ["run", id, "curves"] => self.curves(id),
            ["run", id, "about"] => self.run(id).map(|run| Answer::json(&curves::about(&run))),
            ["differences", ids] => Some(self.differences(ids)),
            _ => None,
        };
        found.unwrap_or_else(|| Answer::words(404, "there is no such thing, or no more"))
    }

    fn page(&self) -> Answer {
        let folder = self.look(EVERY / 2);
        Answer::page(200, page::page(folder.verbs()))
    }

    fn login(&self, body: &[u8]) -> Answer {
        let body = String::from_utf8_lossy(body);
        let token = body.strip_prefix("token=").unwrap_or_default().trim_matches([' ', '+']);
        if !self.access.is_token(token) {
            return Answer::page(401, page::login("That is not the token."));
        }
        let cookie = format!("{}={token}; HttpOnly; SameSite=Strict; Path=/", self.access.cookie());
        let mut answer = Answer::words(303, "come in");
        answer.more = vec![("Set-Cookie", cookie), ("Location", "/".into())];
        answer
    }

    fn run(&self, id: &str) -> Option<Watched> {
        self.look(EVERY / 2).run(id)
    }

    fn curves(&self, id: &str) -> Option<Answer> {
        let _one_at_a_time = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let run = self.run(id)?;
        curves::curves(&run).ok().map(|value| Answer::json(&value))
    }

    fn differences(&self, ids: &str) -> Answer {
        let folder = self.look(EVERY / 2);
        let runs: Vec<Watched> = ids.split(',').take(COMPARED).filter_map(|id| folder.run(id)).collect();
        drop(folder);
        Answer::json(&curves::differences(&runs))
    }

    /// Sends the list, and then what changes, until the other end is closed or does not keep up.
    fn send_events(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let folder = self.look(EVERY / 2);
        let Some(changes) = self.streams.open() else {
            drop(folder);
            return Answer::words(503, "as many pages follow as can: close another one").write(stream);
        };
        let list: Value = folder.list();
        drop(folder);
        Answer::events().write(stream)?;
        stream.write_all(event(&Change::Runs(list)).as_bytes())?;
        loop {
            match changes.events.recv_timeout(EVERY) {
                Ok(event) => stream.write_all(event.as_bytes())?,
                Err(RecvTimeoutError::Timeout) if is_open(stream) => {}
                Err(_) => return Ok(()),
            }
        }
    }
}

/// Whether the other end is still there, as far as it has said.
fn is_open(stream: &TcpStream) -> bool {
    let read = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let still = stream.set_nonblocking(false).is_ok();
    still && !matches!(read, Ok(0)) && read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}
