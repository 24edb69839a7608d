//! What `manifest.json` says of a run.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use std::path::Path;
use temper::data::Dataset;
use temper::parallel::Ranks;
use temper::train::directory;
use temper_kernels::Cpu;

use crate::args::Scope;
use crate::config::{Settings, flag};

/// The manifest of a run; `content` are the hashes of what it reads, and its arithmetic.
pub fn manifest(
    settings: &Settings,
    content: Map<String, Value>,
    date: DateTime<Utc>,
    cpu: &Cpu,
    ranks: &Ranks,
) -> Value {
    let deciding = settings.list.iter().filter(|setting| Scope::of(&setting.key) == Scope::Numbers);
    let deciding = deciding.filter(|setting| setting.value.is_some());
    let mut run: Map<String, Value> = deciding.map(|setting| (setting.key.clone(), setting.json())).collect();
    run.insert("verb".into(), json!(settings.verb));
    run.extend(content);
    let with_origin = settings.list.iter().map(|setting| {
        (setting.key.clone(), json!({ "value": setting.json(), "origin": setting.origin.name() }))
    });
    json!({
        "temper": env!("CARGO_PKG_VERSION"),
        "verb": settings.verb,
        "run": run,
        "settings": with_origin.collect::<Map<_, _>>(),
        "hardware": {
            "processor": processor_name(),
            "threads": cpu.threads(),
            "processes": ranks.size(),
            "instruction_set": Cpu::instruction_set(cpu.precision()),
            "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        },
        "date": date.to_rfc3339_opts(SecondsFormat::Secs, true),
    })
}

/// Options that shape what a run leaves and that the finished run in a directory had otherwise: now they change nothing.
pub fn without_effect(settings: &Settings, out: &Path) -> Option<Vec<String>> {
    let manifest = directory::manifest(out)?;
    let shapes = |key: &str| key != "parallel" && Scope::of(key) == Scope::Course;
    let differs = |key: &str, now: Value| manifest["settings"][key]["value"] != now;
    let late = settings.list.iter().filter(|it| shapes(&it.key) && differs(&it.key, it.json()));
    Some(late.map(|setting| format!("`{}`", flag(&setting.key))).collect())
}

/// What became of the data, for the manifest.
pub fn ledger(data: &Dataset, held_out: Option<&Dataset>) -> Value {
    let data = [("data", Some(data)), ("eval_data", held_out)];
    data.into_iter().filter_map(|(name, data)| Some((name.to_owned(), data?.ledger.to_json()))).collect()
}

/// The date of the run in a directory, so that templates see the same one when it goes on; else now. On all ranks what it
/// is on the first.
pub fn date(out: &Path, ranks: &Ranks) -> DateTime<Utc> {
    let earlier = || {
        let manifest = directory::manifest(out)?;
        Some(DateTime::parse_from_rfc3339(manifest["date"].as_str()?).ok()?.to_utc())
    };
    let own = earlier().unwrap_or_else(Utc::now);
    let of_first = DateTime::parse_from_rfc3339(&ranks.from_first(&own.to_rfc3339()));
    of_first.map_or(own, |date| date.to_utc())
}

/// The processor's name where the system tells it.
fn processor_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
