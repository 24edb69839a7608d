//! From arguments and `--config FILE` to options, and where each value came from.
//!
//! The file's keys are the verb's options. They are handed to the parser as arguments before the user's own, so
//! that both go through the same checks and the user's win.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use serde_json::{Value, json};
use toml::de::{DeTable, DeValue};

use crate::args::{Cli, Method};
use crate::output::{say, warn};

/// Characters of a line of settings.
const LINE: usize = 90;

/// Options that Transformers, TRL and PEFT call otherwise.
const ELSEWHERE: [(&str, &str); 16] = [
    ("bf16", "dtype"),
    ("dataset_name", "data"),
    ("load_in_4bit", "quantize"),
    ("load_in_8bit", "quantize"),
    ("lora_rank", "lora_r"),
    ("lora_target_modules", "lora_target"),
    ("lr", "learning_rate"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("max_seq_length", "max_length"),
    ("model_name_or_path", "model"),
    ("num_train_epochs", "epochs"),
    ("output_dir", "out"),
    ("per_device_train_batch_size", "batch_size"),
    ("ref_model", "reference"),
    ("save_total_limit", "keep"),
    ("use_peft", "method"),
];

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Default,
    ConfigFile,
    Flag,
}

impl Origin {
    /// As it is printed and kept in the manifest.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Default => "default",
            Origin::ConfigFile => "config file",
            Origin::Flag => "flag",
        }
    }
}

/// One option's value.
#[derive(Debug)]
pub struct Setting {
    /// The option's name in snake case.
    pub key: String,
    /// As it was written; none for an option that has no value.
    pub value: Option<String>,
    /// Where the value came from.
    pub origin: Origin,
}

impl Setting {
    /// The value as JSON: true, false, or a number if it is one, in one form, so that `1` and `1.0` are equal.
    pub fn json(&self) -> Value {
        let Some(text) = &self.value else { return Value::Null };
        if let Ok(flag) = text.parse::<bool>() {
            return flag.into();
        }
        if let Ok(whole) = text.parse::<u64>() {
            return whole.into();
        }
        match text.parse::<f64>() {
            Ok(whole) if (0.0..1e15).contains(&whole) && whole.fract() == 0.0 => (whole as u64).into(),
            Ok(number) if number.is_finite() => number.into(),
            _ => json!(text),
        }
    }
}

/// The verb's options in the order of its help.
#[derive(Debug)]
pub struct Settings {
    /// The verb.
    pub verb: String,
    /// All its options.
    pub list: Vec<Setting>,
}

impl Settings {
    fn new(command: &Command, matches: &ArgMatches, arguments: &[OsString], keys: &[Key]) -> Settings {
        let value = |id: &str| {
            let words = matches.get_raw(id)?.map(|word| word.to_string_lossy().into_owned());
            Some(words.collect::<Vec<_>>().join(" "))
        };
        let origin = |id: &str| {
            if is_given(arguments, id) {
                Origin::Flag
            } else if keys.iter().any(|key| key.name == id) {
                Origin::ConfigFile
            } else {
                Origin::Default
            }
        };
        let options = command.get_arguments().map(|argument| argument.get_id().as_str());
        let setting = |id: &str| Setting { key: id.to_owned(), value: value(id), origin: origin(id) };
        let list = options.filter(|id| *id != "help").map(setting).collect();
        Settings { verb: command.get_name().to_owned(), list }
    }

    /// Says every value and where it came from.
    pub fn say(&self) {
        let shown = self.list.iter().filter_map(|setting| {
            let value = setting.value.as_ref().filter(|value| *value != "false")?;
            Some(format!("{} {value} ({})", setting.key, setting.origin.name()))
        });
        let mut lines: Vec<String> = Vec::new();
        for setting in shown {
            match lines.last_mut() {
                Some(line) if line.len() + setting.len() <= LINE => *line += &format!("   {setting}"),
                _ => lines.push(setting),
            }
        }
        say("settings", lines.join("\n"));
    }

    /// Enters the value of an option whose default depends on the model or the machine.
    pub fn resolve(&mut self, key: &str, value: impl ToString) {
        if let Some(setting) = self.list.iter_mut().find(|setting| setting.key == key) {
            setting.value = Some(value.to_string());
        }
    }
}

/// A key of a file of options.
#[derive(Debug, Clone)]
pub struct Key {
    /// The option's name in snake case.
    pub name: String,
    /// As the option takes it.
    pub value: String,
    /// Where it stands in the file.
    pub line: usize,
}

/// All verbs and options. A negative number is a value, to be refused as such.
fn command() -> Command {
    let mut command = Cli::command().mut_subcommands(|verb| verb.allow_negative_numbers(true));
    command.build();
    command
}

/// Parses the command line and the file that its `--config` names.
pub fn parse(arguments: Vec<OsString>) -> Result<(Cli, Settings), clap::Error> {
    let command = command();
    let first = arguments.get(1).and_then(|verb| command.find_subcommand(verb));
    // A verb may take another with its options: `plan sft`.
    let inner = first.and_then(|first| Some((first, find_inner(first, &arguments)?)));
    let words = inner.map_or(2, |(_, at)| at + 1);
    let inner = inner.and_then(|(first, at)| first.find_subcommand(&arguments[at]));
    let Some(verb) = inner.or(first).cloned() else { return Err(without_verb(command, arguments)) };
    let file = is_option(&verb, "config").then(|| values_of(&arguments, "config").pop()).flatten();
    let keys = match &file {
        Some(file) => read(Path::new(file), &verb)?,
        None => Vec::new(),
    };
    let (program_and_verb, own) = arguments.split_at(words);
    parse_both(command, &verb, program_and_verb, file.as_deref().map(Path::new), keys, own)
}

/// Where the verb inside a verb stands: behind options of the outer one, and their values.
fn find_inner(outer: &Command, arguments: &[OsString]) -> Option<usize> {
    let takes_value = |word: &str| {
        let named =
            |argument: &&Arg| argument.get_long().is_some_and(|long| word.strip_prefix("--") == Some(long));
        outer.get_arguments().find(named).is_some_and(|argument| argument.get_action().takes_values())
    };
    let mut at = 2;
    while let Some(word) = arguments.get(at) {
        match word.to_str() {
            Some(word) if word.starts_with('-') => at += if takes_value(word) { 2 } else { 1 },
            _ => return outer.find_subcommand(word).map(|_| at),
        }
    }
    None
}

/// Parses a verb's options that all stand in a file, with their lines.
pub fn parse_keys(verb: &str, file: &Path, keys: Vec<Key>) -> Result<(Cli, Settings), clap::Error> {
    let mut command = command();
    let Some(found) = command.find_subcommand(verb).cloned() else {
        return Err(command.error(ErrorKind::InvalidSubcommand, format!("there is no verb `{verb}`")));
    };
    keys.iter().try_for_each(|key| check(&found, file, key))?;
    parse_both(command, &found, &["temper".into(), verb.into()], Some(file), keys, &[])
}

/// Parses the keys of a file and then the user's own arguments.
fn parse_both(
    mut command: Command,
    verb: &Command,
    program_and_verb: &[OsString],
    file: Option<&Path>,
    mut keys: Vec<Key>,
    own: &[OsString],
) -> Result<(Cli, Settings), clap::Error> {
    // What is given as an option wins, also over keys that exclude it, whichever of the two says so.
    let excludes = |one: &Arg, other: &Arg| {
        verb.get_arg_conflicts_with(one).iter().any(|argument| argument.get_id() == other.get_id())
    };
    keys.retain(|key| {
        let Some(own_of_key) = verb.get_arguments().find(|argument| argument.get_id() == key.name.as_str())
        else {
            return true;
        };
        let winner = verb.get_arguments().find(|argument| {
            is_given(own, argument.get_id().as_str())
                && (excludes(own_of_key, argument) || excludes(argument, own_of_key))
        });
        if let Some(winner) = winner {
            let (key, winner) = (&key.name, flag(winner.get_id().as_str()));
            warn(format!("the key `{key}` does not count beside {winner}"));
        }
        winner.is_none()
    });
    let from_file = keys.iter().filter_map(|key| match (is_flag(verb, &key.name), key.value.as_str()) {
        (true, "false") => None,
        (true, _) => Some(flag(&key.name).into()),
        (false, value) => Some(format!("{}={value}", flag(&key.name)).into()),
    });
    let all: Vec<OsString> = program_and_verb.iter().cloned().chain(from_file).chain(own.to_vec()).collect();
    let matches = command.try_get_matches_from_mut(all).map_err(|error| match file {
        Some(file) => in_file(error, verb, file, own, &keys),
        None => with_our_name(error, verb),
    })?;
    let cli = Cli::from_arg_matches(&matches)?;
    let mut of_verb = &matches;
    while let Some((_, matches)) = of_verb.subcommand() {
        of_verb = matches;
    }
    warn_of_repeated(verb, own);
    let settings = Settings::new(verb, of_verb, own, &keys);
    let without = is_option(verb, "method") && of_verb.get_one::<Method>("method") == Some(&Method::Full);
    let given = |setting: &&Setting| setting.origin != Origin::Default;
    // `--method` itself says that there are none.
    let of_adapters = |key: &str| {
        let heading =
            verb.get_arguments().find(|argument| argument.get_id() == key).map(Arg::get_help_heading);
        heading == Some(Some("LoRA")) && key != "method"
    };
    let given = settings.list.iter().filter(given).find(|setting| of_adapters(&setting.key));
    if let Some(setting) = given.filter(|_| without) {
        let message = match (setting.origin, file) {
            (Origin::ConfigFile, Some(file)) => {
                format!("`{}`: key `{}` needs `--method lora`", file.display(), setting.key)
            }
            _ => format!("{} needs `--method lora`", flag(&setting.key)),
        };
        return Err(verb.clone().error(ErrorKind::MissingRequiredArgument, message));
    }
    Ok((cli, settings))
}

/// The last of several values wins, as when a script adds its own; nobody should believe that all count.
fn warn_of_repeated(verb: &Command, own: &[OsString]) {
    for argument in verb.get_arguments().filter(|argument| matches!(argument.get_action(), ArgAction::Set)) {
        let id = argument.get_id().as_str();
        let mut values = values_of(own, id);
        if let Some(last) = values.pop()
            && values.iter().any(|value| *value != last)
        {
            let times = values.len() + 1;
            warn(format!("{} is given {times} times: `{}` counts", flag(id), last.display()));
        }
    }
}

/// Help, version, or the error of a command line that does not begin with a verb.
fn without_verb(command: Command, arguments: Vec<OsString>) -> clap::Error {
    let mut again = command.clone();
    match command.try_get_matches_from(arguments) {
        Err(error) => error,
        Ok(_) => again.error(ErrorKind::MissingSubcommand, "the verb comes first"),
    }
}

/// The keys of a config file, each one of the verb's options.
fn read(file: &Path, verb: &Command) -> Result<Vec<Key>, clap::Error> {
    let failed = |message: String| verb.clone().error(ErrorKind::InvalidValue, message);
    let text = std::fs::read_to_string(file)
        .map_err(|error| failed(format!("cannot read `{}`: {error}", file.display())))?;
    let table = DeTable::parse(&text).map_err(|error| {
        failed(format!("`{}` is not TOML: {}", file.display(), error.to_string().trim_end()))
    })?;
    let mut keys = Vec::new();
    for (name, value) in table.get_ref() {
        let line = 1 + text[..name.span().start].matches('\n').count();
        let mut key = Key { name: name.get_ref().to_string(), value: String::new(), line };
        check(verb, file, &key)?;
        let wrong =
            |what| failed(format!("`{}` line {line}: key `{}`: {what}", file.display(), name.get_ref()));
        match (is_flag(verb, &key.name), matches!(value.get_ref(), DeValue::Boolean(_))) {
            (true, false) => return Err(wrong("expected true or false")),
            (false, true) => return Err(wrong("expected a string or a number")),
            _ => key.value = scalar(value.get_ref()).map_err(wrong)?,
        }
        keys.push(key);
    }
    Ok(keys)
}

/// A TOML value as an option takes it, or what is wrong with it.
pub fn scalar(value: &DeValue<'_>) -> Result<String, &'static str> {
    match value {
        DeValue::Boolean(value) => Ok(value.to_string()),
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Ok(number.to_string()),
            Err(_) => Err("the number is too large"),
        },
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        // Names, which options have behind one another: `q_proj,v_proj`.
        DeValue::Array(names) if names.iter().all(|name| name.get_ref().is_str()) => {
            Ok(names.iter().filter_map(|name| name.get_ref().as_str()).collect::<Vec<_>>().join(","))
        }
        _ => Err("expected a string or a number"),
    }
}

/// That a key is one of the verb's options.
fn check(verb: &Command, file: &Path, key: &Key) -> Result<(), clap::Error> {
    if key.name != "config" && is_option(verb, &key.name) {
        return Ok(());
    }
    let message = format!("`{}` line {}: {}", file.display(), key.line, unknown(verb, &key.name));
    Err(verb.clone().error(ErrorKind::InvalidValue, message))
}

/// What is wrong with a key, and the nearest one that is right.
fn unknown(verb: &Command, name: &str) -> String {
    let message = format!("`temper {}` reads no key `{}`", verb.get_name(), name.escape_debug());
    if let Some(ours) = our_name(verb, name) {
        return format!("{message}; it is `{ours}` here");
    }
    let options = verb.get_arguments().map(|argument| argument.get_id().as_str());
    let options = options.filter(|id| !["help", "config"].contains(id));
    match nearest(options, name) {
        Some(nearest) => format!("{message}; the nearest is `{nearest}`"),
        None => message,
    }
}

/// What an option of another tool is called here, where the verb has it.
fn our_name(verb: &Command, name: &str) -> Option<&'static str> {
    let (_, ours) = ELSEWHERE.iter().find(|(other, _)| *other == name)?;
    is_option(verb, ours).then_some(*ours)
}

/// The parser's error, with our name for an option of another tool in place of the most similar one.
fn with_our_name(mut error: clap::Error, verb: &Command) -> clap::Error {
    let option = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    let name = option.trim_start_matches('-').replace('-', "_");
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ours) = our_name(verb, &name)
    {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(flag(ours)));
        error.remove(ContextKind::Usage);
    }
    error
}

/// The word most like a name, if one is.
pub fn nearest<'a>(words: impl Iterator<Item = &'a str>, name: &str) -> Option<&'a str> {
    let similarity = |word: &str| strsim::jaro_winkler(word, name);
    words.max_by(|a, b| similarity(a).total_cmp(&similarity(b))).filter(|word| similarity(word) > 0.7)
}

/// The parser's error, with the place in the file if that is where the value stands.
fn in_file(error: clap::Error, verb: &Command, file: &Path, own: &[OsString], keys: &[Key]) -> clap::Error {
    let option = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    let option = option.split(' ').next().unwrap_or_default();
    let culprit = keys.iter().find(|key| flag(&key.name) == option && !is_given(own, &key.name));
    let Some(key) = culprit else { return error };
    let rendered = error.to_string();
    let first = rendered.lines().next().unwrap_or_default().trim_start_matches("error: ");
    verb.clone().error(error.kind(), format!("`{}` line {}: {first}", file.display(), key.line))
}

fn is_option(verb: &Command, id: &str) -> bool {
    id != "help" && verb.get_arguments().any(|argument| argument.get_id() == id)
}

/// Whether an option has no value: it is given or not.
fn is_flag(verb: &Command, id: &str) -> bool {
    let argument = verb.get_arguments().find(|argument| argument.get_id() == id);
    argument.is_some_and(|argument| !argument.get_action().takes_values())
}

/// `learning_rate` as `--learning-rate`.
pub fn flag(id: &str) -> String {
    format!("--{}", id.replace('_', "-"))
}

/// Whether the arguments hold an option.
fn is_given(arguments: &[OsString], id: &str) -> bool {
    let flag = flag(id);
    arguments.iter().any(|argument| option_value(argument, &flag).is_some())
}

/// The values of an option in the arguments; of several the last one counts.
fn values_of(arguments: &[OsString], id: &str) -> Vec<OsString> {
    let flag = flag(id);
    let given = arguments.iter().enumerate();
    let given = given.filter_map(|(at, argument)| Some((at, option_value(argument, &flag)?)));
    given
        .filter_map(|(at, inline)| inline.map(OsStr::to_owned).or_else(|| arguments.get(at + 1).cloned()))
        .collect()
}

/// Whether an argument is this flag, and the value behind its equals sign.
fn option_value<'a>(argument: &'a OsStr, flag: &str) -> Option<Option<&'a OsStr>> {
    let text = argument.to_str()?;
    let rest = text.strip_prefix(flag)?;
    if rest.is_empty() {
        return Some(None);
    }
    rest.strip_prefix('=').map(|value| Some(OsStr::new(value)))
}
