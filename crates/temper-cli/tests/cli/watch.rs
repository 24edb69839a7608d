//! The live page: what it serves and to whom, files that grow, break and go, and a browser where there is one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::support::{Place, fixture};

/// Long enough on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A page that is served.
struct Watching {
    child: Child,
    port: u16,
    token: Option<String>,
}

impl Watching {
    fn begin(place: &Place, arguments: &[&str]) -> Watching {
        let words = ["watch", "--port", "0"];
        let mut child = place
            .temper(words.into_iter().chain(arguments.iter().copied()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let address = lines.find(|line| line.contains("http://")).unwrap();
        let port = address.trim_end_matches('/').rsplit(':').next().unwrap().parse().unwrap();
        let token = lines.next().filter(|line| line.contains("token"));
        let token = token.map(|line| line.split_whitespace().last().unwrap().to_owned());
        Watching { child, port, token }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The answer to a request with these lines in its head.
    fn ask(&self, first: &str, more: &str) -> String {
        let host = format!("Host: 127.0.0.1:{}\r\n", self.port);
        self.send(&format!("{first} HTTP/1.1\r\n{host}{more}\r\n"))
    }

    fn send(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn json(&self, path: &str) -> Value {
        let answer = self.ask(&format!("GET {path}"), "");
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    }

    /// The list, once it is as it should be.
    fn list(&self, is_right: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let list = self.json("/runs");
            let list = list.as_array().unwrap();
            if is_right(list) {
                return list.clone();
            }
            assert!(begun.elapsed() < PATIENCE, "{list:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn events(&self) -> Events {
        let mut stream = self.connect();
        let host = self.port;
        write!(stream, "GET /events HTTP/1.1\r\nHost: localhost:{host}\r\n\r\n").unwrap();
        Events(BufReader::new(stream))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stream of events.
struct Events(BufReader<TcpStream>);

impl Events {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    /// The data of the next event of this name.
    fn next(&mut self, name: &str) -> Value {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "the stream ended before `{name}`");
            if line == format!("event: {name}\n") {
                return serde_json::from_str(self.line().strip_prefix("data: ").unwrap()).unwrap();
            }
        }
    }
}

fn begin_run(place: &Place, name: &str, metrics: &str) {
    let manifest = json!({
        "verb": "sft",
        "steps": 10,
        "settings": { "learning_rate": { "value": name, "origin": "flag" } },
    });
    fs::create_dir_all(place.path(name)).unwrap();
    fs::write(place.path(name).join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(place.path(name).join("metrics.jsonl"), metrics).unwrap();
}

fn append(path: &Path, text: &str) {
    fs::File::options().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

fn steps(steps: std::ops::RangeInclusive<u64>) -> String {
    let line = |step| {
        format!(
            "{{\"step\":{step},\"loss\":{}.5,\"seconds\":2,\"num_tokens\":{step}00}}\n",
            1000 - step % 1000
        )
    };
    steps.map(line).collect()
}

#[test]
fn a_run_grows_is_cut_and_goes() {
    let place = Place::new();
    begin_run(&place, "runs/a", &steps(1..=3));
    begin_run(&place, "runs/deep/er/b", "");
    let watching = Watching::begin(&place, &["runs"]);
    let mut events = watching.events();
    let list = events.next("runs");
    assert_eq!([&list[0]["name"], &list[1]["name"]], ["a", "b"]);
    assert_eq!((&list[0]["step"], &list[0]["planned"], &list[1]["step"]), (&json!(3), &json!(10), &json!(0)));
    assert_eq!((&list[0]["state"], &list[0]["left"]), (&json!("running"), &json!(14)));
    let id = list[0]["id"].as_str().unwrap();
    let curves = watching.json(&format!("/run/{id}/curves"));
    assert_eq!(curves["run"]["columns"]["loss"], json!({ "x": [1, 2, 3], "y": [999.5, 998.5, 997.5] }));
    assert_eq!((&curves["end"], &curves["file"]), (&list[0]["end"], &list[0]["file"]));

    let metrics = place.path("runs/a/metrics.jsonl");
    append(&metrics, &(steps(4..=5) + "{\"step\":6,"));
    let points = events.next("points");
    assert_eq!((&points["id"], &points["from"]), (&list[0]["id"], &curves["end"]));
    assert_eq!(points["part"]["columns"]["loss"]["x"], json!([4, 5]));
    assert_eq!(events.next("run")["end"], points["end"]);
    append(&metrics, "\"loss\":0.25}\nnonsense\n\u{1}\n");
    assert_eq!(events.next("points")["part"]["columns"]["loss"], json!({ "x": [6], "y": [0.25] }));
    let curves = watching.json(&format!("/run/{id}/curves"));
    assert_eq!(curves["run"]["columns"]["loss"]["x"], json!([1, 2, 3, 4, 5, 6]));
    assert!(curves["notes"][0].as_str().unwrap().contains("2 lines damaged"), "{curves}");

    for (ended, state) in [(json!({ "failed": "no room" }), "failed"), (json!({ "stopped": 6 }), "stopped")] {
        fs::write(place.path("runs/a/ended.json"), ended.to_string()).unwrap();
        watching.list(|list| list[0]["state"] == state);
        let about = watching.json(&format!("/run/{id}/about"));
        let says = about["notes"].to_string().contains("failed: no room");
        assert_eq!(says, state == "failed", "{about}");
    }
    fs::write(&metrics, steps(1..=2)).unwrap();
    let points = events.next("points");
    assert!(points["from"] == 0 && points["file"] != curves["file"], "{points}");
    fs::create_dir_all(place.path("runs/a/final")).unwrap();
    fs::write(place.path("runs/a/final/DONE"), "").unwrap();
    watching.list(|list| list[0]["state"] == "finished" && list[0]["left"].is_null());
    fs::remove_dir_all(place.path("runs/a")).unwrap();
    assert_eq!(events.next("runs").as_array().unwrap().len(), 1);
    assert!(watching.ask(&format!("GET /run/{id}/curves"), "").starts_with("HTTP/1.1 404"));
    begin_run(&place, "runs/late", &steps(1..=1));
    assert_eq!(events.next("runs")[1]["name"], "late");
}

#[test]
fn a_real_run_is_running_until_it_is_killed() {
    let place = Place::new();
    let (model, chats) = (fixture("chat-tiny"), place.chats());
    let words = "sft --out runs/real --max-steps 1000000 --batch-size 2 --data";
    let arguments = words.split_whitespace().chain([chats.as_str(), "--model", &model]);
    let mut child = place.temper(arguments).stderr(Stdio::null()).spawn().unwrap();
    fs::create_dir_all(place.path("runs")).unwrap();
    let watching = Watching::begin(&place, &["runs"]);
    let running =
        |list: &[Value]| list.first().is_some_and(|run| run["state"] == "running" && run["step"] != 0);
    let list = watching.list(running);
    assert!(list[0]["left"].as_f64().unwrap() > 0.0 && list[0]["last"]["loss"].is_number(), "{list:?}");
    let about = watching.json(&format!("/run/{}/about", list[0]["id"].as_str().unwrap()));
    assert!(
        about["settings"].as_array().unwrap().contains(&json!(["max_steps", "1000000", "flag"])),
        "{about}"
    );
    assert!(about["said"] == "metrics.jsonl" && about["log"].as_str().unwrap().contains("\"loss\""));
    child.kill().unwrap();
    child.wait().unwrap();
    watching.list(|list| list[0]["state"] == "interrupted");
}

#[test]
fn only_this_page_may_ask_and_only_for_what_was_found() {
    let place = Place::new();
    begin_run(&place, "runs/a", &steps(1..=3));
    let outside = place.file("secret.jsonl", &steps(1..=1));
    std::os::unix::fs::symlink(&outside, place.path("runs/a.log")).unwrap();
    let watching = Watching::begin(&place, &["runs"]);
    let port = watching.port;
    let page = watching.ask("GET /", "");
    for part in [
        "HTTP/1.1 200",
        "Content-Security-Policy: default-src 'none'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "script-src 'sha256-",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
        "Cache-Control: no-store",
        "<div class=\"chart\">",
    ] {
        assert!(page.contains(part), "`{part}` is not in the answer");
    }
    let secret = ["/../secret.jsonl", "/run/../../secret.jsonl", "/run/..%2f..%2fsecret.jsonl/curves"];
    let absolute = format!("/run/{}/curves", outside.replace('/', "%2f"));
    let others =
        ["//etc/passwd", "/run//curves", "/run/a/about", "/login", "/differences", "/runs/a", &absolute];
    for path in secret.iter().chain(&others) {
        let answer = watching.ask(&format!("GET {path}"), "");
        assert!(answer.starts_with("HTTP/1.1 404") && !answer.contains("step"), "{path}: {answer}");
    }
    let id = watching.list(|_| true)[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(watching.json(&format!("/run/{id}/about"))["said"], "metrics.jsonl", "not the link");
    for method in ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"] {
        let answer = watching.ask(&format!("{method} /runs"), "");
        assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("Allow: GET"), "{answer}");
    }
    for host in ["evil.example", &format!("evil.example:{port}"), "127.0.0.1:1", &format!("10.0.0.1:{port}")]
    {
        let answer = watching.send(&format!("GET /runs HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert!(answer.starts_with("HTTP/1.1 403"), "{host}: {answer}");
    }
    assert!(watching.send("GET /runs HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 403"));
    for header in ["Origin: http://evil.example", "Sec-Fetch-Site: cross-site"] {
        let answer = watching.ask("GET /events", &format!("{header}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 403"), "{header}: {answer}");
    }
    assert!(watching.send("nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    let long = format!("X: {}\r\n", "x".repeat(20_000));
    assert!(watching.ask("GET /", &long).starts_with("HTTP/1.1 431"));
    let length = "Content-Length: 99999999\r\n";
    assert!(watching.ask("GET /", length).starts_with("HTTP/1.1 413"));
}

#[test]
fn streams_are_bounded_and_make_room_again() {
    let place = Place::new();
    begin_run(&place, "a", &steps(1..=3));
    let watching = Watching::begin(&place, &["a"]);
    let mut open: Vec<Events> = (0..16).map(|_| watching.events()).collect();
    open.iter_mut().for_each(|events| assert_eq!(events.next("runs")[0]["name"], "a"));
    assert!(watching.events().line().starts_with("HTTP/1.1 503"));
    drop(open);
    let begun = Instant::now();
    while !watching.events().line().starts_with("HTTP/1.1 200") {
        assert!(begun.elapsed() < PATIENCE);
    }
}

#[test]
fn beyond_this_machine_a_token_is_asked_for() {
    let place = Place::new();
    begin_run(&place, "runs/a", &steps(1..=3));
    let watching = Watching::begin(&place, &["runs", "--host", "0.0.0.0"]);
    let token = watching.token.clone().unwrap();
    assert_eq!(token.len(), 64);
    for path in ["/", "/runs", "/events", &format!("/runs?token={token}")] {
        let answer = watching.ask(&format!("GET {path}"), "");
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("type=\"password\""), "{answer}");
        assert!(!answer.contains(&token) && !answer.contains("learning_rate"));
    }
    let login = |token: &str| {
        let body = format!("token={token}");
        let length = format!("Content-Length: {}\r\n", body.len());
        let host = format!("Host: 127.0.0.1:{}\r\n", watching.port);
        watching.send(&format!("POST /login HTTP/1.1\r\n{host}{length}\r\n{body}"))
    };
    let wrong = login(&"0".repeat(64));
    assert!(wrong.starts_with("HTTP/1.1 401") && !wrong.contains("Set-Cookie"), "{wrong}");
    let right = login(&token);
    assert!(right.starts_with("HTTP/1.1 303") && right.contains("HttpOnly; SameSite=Strict"), "{right}");
    let cookie = right.split("Set-Cookie: ").nth(1).unwrap().split(';').next().unwrap();
    let answer = watching.ask("GET /runs", &format!("Cookie: {cookie}\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"name\":\"a\""), "{answer}");
    assert!(watching.ask("POST /runs", &format!("Cookie: {cookie}\r\n")).starts_with("HTTP/1.1 405"));
    let Some(mut browser) = Browser::open(&place, &format!("http://127.0.0.1:{}/", watching.port)) else {
        return;
    };
    let mut typed = |text: &str, expected: &str| {
        browser.wait("document.activeElement?.id === 'token'");
        browser.value(&format!("document.getElementById('token').value = '{text}'"));
        browser.value("document.querySelector('form button').click()");
        browser.wait(expected);
    };
    typed("wrong", "document.querySelector('[role=alert]')?.textContent.trim().length > 0");
    typed(&token, "document.getElementById('state')?.textContent === 'live'");
    browser.wait("document.getElementById('runs').textContent.includes('a')");
    assert_eq!(browser.value("location.pathname + location.search"), "/");
}

#[test]
fn two_hundred_long_runs_need_little() {
    let place = Place::new();
    let metrics = steps(1..=10_000);
    for at in 0..200 {
        begin_run(&place, &format!("runs/run-{at}"), &metrics);
    }
    let watching = Watching::begin(&place, &["runs"]);
    let list = watching.list(|list| list.len() == 200);
    assert!(list.iter().all(|run| run["step"] == 10_000));
    for run in &list[..20] {
        let curves = watching.json(&format!("/run/{}/curves", run["id"].as_str().unwrap()));
        let loss = curves["run"]["columns"]["loss"]["x"].as_array().unwrap();
        assert!((500..1100).contains(&loss.len()) && loss.last() == Some(&json!(10_000)));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", watching.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 50_000, "{peak} kB");
}

#[test]
fn what_cannot_be_served_is_said() {
    let place = Place::new();
    let file = place.file("file", "");
    place.run("watch nowhere", &[]).failed(1, &["`nowhere` does not exist", "hint"]);
    place.run("watch", &[&file]).failed(1, &["is no folder", "hint"]);
    place.run("watch", &[]).failed(2, &["DIR"]);
    place.run("watch . --host name", &[]).failed(2, &["--host"]);
    let watching = Watching::begin(&place, &["."]);
    assert_eq!(watching.list(|_| true), [] as [Value; 0]);
    let port = watching.port.to_string();
    place.run("watch . --port", &[&port]).failed(1, &["cannot listen", "--port 0"]);
}

#[test]
fn a_browser_draws_what_grows_and_hostile_words_stay_words() {
    let place = Place::new();
    let hostile = "<img src=x onerror=console.log('alert')></script><script>console.log('alert')</script>";
    let name = "<b onclick=x>a";
    // The newest run is shown in detail, and by name where two began in the same second.
    begin_run(&place, "runs/b", &steps(1..=20));
    begin_run(&place, &format!("runs/{name}"), &steps(1..=40));
    let sample = json!({ "step": 3, "prompt": hostile, "answer": hostile, "tokens": 1 });
    let samples = place.path("runs").join(name).join("samples.jsonl");
    fs::write(&samples, format!("{sample}\n{{")).unwrap();
    let watching = Watching::begin(&place, &["runs"]);
    let address = format!("http://127.0.0.1:{}/", watching.port);
    let Some(mut browser) = Browser::open(&place, &address) else { return };
    let lines = "document.querySelectorAll('#plot-loss path.line:not(.pale)')";
    browser.wait(&format!("{lines}.length === 2"));
    browser.wait("document.getElementById('state').textContent === 'live'");
    browser.wait("document.getElementById('answers').textContent.includes('<img src=x onerror')");
    browser.wait("document.getElementById('differences').textContent.includes('learning_rate')");
    let path = format!("[...{lines}].map((line) => line.getAttribute('d')).join()");
    let before = browser.value(&path);
    append(&place.path("runs/b/metrics.jsonl"), &steps(21..=60));
    browser.wait(&format!("{path} !== {before}"));
    browser.wait("document.getElementById('runs').textContent.includes('60 of 10')");
    let button = "[...document.querySelectorAll('#runs button')].find((one) => one.textContent === 'b')";
    browser.value(&format!("{button}.click()"));
    browser.wait(&format!("{lines}.length === 1"));
    fs::remove_dir_all(place.path("runs/b")).unwrap();
    browser.wait("document.querySelectorAll('#runs tr').length === 1");
    let made = "document.querySelectorAll('#runs b, #about b, img, [onclick]').length";
    assert_eq!(browser.value(made), 0);
    assert!(browser.said.is_empty(), "{:#?}", browser.said);
}
