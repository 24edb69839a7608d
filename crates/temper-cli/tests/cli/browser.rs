//! A real browser, where there is a Chromium: driven over its debugging pipe, which needs no library.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::Place;

/// Long enough on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// One page in a browser of its own.
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    session: Value,
    number: u64,
    /// What the page's console had to say, errors of the page among it.
    pub said: Vec<Value>,
}

impl Browser {
    /// Opens a page; none where no Chromium is installed, which is said.
    pub fn open(place: &Place, address: &str) -> Option<Browser> {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let Some(name) = names.iter().find(|name| Command::new(name).arg("--version").output().is_ok())
        else {
            let _ = writeln!(std::io::stderr(), "skipped: there is no Chromium to open the page with");
            return None;
        };
        let profile = place.path("profile").display().to_string();
        // The pipe is at 3 and 4; a shell puts it there.
        let flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe";
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec {name} {flags} --user-data-dir=\"$0\" 3<&0 4>&1"), &profile])
            .env("HOME", place.path("home"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut browser =
            Browser { child, commands, answers, session: Value::Null, number: 0, said: Vec::new() };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attach = json!({ "targetId": target, "flatten": true });
        browser.session = browser.call("Target.attachToTarget", attach)["sessionId"].clone();
        for domain in ["Runtime.enable", "Log.enable", "Page.enable"] {
            browser.call(domain, json!({}));
        }
        browser.call("Page.navigate", json!({ "url": address }));
        Some(browser)
    }

    /// The value of an expression in the page; none where the page makes room for another just then.
    pub fn value(&mut self, expression: &str) -> Value {
        const NO_PAGE: i64 = -32000;
        let parameters = json!({ "expression": expression, "returnByValue": true });
        match self.try_call("Runtime.evaluate", parameters) {
            Ok(answer) => answer["result"]["value"].clone(),
            Err(error) if error["code"] == NO_PAGE => Value::Null,
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until an expression is true in the page.
    pub fn wait(&mut self, expression: &str) {
        let begun = Instant::now();
        while self.value(expression) != true {
            let page = || "document.body.innerText";
            assert!(begun.elapsed() < PATIENCE, "{expression}: {}\n{:?}", self.value(page()), self.said);
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.try_call(method, parameters).unwrap()
    }

    /// What the browser answers, or its error.
    fn try_call(&mut self, method: &str, parameters: Value) -> Result<Value, Value> {
        self.number += 1;
        let mut command = json!({ "id": self.number, "method": method, "params": parameters });
        if !self.session.is_null() {
            command["sessionId"] = self.session.clone();
        }
        write!(self.commands, "{command}\0").unwrap();
        loop {
            let mut bytes = Vec::new();
            assert!(self.answers.read_until(0, &mut bytes).unwrap() > 0, "the browser ended");
            bytes.pop();
            let mut message: Value = serde_json::from_slice(&bytes).unwrap();
            if message["id"] == self.number {
                let error = message["error"].take();
                return if error.is_null() { Ok(message["result"].take()) } else { Err(error) };
            }
            let events = ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"];
            if events.iter().any(|event| message["method"] == *event) {
                self.said.push(message);
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
