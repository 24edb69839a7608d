//! A folder of runs as it changes: which runs are there, what each came to, and what was added since.
//!
//! What is kept of a run does not grow with it: the last numbers, and how far its files were read. Curves are read
//! when somebody asks for them, and then only what is appended.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use chrono::DateTime;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use temper::train::directory::{self, Ended};

use super::curves;
use crate::report::metrics::Metrics;
use crate::report::page::rounded;
use crate::report::run::{names, natural};

/// Runs are looked for so deep below the folder, in so many places, and so many of them are followed.
const DEPTH: usize = 4;
const PLACES: usize = 20_000;
const RUNS: usize = 1_000;

/// How often new runs are looked for.
const SCAN: Duration = Duration::from_secs(4);

/// Bytes that are read at a time; a line that is longer is left out.
const CHUNK: usize = 1 << 20;

/// Bytes at the end of a file in which the last numbers are looked for.
const END: u64 = 512 << 10;

/// Bytes of new lines that are sent to whoever follows; of more, they are told to ask.
const PART: u64 = 64 << 10;

/// A manifest is no longer than this, nor what says how a run ended.
const MANIFEST: u64 = 4 << 20;
const SAID: u64 = 64 << 10;

/// A file that was written so lately is being written, where locks can be seen and where they cannot.
const LATELY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(120));

/// Steps whose mean time says how much time is left.
const PACE: usize = 32;

/// Columns of the metrics whose last values a list shows.
const LAST: [&str; 8] = [
    "loss",
    "eval_loss",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "mean_token_accuracy",
    "eval_mean_token_accuracy",
    "tokens_per_second",
    "num_tokens",
];

/// A folder, and the runs in it.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    runs: Vec<Watched>,
    scanned: Option<Instant>,
    refreshed: Option<Instant>,
}

/// A run.
#[derive(Debug, Clone)]
pub struct Watched {
    /// A hash of where it lies; names nothing but what was found.
    pub id: String,
    pub place: PathBuf,
    pub name: String,
    verb: String,
    planned: Option<u64>,
    manifest: Option<SystemTime>,
    /// Seconds since 1970.
    begun: i64,
    /// Of `metrics.jsonl`.
    pub read: FileRead,
    last: BTreeMap<&'static str, f64>,
    step: u64,
    /// Seconds of the last steps.
    pace: Vec<f64>,
    /// As it was last told.
    status: Value,
}

/// How far a file that grows was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileRead {
    /// Inode and time of birth: numbers of inodes come again.
    file: (u64, u128),
    /// How often it was found cut or replaced.
    cuts: u64,
    /// Bytes of whole lines.
    pub end: u64,
}

impl FileRead {
    /// Differs when what was read before counts no more.
    pub fn key(&self) -> String {
        let (inode, born) = self.file;
        format!("{inode}-{born}-{}", self.cuts)
    }
}

/// What became different.
#[derive(Debug)]
pub enum Change {
    /// Runs came or went.
    Runs(Value),
    /// New points of a run.
    Points(Value),
    /// A run's line in the list.
    Run(Value),
}

impl Folder {
    /// Nothing is read yet.
    pub fn new(root: PathBuf) -> Folder {
        Folder { root, runs: Vec::new(), scanned: None, refreshed: None }
    }

    /// Looks what became different, unless that was done less than so long ago.
    pub fn refresh(&mut self, at_most_every: Duration) -> Vec<Change> {
        if self.refreshed.is_some_and(|at| at.elapsed() < at_most_every) {
            return Vec::new();
        }
        let mut others = self.scanned.is_none_or(|at| at.elapsed() >= SCAN) && self.scan();
        let before = self.runs.len();
        self.runs.retain(|run| is_run(&run.place));
        others |= self.runs.len() < before;
        let locks = locked_inodes();
        let mut changes = Vec::new();
        for run in &mut self.runs {
            changes.extend(run.follow().map(Change::Points));
            let status = run.status(&self.root, locks.as_ref());
            if status != run.status {
                run.status = status.clone();
                changes.push(Change::Run(status));
            }
        }
        if others {
            changes.push(Change::Runs(self.list()));
        }
        self.refreshed = Some(Instant::now());
        changes
    }

    /// All runs' lines.
    pub fn list(&self) -> Value {
        self.runs.iter().map(|run| run.status.clone()).collect()
    }

    /// The run of an id.
    pub fn run(&self, id: &str) -> Option<Watched> {
        self.runs.iter().find(|run| run.id == id).cloned()
    }

    /// The verbs of all runs.
    pub fn verbs(&self) -> impl Iterator<Item = &str> + Clone {
        self.runs.iter().map(|run| run.verb.as_str()).filter(|verb| !verb.is_empty())
    }

    /// How many runs there are.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Looks for runs, and whether there are others than before.
    fn scan(&mut self) -> bool {
        let places = find(&self.root);
        self.scanned = Some(Instant::now());
        for run in &mut self.runs {
            run.read_manifest();
        }
        if places.iter().eq(self.runs.iter().map(|run| &run.place)) {
            return false;
        }
        let mut known: BTreeMap<PathBuf, Watched> =
            self.runs.drain(..).map(|run| (run.place.clone(), run)).collect();
        for (place, name) in places.iter().zip(names(&places)) {
            let mut run = known.remove(place).unwrap_or_else(|| Watched::new(&self.root, place));
            run.name = name;
            self.runs.push(run);
        }
        true
    }
}

impl Watched {
    fn new(root: &Path, place: &Path) -> Watched {
        let below = place.strip_prefix(root).unwrap_or(place);
        let hash = Sha256::digest(below.as_os_str().as_encoded_bytes());
        let mut run = Watched {
            id: temper::hex(&hash[..8]),
            place: place.to_owned(),
            name: String::new(),
            verb: String::new(),
            planned: None,
            manifest: None,
            begun: 0,
            read: FileRead::default(),
            last: BTreeMap::new(),
            step: 0,
            pace: Vec::new(),
            status: Value::Null,
        };
        run.read_manifest();
        run
    }

    /// Takes verb and length from the manifest when it is another one than before.
    fn read_manifest(&mut self) {
        let written = regular(&self.place.join(directory::MANIFEST)).and_then(|data| data.modified().ok());
        if written == self.manifest {
            return;
        }
        self.manifest = written;
        let run = crate::report::run::Run { manifest: manifest(&self.place), ..Default::default() };
        let date = DateTime::parse_from_rfc3339(run.manifest["date"].as_str().unwrap_or_default());
        self.begun = date.map_or(0, |date| date.timestamp());
        self.verb = run.verb().to_owned();
        self.planned = run.planned();
    }

    /// Reads what was added to the metrics: points that follow on all points before, if they are few.
    fn follow(&mut self) -> Option<Value> {
        let path = self.place.join(directory::METRICS);
        let data = regular(&path);
        let size = data.as_ref().map_or(0, Metadata::len);
        let file = data.map_or((0, 0), |data| (data.ino(), since_1970(data.created()).as_nanos()));
        if file != self.read.file || size < self.read.end {
            let cuts = if file == self.read.file { self.read.cuts + 1 } else { 0 };
            self.read = FileRead { file, cuts, end: 0 };
            self.last.clear();
            self.pace.clear();
            self.step = 0;
        }
        if size == self.read.end {
            return None;
        }
        let from = self.read.end;
        let at = from.max(size.saturating_sub(END));
        let mut metrics = Metrics::default();
        let end = read_lines(&path, at, size, &mut metrics).ok()?;
        self.read.end = end;
        self.take_last(&metrics);
        let follows = at == from && (1..=PART).contains(&(end - from));
        follows.then(|| {
            let file = self.read.key();
            json!({ "id": self.id, "file": file, "from": from, "end": end, "part": curves::of(metrics) })
        })
    }

    fn take_last(&mut self, metrics: &Metrics) {
        for name in LAST {
            if let Some(&(_, value)) = metrics.points(name).last() {
                self.last.insert(name, value);
            }
        }
        for name in ["loss", "eval_loss"] {
            let step = metrics.points(name).last().map_or(0, |point| point.0 as u64);
            self.step = self.step.max(step);
        }
        self.pace.extend(metrics.points("seconds").iter().map(|point| point.1));
        self.pace.drain(..self.pace.len().saturating_sub(PACE));
    }

    /// Its line in a list.
    fn status(&self, root: &Path, locks: Option<&BTreeSet<u64>>) -> Value {
        let state = self.state(locks);
        let ahead = self.planned.map(|planned| planned.saturating_sub(self.step) as f64);
        let left = ahead.filter(|_| state == "running" && !self.pace.is_empty());
        let left =
            left.map(|steps| (steps * self.pace.iter().sum::<f64>() / self.pace.len() as f64).round() as u64);
        let below = self.place.strip_prefix(root).unwrap_or(&self.place);
        let size = |path: &Path| regular(path).map_or(0, |data| data.len());
        json!({
            "id": self.id,
            "name": self.name,
            "folder": below.display().to_string(),
            "verb": self.verb,
            "state": state,
            "step": self.step,
            "planned": self.planned,
            "left": left,
            "last": self.last.iter().map(|(&name, &value)| (name, rounded(value))).collect::<BTreeMap<_, _>>(),
            "begun": self.begun,
            "file": self.read.key(),
            "end": self.read.end,
            "said": size(&self.place.join(directory::SAMPLES)) + log(&self.place).map_or(0, |log| size(&log)),
        })
    }

    /// How it ended, where it said so.
    pub fn ended(&self) -> Option<Ended> {
        let said = regular(&self.place.join(directory::ENDED)).is_some_and(|data| data.len() < SAID);
        if said { directory::ended(&self.place) } else { None }
    }

    /// A lock is only looked at, never taken: a run that begins at that moment must not find it taken. Where locks of
    /// others cannot be seen, as those of another machine, what is written says it.
    fn state(&self, locks: Option<&BTreeSet<u64>>) -> &'static str {
        if directory::is_finished(&self.place) {
            return "finished";
        }
        let lock = regular(&self.place.join(".lock")).map(|data| data.ino());
        let locked = locks.is_some_and(|locks| lock.is_some_and(|lock| locks.contains(&lock)));
        match self.ended().filter(|_| !locked) {
            Some(Ended::Failed(_)) => return "failed",
            Some(Ended::Stopped(_)) => return "stopped",
            None => {}
        }
        let lately = if locks.is_some() { LATELY.0 } else { LATELY.1 };
        let files = [directory::METRICS, directory::SAMPLES].map(|name| self.place.join(name));
        let age = |data: Metadata| data.modified().ok()?.elapsed().ok();
        let written = files.iter().filter_map(|path| regular(path).and_then(age)).any(|age| age < lately);
        if locked || written { "running" } else { "interrupted" }
    }
}

/// Places of runs, in order. Links are not followed, so that nothing outside is read.
fn find(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut seen = 0;
    let mut next = vec![(root.to_owned(), 0)];
    while let Some((place, depth)) = next.pop() {
        if is_run(&place) {
            found.push(place);
            continue;
        }
        let folders = fs::read_dir(&place).into_iter().flatten().flatten().take(PLACES - seen);
        for entry in folders {
            seen += 1;
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if depth < DEPTH && !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                next.push((entry.path(), depth + 1));
            }
        }
    }
    found.sort_by_cached_key(|path| natural(path));
    found.truncate(RUNS);
    found
}

fn is_run(place: &Path) -> bool {
    [directory::MANIFEST, directory::METRICS].iter().any(|name| regular(&place.join(name)).is_some())
}

fn since_1970(at: io::Result<SystemTime>) -> Duration {
    at.ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default()
}

/// What is known of a file that is one, and no link to one.
fn regular(path: &Path) -> Option<Metadata> {
    path.symlink_metadata().ok().filter(Metadata::is_file)
}

/// Adds the whole lines between two places of a file; where they end.
pub fn read_lines(path: &Path, from: u64, to: u64, metrics: &mut Metrics) -> io::Result<u64> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut file = file.take(to.saturating_sub(from));
    let (mut bytes, mut end) = (Vec::new(), from);
    loop {
        let wanted = (CHUNK - bytes.len()) as u64;
        let more = (&mut file).take(wanted).read_to_end(&mut bytes)?;
        let mut used = metrics.extend(&bytes);
        if used == 0 && bytes.len() == CHUNK {
            used = CHUNK;
        }
        end += used as u64;
        bytes.drain(..used);
        if more == 0 {
            return Ok(end);
        }
    }
}

/// The end of a file, of whole lines if there are any.
pub fn read_end(path: &Path, most: u64) -> Option<Vec<u8>> {
    let size = regular(path)?.len();
    let mut file = File::open(path).ok()?;
    let from = size.saturating_sub(most);
    file.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).ok()?;
    if from > 0 {
        let first = bytes.iter().position(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        bytes.drain(..first);
    }
    Some(bytes)
}

/// A run's manifest; null where it is none.
pub fn manifest(place: &Path) -> Value {
    let path = place.join(directory::MANIFEST);
    let size = regular(&path).map_or(u64::MAX, |data| data.len());
    let bytes = if size <= MANIFEST { fs::read(path).ok() } else { None };
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// What a run said, where a sweep kept it: beside its folder.
pub fn log(place: &Path) -> Option<PathBuf> {
    let name = place.file_name()?.to_string_lossy().into_owned();
    Some(place.with_file_name(name + ".log")).filter(|path| regular(path).is_some())
}

/// Files that anybody on this machine has locked, where the system says it.
fn locked_inodes() -> Option<BTreeSet<u64>> {
    let text = fs::read_to_string("/proc/locks").ok()?;
    let inode = |line: &str| {
        let place = line.split_whitespace().find(|word| word.matches(':').count() == 2)?;
        place.rsplit(':').next()?.parse().ok()
    };
    Some(text.lines().filter_map(inode).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(steps: std::ops::Range<u64>) -> String {
        steps.map(|step| format!("{{\"step\":{step},\"loss\":0.5,\"seconds\":2}}\n")).collect()
    }

    #[test]
    fn lines_are_read_in_parts_and_long_ones_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(directory::METRICS);
        let text = format!("{}{}\n{}{{\"step\":4", lines(1..3), "x".repeat(5 << 20), lines(3..4));
        fs::write(&path, &text).unwrap();
        let mut metrics = Metrics::default();
        let end = read_lines(&path, 0, u64::MAX, &mut metrics).unwrap();
        assert_eq!(end, text.len() as u64 - 9);
        assert_eq!(metrics.points("loss").iter().map(|point| point.0).collect::<Vec<_>>(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn parts_follow_on_each_other_until_a_file_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(directory::METRICS);
        fs::write(&path, lines(1..3)).unwrap();
        let mut run = Watched::new(folder.path(), folder.path());
        let first = run.follow().unwrap();
        fs::write(&path, lines(1..4) + "{\"step\":9").unwrap();
        let second = run.follow().unwrap();
        assert_eq!((&first["file"], &first["end"]), (&second["file"], &second["from"]));
        assert_eq!(second["part"]["columns"]["loss"]["x"], json!([3]));
        assert!(run.follow().is_none());
        fs::write(&path, lines(1..2)).unwrap();
        let cut = run.follow().unwrap();
        assert!(cut["file"] != second["file"] && cut["from"] == 0 && run.step == 1, "{cut}");
    }

    #[test]
    fn runs_are_found_below_but_not_through_links() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join(directory::METRICS), lines(1..2)).unwrap();
        for name in ["a", "sweep/runs/b", "a/inner", ".hidden", "1/2/3/4/5"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join(directory::METRICS), lines(1..2)).unwrap();
        }
        std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).unwrap();
        fs::create_dir(folder.path().join("fake")).unwrap();
        let fake = folder.path().join("fake/metrics.jsonl");
        std::os::unix::fs::symlink(outside.path().join(directory::METRICS), fake).unwrap();
        let expected = ["a", "sweep/runs/b"].map(|name| folder.path().join(name));
        assert_eq!(find(folder.path()), expected);
    }
}
