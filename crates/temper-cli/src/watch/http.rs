//! As much of HTTP as a page needs: one short request on a connection, one answer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Bytes of a request's head and body, and how long it may take to come.
const HEAD: usize = 16 << 10;
const BODY: usize = 1 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// What was asked.
#[derive(Debug)]
pub struct Request {
    pub method: String,
    /// The path, without what follows `?`.
    pub path: String,
    /// Names in small letters.
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    /// The first header of this name; empty without.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(own, _)| own == name).map_or("", |(_, value)| value)
    }

    /// Reads a request; the status to answer with when it is none.
    pub fn read(stream: &mut TcpStream) -> Result<Request, u16> {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = Vec::new();
        let (mut request, head) = loop {
            more(stream, &mut bytes, deadline)?;
            if bytes.len() > HEAD {
                return Err(431);
            }
            if let Some(parsed) = parse(&bytes)? {
                break parsed;
            }
        };
        let length = match request.header("content-length") {
            "" => 0,
            length => length.parse().map_err(|_| 400u16)?,
        };
        if length > BODY {
            return Err(413);
        }
        while bytes.len() < head + length {
            more(stream, &mut bytes, deadline)?;
        }
        request.body = bytes[head..head + length].to_vec();
        Ok(request)
    }
}

/// Takes what was not read and throws it away: else the system resets the connection, and the answer is lost.
pub fn finish(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut part = [0; 4096];
    for _ in 0..16 {
        if stream.read(&mut part)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Adds what has come.
fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), u16> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(408);
    }
    let mut part = [0; 4096];
    let read = stream.set_read_timeout(Some(left)).and_then(|()| stream.read(&mut part));
    match read {
        Ok(0) => Err(400),
        Ok(count) => {
            bytes.extend_from_slice(&part[..count]);
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
        Err(_) => Err(408),
    }
}

/// The request and the length of its head, when that is whole.
fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, u16> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(bytes).map_err(|_| 400u16)? {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial => return Ok(None),
    };
    let header = |header: &httparse::Header| {
        let value = String::from_utf8_lossy(header.value).trim().to_owned();
        (header.name.to_ascii_lowercase(), value)
    };
    let path = parsed.path.unwrap_or_default();
    let request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: path.split('?').next().unwrap_or_default().to_owned(),
        headers: parsed.headers.iter().map(header).collect(),
        body: Vec::new(),
    };
    Ok(Some((request, head)))
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    kind: &'static str,
    policy: String,
    /// Further headers.
    pub more: Vec<(&'static str, String)>,
    body: String,
}

impl Answer {
    fn new(status: u16, kind: &'static str, body: String) -> Answer {
        let policy = "default-src 'none'; frame-ancestors 'none'".into();
        Answer { status, kind, policy, more: Vec::new(), body }
    }

    /// A page under its policy.
    pub fn page(status: u16, (page, policy): (String, String)) -> Answer {
        Answer { policy, ..Answer::new(status, "text/html; charset=utf-8", page) }
    }

    /// Data.
    pub fn json(value: &serde_json::Value) -> Answer {
        Answer::new(200, "application/json", value.to_string())
    }

    /// A few words.
    pub fn words(status: u16, words: &str) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{words}\n"))
    }

    /// The head of a stream of events, which has no end.
    pub fn events() -> Answer {
        Answer::new(200, "text/event-stream", String::new())
    }

    /// Writes it.
    pub fn write(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Security-Policy: {}\r\n\
             X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n\
             Cross-Origin-Resource-Policy: same-origin\r\nCache-Control: no-store\r\nConnection: close\r\n",
            self.status,
            reason(self.status),
            self.kind,
            self.policy
        );
        for (name, value) in &self.more {
            head += &format!("{name}: {value}\r\n");
        }
        if self.kind != "text/event-stream" {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        stream.write_all((head + "\r\n" + &self.body).as_bytes())
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        303 => "See Other",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Bad Request",
    }
}
