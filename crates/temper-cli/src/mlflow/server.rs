//! The few calls of MLflow's REST API that a run needs.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body};

/// After how long a request is given up.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Most letters of a server's message that are shown.
const SHOWN: usize = 300;

/// Why a call did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// It may succeed later.
    Lost(String),
    /// It will not.
    Refused {
        /// MLflow's name of the error.
        code: String,
        /// What is wrong.
        message: String,
    },
}

impl Failure {
    /// That something on this machine is wrong.
    pub fn here(message: String) -> Failure {
        Failure::Refused { code: String::new(), message }
    }
}

/// What may be wrong when a server lets nobody in.
const LOGIN: &str = " (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of the \
    environment log in)";

/// A tracking server.
pub struct Server {
    agent: Agent,
    uri: String,
    authorization: Option<String>,
}

impl Server {
    /// With the name and password, or the token, that MLflow's own client reads from the environment.
    pub fn new(uri: &str) -> Server {
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(TIMEOUT));
        let agent = Agent::new_with_config(config.proxy(None).max_redirects(0).build());
        Server { agent, uri: uri.to_owned(), authorization: authorization() }
    }

    /// The number of an experiment, which is made when there is none of this name.
    pub fn experiment(&self, name: &str) -> Result<String, Failure> {
        let found = || -> Result<String, Failure> {
            let request = self.agent.get(self.address("experiments/get-by-name"));
            let request = request.query("experiment_name", name);
            let answer = answer(match &self.authorization {
                Some(authorization) => request.header("Authorization", authorization).call(),
                None => request.call(),
            })?;
            text(&answer["experiment"]["experiment_id"])
        };
        match found() {
            Err(Failure::Refused { code, .. }) if code == "RESOURCE_DOES_NOT_EXIST" => {
                let made = self.post("experiments/create", &json!({ "name": name }));
                // Another run may have made it meanwhile.
                made.and_then(|made| text(&made["experiment_id"])).or_else(|_| found())
            }
            found => found,
        }
    }

    /// Begins a run, and gives its id.
    pub fn create_run(&self, run: &Value) -> Result<String, Failure> {
        text(&self.post("runs/create", run)?["run"]["info"]["run_id"])
    }

    /// Sends one call's object.
    pub fn post(&self, call: &str, object: &Value) -> Result<Value, Failure> {
        let request = self.agent.post(self.address(call)).header("Content-Type", "application/json");
        let request = match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization),
            None => request,
        };
        answer(request.send(object.to_string()))
    }

    fn address(&self, call: &str) -> String {
        format!("{}/api/2.0/mlflow/{call}", self.uri)
    }
}

/// As MLflow's client: name and password before the token.
fn authorization() -> Option<String> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    match (variable("MLFLOW_TRACKING_USERNAME"), variable("MLFLOW_TRACKING_PASSWORD")) {
        (Some(name), Some(password)) => {
            Some(format!("Basic {}", STANDARD.encode(format!("{name}:{password}"))))
        }
        _ => variable("MLFLOW_TRACKING_TOKEN").map(|token| format!("Bearer {token}")),
    }
}

/// The object that was answered.
fn answer(response: Result<Response<Body>, ureq::Error>) -> Result<Value, Failure> {
    let mut response = response.map_err(|error| match error {
        ureq::Error::Http(_) | ureq::Error::BadUri(_) => Failure::here(error.to_string()),
        ureq::Error::Io(error) => Failure::Lost(error.to_string()),
        ureq::Error::Timeout(_) => Failure::Lost("no answer".into()),
        error => Failure::Lost(error.to_string()),
    })?;
    let status = response.status().as_u16();
    let body = response.body_mut().read_to_string().map_err(|error| Failure::Lost(error.to_string()))?;
    let value: Value = serde_json::from_str(&body).unwrap_or_default();
    match status {
        200 if value.is_object() => Ok(value),
        200 => Err(Failure::here("its answer is not MLflow's".into())),
        408 | 429 | 500.. => Err(Failure::Lost(format!("status {status}"))),
        _ => {
            let code = value["error_code"].as_str().unwrap_or_default().to_owned();
            let said: String = value["message"].as_str().unwrap_or(&body).chars().take(SHOWN).collect();
            let login = if [401, 403].contains(&status) { LOGIN } else { "" };
            let message = format!("status {status}: {}{login}", said.trim());
            Err(Failure::Refused { code, message })
        }
    }
}

fn text(value: &Value) -> Result<String, Failure> {
    value.as_str().map(str::to_owned).ok_or_else(|| Failure::here("its answer is not MLflow's".into()))
}
