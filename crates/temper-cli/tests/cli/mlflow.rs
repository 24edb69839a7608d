//! `--log-to`: what a server is told, and what becomes of a run whose server is away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::support::{Place, contents, fixture, lines};

/// A request as it came.
#[derive(Debug, Clone)]
struct Request {
    call: String,
    authorization: Option<String>,
    body: Value,
}

/// What a server does with a request; it has kept it before.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Good,
    Status(u16),
    HangUp,
}

/// A server with no more of MLflow than a run needs.
struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `answer` is given how many requests came before.
    fn new(listener: TcpListener, answer: impl Fn(usize) -> Answer + Send + 'static) -> Server {
        let address = to(&listener);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&requests);
        std::thread::spawn(move || {
            let mut params = BTreeMap::new();
            for stream in listener.incoming().map_while(Result::ok) {
                let Some(request) = read(&stream) else { continue };
                let earlier = {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push(request.clone());
                    kept.len() - 1
                };
                if request.call == "runs/create" {
                    params.clear();
                }
                // As MLflow has it: a parameter never changes.
                let changed = request.body["params"].as_array().into_iter().flatten().any(|param| {
                    let key = param["key"].to_string();
                    *params.entry(key).or_insert_with(|| param["value"].clone()) != param["value"]
                });
                match answer(earlier) {
                    Answer::Good if changed => reply(&stream, 400, &json!({})),
                    Answer::HangUp => {}
                    Answer::Status(status) => reply(&stream, status, &json!({})),
                    Answer::Good => match request.call.split('?').next().unwrap() {
                        "experiments/get-by-name" => {
                            reply(&stream, 404, &json!({ "error_code": "RESOURCE_DOES_NOT_EXIST" }));
                        }
                        "experiments/create" => reply(&stream, 200, &json!({ "experiment_id": "7" })),
                        "runs/create" => {
                            reply(&stream, 200, &json!({ "run": { "info": { "run_id": "abc" } } }));
                        }
                        _ => reply(&stream, 200, &json!({})),
                    },
                }
            }
        });
        Server { address, requests }
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The bodies of one call.
    fn of(&self, call: &str) -> Vec<Value> {
        self.requests()
            .into_iter()
            .filter(|request| request.call == call)
            .map(|request| request.body)
            .collect()
    }

    /// Time and value of every point by name and step, however often it came.
    fn points(&self) -> BTreeMap<(String, u64), BTreeSet<String>> {
        let mut points = BTreeMap::<_, BTreeSet<String>>::new();
        for batch in self.of("runs/log-batch") {
            assert_eq!(batch["run_id"], "abc");
            for point in batch["metrics"].as_array().into_iter().flatten() {
                let key = (point["key"].as_str().unwrap().to_owned(), point["step"].as_u64().unwrap());
                points.entry(key).or_default().insert(format!("{} {}", point["timestamp"], point["value"]));
            }
        }
        points
    }

    fn statuses(&self) -> Vec<String> {
        self.of("runs/update").iter().map(|update| update["status"].as_str().unwrap().to_owned()).collect()
    }

    /// That every number of a run's metrics is here as one point, but for the last bits that reading decimals costs.
    fn has_all(&self, run: &Path) {
        let points = self.points();
        let mut expected = BTreeSet::new();
        for line in lines(&run.join("metrics.jsonl")) {
            let step = line["step"].as_u64().unwrap();
            for (key, value) in line.as_object().unwrap().iter().filter(|(key, _)| *key != "step") {
                let found = &points[&(key.clone(), step)];
                assert_eq!(found.len(), 1, "{key} of step {step}: {found:?}");
                let found: f64 = found.first().unwrap().split_once(' ').unwrap().1.parse().unwrap();
                let value = value.as_f64().unwrap();
                assert!(
                    (found - value).abs() <= 1e-14 * value.abs(),
                    "{key} of step {step}: {found}, not {value}"
                );
                expected.insert((key.clone(), step));
            }
        }
        assert_eq!(points.len(), expected.len());
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// The value of `--log-to`.
fn to(listener: &TcpListener) -> String {
    format!("mlflow=http://{}", listener.local_addr().unwrap())
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let of_line = |line: &String| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        };
        head.iter().find_map(of_line)
    };
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let call = head[0].split(' ').nth(1)?.strip_prefix("/api/2.0/mlflow/")?.to_owned();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    Some(Request { call, authorization: header("authorization"), body })
}

fn reply(mut stream: &TcpStream, status: u16, body: &Value) {
    let body = body.to_string();
    let head = format!("HTTP/1.1 {status} -\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // Who asked may be gone.
    let _ = stream.write_all(format!("{head}{body}").as_bytes());
}

/// A run of twelve steps with an evaluation after every second one.
const WORDS: &str =
    "dpo --out run --batch-size 4 --epochs 4 --eval-steps 2 --save-steps 2 --dtype f32 --quiet";

fn train(place: &Place, to: &str, more: &[&str]) -> crate::support::Ran {
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    let files = ["--model", &model, "--data", &data, "--eval-data", &data, "--log-to", to];
    place.run(WORDS, &[&files[..], more].concat())
}

/// Answers get lost on the way and the server is busy: each point is there once, for a point that comes again is the
/// same point.
#[test]
fn a_server_has_the_run() {
    let place = Place::new();
    let answer = |earlier| match earlier {
        3 | 5 => Answer::HangUp,
        6 => Answer::Status(503),
        _ => Answer::Good,
    };
    let server = Server::new(listener(), answer);
    let ran = train(&place, &format!("{}#a & b", server.address), &[]).good();
    assert_eq!(ran.stderr().matches("is away").count(), 1, "{}", ran.stderr());
    server.has_all(&place.path("run"));
    assert_eq!(server.requests()[0].call, "experiments/get-by-name?experiment_name=a%20%26%20b");
    assert_eq!(server.of("experiments/create"), [json!({ "name": "a & b" })]);
    let created = &server.of("runs/create")[0];
    assert_eq!((&created["experiment_id"], &created["run_name"]), (&json!("7"), &json!("run")));
    let batches = server.of("runs/log-batch");
    let params = batches[0]["params"].as_array().unwrap();
    for (key, value) in [("beta", "0.1"), ("learning_rate", "1e-6"), ("order", "shuffled"), ("quiet", "true")]
    {
        assert!(params.contains(&json!({ "key": key, "value": value })), "{key} in {params:?}");
    }
    assert_eq!(server.statuses(), ["FINISHED"]);
    let before = server.requests().len();
    train(&place, &format!("{}#a & b", server.address), &[]).good();
    assert_eq!(server.requests().len(), before, "there was nothing to send");
}

/// One run there, however often it is interrupted here; steps that are computed again are not sent again.
#[test]
fn a_run_that_goes_on_goes_on_there() {
    let place = Place::new();
    let server = Server::new(listener(), |_| Answer::Good);
    train(&place, &server.address, &["--stop-after", "5"]).good();
    assert_eq!(server.points().last_key_value().unwrap().0.1, 5);
    train(&place, &server.address, &["--keep", "3"]).good();
    assert_eq!(server.of("runs/create").len(), 1);
    assert_eq!(server.statuses(), ["KILLED", "RUNNING", "FINISHED"]);
    server.has_all(&place.path("run"));
    let before = server.points();
    // As if killed after the checkpoint of step 10.
    fs::remove_dir_all(place.path("run/final")).unwrap();
    train(&place, &server.address, &[]).good();
    assert_eq!(server.points(), before);
    // Nothing is known there of a run that another directory refuses.
    let calls = server.requests().len();
    train(&place, &server.address, &["--beta", "0.3"]).failed(1, &["beta"]);
    assert_eq!(server.requests().len(), calls);
    // Another experiment gets all of it.
    train(&place, &format!("{}#other", server.address), &[]).good();
    assert_eq!(server.of("runs/create").len(), 2);
}

/// A server that takes connections and says nothing: the run ends well, and its points arrive when it is back.
#[test]
fn a_silent_server_stops_nothing() {
    let place = Place::new();
    let listener = listener();
    let ran = train(&place, &to(&listener), &[]).good();
    let count = lines(&place.path("run/metrics.jsonl")).len();
    let said = format!("{count} of the lines of metrics.jsonl have not reached");
    assert!(ran.stderr().contains(&said), "{}", ran.stderr());
    let weights = fs::read(place.path("run/final/model.safetensors")).unwrap();
    let server = Server::new(listener, |_| Answer::Good);
    let ran = train(&place, &server.address, &[]).good();
    assert_eq!(ran.stderr(), "");
    server.has_all(&place.path("run"));
    assert_eq!(server.statuses(), ["FINISHED"]);
    assert!(fs::read(place.path("run/final/model.safetensors")).unwrap() == weights);
}

/// Who is to log in is told how, and what logs in is written nowhere.
#[test]
fn credentials_come_from_the_environment() {
    let place = Place::new();
    let server = Server::new(listener(), |earlier| match earlier {
        0 => Answer::Status(401),
        _ => Answer::Good,
    });
    let ran = train(&place, &server.address, &[]).good();
    assert_eq!(ran.stderr().matches("MLFLOW_TRACKING_USERNAME").count(), 1, "{}", ran.stderr());
    assert_eq!(server.requests().len(), 1);
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    let files = ["--model", &model, "--data", &data, "--eval-data", &data, "--log-to", &server.address];
    let mut command = place.temper(WORDS.split(' ').chain(files));
    command.env("MLFLOW_TRACKING_USERNAME", "me").env("MLFLOW_TRACKING_PASSWORD", "secret");
    let output = command.output().unwrap();
    assert!(output.status.success());
    let requests = server.requests();
    assert!(
        requests[1..].iter().all(|request| request.authorization.as_deref() == Some("Basic bWU6c2VjcmV0"))
    );
    server.has_all(&place.path("run"));
    let written = contents(&place.path("run")).into_iter().map(|(_, bytes)| bytes).chain([output.stderr]);
    for bytes in written {
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains("secret") && !text.contains("bWU6c2VjcmV0"), "{text}");
    }
}

#[test]
fn what_is_no_address_is_wrong_usage() {
    let place = Place::new();
    for (value, said) in [
        ("wandb", "expected mlflow=http://HOST:PORT"),
        ("mlflow=localhost:5000", "expected mlflow=http://HOST:PORT"),
        ("mlflow=https://localhost", "https is not built in"),
        ("mlflow=http://me:secret@localhost", "MLFLOW_TRACKING_PASSWORD"),
    ] {
        train(&place, value, &[]).failed(2, &["--log-to", said]);
    }
}
