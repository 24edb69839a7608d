//! `temper chat`.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use signal_hook::consts::SIGINT;
use signal_hook::flag;
use temper::generate::Options;
use temper::text::{Message, Role, Variables};

use super::generate::{Writer, how};
use crate::args::Chat;
use crate::output::{of_library, say};

const HELP: &str = "/reset forgets the conversation, /system TEXT sets the system message, /quit ends (or Ctrl-D); Ctrl-C ends an answer";

/// Talks until the end of input.
pub fn run(options: &Chat) -> Result<()> {
    let cpu = options.compute.device()?;
    cpu.install(|| {
        let adapters = options.adapter.open()?;
        let model = options.model.open(adapters.as_ref())?;
        model.processor.chat_template()?;
        let decoder = model.decoder(&cpu, adapters.as_ref(), options.adapter.quantize)?;
        let stop = interrupted()?;
        let writer = Writer { cpu: &cpu, decoder: &decoder, processor: &model.processor, stop: &stop };
        let system = options.system.as_ref().map(|text| Message::new(Role::System, text));
        let mut conversation = Conversation { system, turns: Vec::new() };
        let mut input = Input::new()?;
        say("chat", HELP);
        let how = how(&options.sampling, &model)?;
        while let Some(line) = input.line()? {
            // What came before this line ends no answer to it.
            stop.store(false, Ordering::Relaxed);
            match line.trim() {
                "" => {}
                "/quit" => break,
                command if command.starts_with('/') => conversation.command(command),
                text => conversation.answer(text, &writer, &how)?,
            }
        }
        Ok(())
    })
}

/// Becomes true at Ctrl-C, which ends an answer; a second one while it is true ends the program.
fn interrupted() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, Arc::clone(&stop))
        .and_then(|_| flag::register(SIGINT, Arc::clone(&stop)))
        .context("cannot listen for signals")?;
    Ok(stop)
}

/// What has been said.
struct Conversation {
    system: Option<Message>,
    turns: Vec<Message>,
}

impl Conversation {
    fn command(&mut self, command: &str) {
        match command.split_once(char::is_whitespace).unwrap_or((command, "")) {
            ("/reset", "") => self.turns.clear(),
            ("/system", "") => self.system = None,
            ("/system", text) => self.system = Some(Message::new(Role::System, text.trim())),
            _ => say("chat", HELP),
        }
    }

    /// Answers a message. What cannot be answered is said and forgotten.
    fn answer(&mut self, text: &str, writer: &Writer<'_>, how: &Options) -> Result<()> {
        self.turns.push(Message::new(Role::User, text));
        let messages: Vec<Message> = self.system.iter().chain(&self.turns).cloned().collect();
        let prompt = writer.processor.chat(&messages, &Variables::new()).map_err(Into::into);
        match prompt.and_then(|prompt| writer.stream(prompt, how)) {
            Ok(answer) => self.turns.push(Message::new(Role::Assistant, answer.text)),
            Err(error) if of_library(&error).is_some() => {
                self.turns.pop();
                say(
                    "chat",
                    format!(
                        "{error}; /reset forgets the conversation, /system TEXT changes its system message"
                    ),
                );
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Lines from a terminal with editing and a history, or from a pipe.
enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe,
}

impl Input {
    fn new() -> Result<Input> {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            let editor = DefaultEditor::new().context("cannot use the terminal")?;
            return Ok(Input::Terminal(Box::new(editor)));
        }
        Ok(Input::Pipe)
    }

    /// The next line; none at the end.
    fn line(&mut self) -> Result<Option<String>> {
        match self {
            Input::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line).context("cannot keep the line")?;
                    Ok(Some(line))
                }
                // Ctrl-C takes back what was written.
                Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
                Err(ReadlineError::Eof) => Ok(None),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Input::Pipe => {
                let mut line = String::new();
                let length = std::io::stdin().read_line(&mut line).context("cannot read standard input")?;
                Ok((length > 0).then_some(line))
            }
        }
    }
}
