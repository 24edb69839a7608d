//! A live page over a folder of runs: what `temper report` shows, while it happens.
//!
//! [`folder`] follows files, [`curves`] reads what a page asks for, [`streams`] tells open pages what changes, and
//! [`server`] answers who [`access`] lets in, in as much [`http`] as that needs. It reads and never writes.

mod access;
mod curves;
mod folder;
mod http;
mod page;
mod server;
mod streams;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Result, bail};

use self::access::Access;
use self::folder::Folder;
use self::server::Server;
use crate::args::Watch;
use crate::output::{hinted, say};
use crate::report::run::counted;

/// Serves the page until the process is ended.
pub fn run(options: &Watch) -> Result<()> {
    let shown = options.folder.display();
    if !options.folder.is_dir() {
        let what = if options.folder.exists() { "is no folder" } else { "does not exist" };
        bail!(hinted(format!("`{shown}` {what}"), "give a run directory, or a folder with runs in it"));
    }
    let listener = listen(SocketAddr::new(options.host, options.port))?;
    let address = listener.local_addr()?;
    let access = Access::new(address)?;
    let mut folder = Folder::new(options.folder.canonicalize()?);
    folder.refresh(Duration::ZERO);
    let page = match address.ip().is_unspecified() {
        true => format!("http://ADDRESS-OF-THIS-MACHINE:{}/", address.port()),
        false => format!("http://{address}/"),
    };
    say("watching", format!("`{shown}`, {} now: {page}", counted(folder.len(), "run")));
    if let Some(token) = access.token() {
        say("token", format!("{token}\nthe page asks for it once; it travels unencrypted, as the page does"));
    }
    say("", "Ctrl-C ends it");
    Server::new(folder, access).serve(&listener);
    Ok(())
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::AddrInUse => "give another `--port`, or `--port 0` for any that is free",
            ErrorKind::AddrNotAvailable => "give `--host` an address of this machine",
            _ => "give another `--port` or `--host`",
        };
        hinted(format!("cannot listen at {address}: {error}"), hint)
    })
}
