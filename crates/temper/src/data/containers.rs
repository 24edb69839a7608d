//! Rows of files: jsonl, json, csv, txt and parquet, the text kinds also compressed. Files are read as
//! streams: of text no file can make us hold more than one row, of parquet no more than a page of each column.

use std::cell::Cell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::cells;
use super::error::{Error, Place, Unit};

/// The longest line, item or document.
const ROW_LIMIT: u64 = 64 << 20;
/// Below this much, any rate of expansion is harmless.
const FREE_EXPANSION: u64 = 64 << 20;
/// Text compresses 3 to 20 times; deflate can expand 1,030 times and zstd far more.
const EXPANSION_RATE: u64 = 250;
const EXPANSION_LIMIT: u64 = 64 << 30;
const BYTE_ORDER_MARK: &str = "\u{feff}";
/// Files that Python's datasets puts beside data, to describe them.
const DESCRIBES: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
/// What we put behind the rows of a table.
const END: &str = "\u{1}end of table\u{1}";
const END_ROW: &[u8] = b"\n\x01end of table\x01";

/// Takes a row: a JSON object, or a string that is a document.
pub(super) type Take<'take> = dyn FnMut(Place, Value) -> Result<(), Error> + 'take;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Json,
    Csv,
    Text,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Gives every row of a file, or of the data files of a folder in the order of their names.
pub(super) fn read(path: &Path, take: &mut Take<'_>) -> Result<(), Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    if !fs::metadata(path).map_err(unreadable)?.is_dir() {
        let kind = kind(path).ok_or_else(|| Error::UnknownKind { path: path.to_owned() })?;
        return read_file(path, kind, take);
    }
    let (mut files, mut arrow) = (Vec::new(), None);
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        // Hidden files are some program's own, such as those that macOS puts beside others into archives.
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || !file.is_file() {
            continue;
        }
        match kind(&file) {
            Some(kind) => files.push((file, kind)),
            None if file.extension().is_some_and(|extension| extension == "arrow") => arrow = Some(file),
            None => {}
        }
    }
    // What only describes data is none, unless there is nothing else.
    let describes = |file: &Path| file.file_name().is_some_and(|name| DESCRIBES.iter().any(|it| name == *it));
    if files.iter().any(|(file, _)| !describes(file)) {
        files.retain(|(file, _)| !describes(file));
    } else if let Some(path) = arrow.or_else(|| files.first().map(|(file, _): &(PathBuf, _)| file.clone())) {
        return Err(Error::UnknownKind { path });
    }
    files.sort_by(|(left, _), (right, _)| left.cmp(right));
    for (file, kind) in files {
        read_file(&file, kind, take)?;
    }
    Ok(())
}

/// Whether a file is one document of text.
pub(super) fn is_document(path: &Path) -> bool {
    kind(path).is_some_and(|(kind, _)| kind == Kind::Text)
}

/// What a file is, by its name.
fn kind(path: &Path) -> Option<(Kind, Compression)> {
    let extension = |path: &Path| path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
    let (compression, inner) = match extension(path)?.as_str() {
        "gz" => (Compression::Gzip, path.with_extension("")),
        "zst" => (Compression::Zstd, path.with_extension("")),
        _ => (Compression::None, path.to_owned()),
    };
    let kind = match extension(&inner)?.as_str() {
        "jsonl" | "ndjson" | "json" => Kind::Json,
        "csv" => Kind::Csv,
        "txt" => Kind::Text,
        // Its footer is at the end, which a stream does not reach.
        "parquet" if compression == Compression::None => Kind::Parquet,
        _ => return None,
    };
    Some((kind, compression))
}

fn read_file(
    path: &Path,
    (kind, compression): (Kind, Compression),
    take: &mut Take<'_>,
) -> Result<(), Error> {
    if kind == Kind::Parquet {
        return parquet::read(path, take);
    }
    let mut source = Source::open(path, compression)?;
    match kind {
        Kind::Text => source.document(take),
        Kind::Csv => source.table(take),
        _ if source.begins_with(b'[')? => source.array(take),
        _ => source.lines(take),
    }
}

/// An open file of text.
struct Source {
    reader: Box<dyn BufRead>,
    file: Arc<Path>,
    /// Bytes that may still be read for the current row.
    allowance: Rc<Cell<u64>>,
}

impl Source {
    fn open(path: &Path, compression: Compression) -> Result<Self, Error> {
        let unreadable = |source| Error::Read { path: path.to_owned(), source };
        let read = Rc::new(Cell::new(0));
        let file =
            BufReader::new(Counted { inner: File::open(path).map_err(unreadable)?, read: Rc::clone(&read) });
        let plain: Box<dyn Read> = match compression {
            Compression::None => Box::new(file),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Compression::Zstd => {
                Box::new(zstd::stream::read::Decoder::with_buffer(file).map_err(unreadable)?)
            }
        };
        let allowance = Rc::new(Cell::new(ROW_LIMIT));
        let guard = Guard { inner: plain, compressed: read, expanded: 0, allowance: Rc::clone(&allowance) };
        Ok(Self { reader: Box::new(BufReader::with_capacity(1 << 16, guard)), file: path.into(), allowance })
    }

    fn place(&self, unit: Unit, number: usize) -> Place {
        Place { file: Arc::clone(&self.file), unit, number }
    }

    /// Whether the first character that is no space is this one. Takes a byte order mark away.
    fn begins_with(&mut self, expected: u8) -> Result<bool, Error> {
        let place = self.place(Unit::Line, 1);
        let beginning = self.reader.fill_buf().map_err(|error| failed(&place, error))?;
        let mark = if beginning.starts_with(BYTE_ORDER_MARK.as_bytes()) { BYTE_ORDER_MARK.len() } else { 0 };
        let first = beginning[mark..].iter().find(|byte| !byte.is_ascii_whitespace()).copied();
        self.reader.consume(mark);
        Ok(first == Some(expected))
    }

    fn lines(&mut self, take: &mut Take<'_>) -> Result<(), Error> {
        let mut line = Vec::new();
        for number in 1.. {
            let place = self.place(Unit::Line, number);
            line.clear();
            self.allowance.set(ROW_LIMIT);
            if self.reader.read_until(b'\n', &mut line).map_err(|error| failed(&place, error))? == 0 {
                break;
            }
            let text = utf8(&line, &place)?;
            if text.trim().is_empty() {
                continue;
            }
            let row = serde_json::from_str(text.trim_end()).map_err(|error| syntax(place.clone(), &error))?;
            take(place, row)?;
        }
        Ok(())
    }

    fn array(self, take: &mut Take<'_>) -> Result<(), Error> {
        let Source { reader, file, allowance } = self;
        let mut failure = None;
        let items = Items { file: &file, allowance: &allowance, take, failure: &mut failure };
        let mut json = serde_json::Deserializer::from_reader(reader);
        let read = items.deserialize(&mut json).and_then(|()| json.end());
        if let Some(failure) = failure {
            return Err(failure);
        }
        read.map_err(|error| {
            let place = Place { file: Arc::clone(&file), unit: Unit::Line, number: error.line() };
            if error.is_io() { failed(&place, error.into()) } else { syntax(place, &error) }
        })
    }

    fn table(self, take: &mut Take<'_>) -> Result<(), Error> {
        let Source { mut reader, file, allowance } = self;
        let at = |number| Place { file: Arc::clone(&file), unit: Unit::Line, number };
        let beginning = reader.fill_buf().map_err(|error| failed(&at(1), error))?;
        let newline = beginning.iter().position(|&byte| byte == b'\n');
        // Where lines end in CR LF, the library counts a record before it has passed the LF of the one before.
        let uncounted = newline.is_some_and(|at| beginning[..at].ends_with(b"\r")) as usize;
        let line = |position: Option<&csv::Position>| {
            position.map_or(1, |at| at.line() as usize + if at.record() > 0 { uncounted } else { 0 })
        };
        let broken = |error: csv::Error| {
            let place = at(line(error.position()));
            let reason = error.to_string();
            match error.into_kind() {
                csv::ErrorKind::Io(error) => failed(&place, error),
                csv::ErrorKind::Utf8 { err, .. } => Error::NotUtf8 { place, column: err.valid_up_to() + 1 },
                _ => Error::Syntax { place, column: None, reason },
            }
        };
        let reader = reader.chain(END_ROW);
        let mut table = csv::ReaderBuilder::new().flexible(true).from_reader(reader);
        let names = table.headers().map_err(broken)?.clone();
        let wrong = |number, reason| Error::Syntax { place: at(number), column: None, reason };
        // A last row of ours ends up inside a field whose quotes nobody closed.
        let open = |row: &csv::StringRecord| {
            row.iter().next_back().is_some_and(|last| last.ends_with(END) && (row.len() > 1 || last != END))
        };
        let mut seen = HashSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(*name)) {
            return Err(wrong(1, format!("two columns are called `{twice}`")));
        }
        if open(&names) {
            return Err(wrong(1, format!("the quotes of column {} are never closed", names.len())));
        }
        let mut row = csv::StringRecord::new();
        loop {
            allowance.set(ROW_LIMIT);
            if !table.read_record(&mut row).map_err(broken)? {
                return Ok(());
            }
            let number = line(row.position());
            if open(&row) {
                return Err(wrong(number, format!("the quotes of field {} are never closed", row.len())));
            }
            if row.len() == 1 && &row[0] == END {
                return Ok(());
            }
            if row.len() != names.len() {
                let reason =
                    format!("expected {} fields as in the first row, found {}", names.len(), row.len());
                return Err(wrong(number, reason));
            }
            let cells = names.iter().zip(&row).map(|(name, cell)| (name.to_owned(), Value::from(cell)));
            take_row(at(number), cells.collect(), take)?;
        }
    }

    fn document(&mut self, take: &mut Take<'_>) -> Result<(), Error> {
        let place = self.place(Unit::Line, 1);
        let mut bytes = Vec::new();
        self.reader.read_to_end(&mut bytes).map_err(|error| failed(&place, error))?;
        let text = utf8(&bytes, &place)?;
        take(place.clone(), Value::from(text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)))
    }
}

/// Gives a row of a table.
fn take_row(place: Place, mut row: Map<String, Value>, take: &mut Take<'_>) -> Result<(), Error> {
    if let Err(field) = cells::unfold(&mut row) {
        return Err(Error::NotJson { place, field: field.to_owned() });
    }
    take(place, Value::Object(row))
}

/// Reads a JSON array item by item; serde's own collections would read it whole.
struct Items<'read, 'take> {
    file: &'read Arc<Path>,
    allowance: &'read Cell<u64>,
    take: &'read mut Take<'take>,
    /// Why `take` refused an item: serde's error could only carry its text.
    failure: &'read mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for Items<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        for number in 1.. {
            self.allowance.set(ROW_LIMIT);
            let Some(item) = items.next_element()? else { break };
            let place = Place { file: Arc::clone(self.file), unit: Unit::Item, number };
            if let Err(failure) = (self.take)(place, item) {
                *self.failure = Some(failure);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// Counts the bytes read.
struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.read.set(self.read.get() + length as u64);
        Ok(length)
    }
}

/// Stops a reader that gives too much: for its compressed size, in all, or for one row.
struct Guard<R> {
    inner: R,
    compressed: Rc<Cell<u64>>,
    expanded: u64,
    allowance: Rc<Cell<u64>>,
}

#[derive(Debug, thiserror::Error)]
enum Excess {
    #[error("250 times its size")]
    Rate,
    #[error("64 GiB")]
    Total,
    #[error("the limit of a row")]
    Row,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.expanded += length as u64;
        if self.expanded > FREE_EXPANSION && self.expanded / EXPANSION_RATE > self.compressed.get() {
            return Err(io::Error::other(Excess::Rate));
        }
        if self.expanded > EXPANSION_LIMIT {
            return Err(io::Error::other(Excess::Total));
        }
        let Some(left) = self.allowance.get().checked_sub(length as u64) else {
            return Err(io::Error::other(Excess::Row));
        };
        self.allowance.set(left);
        Ok(length)
    }
}

fn failed(place: &Place, source: io::Error) -> Error {
    let path = PathBuf::from(&*place.file);
    match source.get_ref().and_then(|inner| inner.downcast_ref::<Excess>()) {
        Some(Excess::Rate) => Error::Expansion { path, limit: "250 times its size" },
        Some(Excess::Total) => Error::Expansion { path, limit: "64 GiB" },
        Some(Excess::Row) => Error::TooLong { place: place.clone(), limit: ROW_LIMIT },
        None => Error::Read { path, source },
    }
}

fn utf8<'bytes>(bytes: &'bytes [u8], place: &Place) -> Result<&'bytes str, Error> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let lines = before.iter().filter(|&&byte| byte == b'\n').count();
        let place = Place { number: place.number + lines, ..place.clone() };
        Error::NotUtf8 { place, column: before.len() - line_start + 1 }
    })
}

fn syntax(place: Place, error: &serde_json::Error) -> Error {
    let reason = error.to_string();
    // The place is said once, in our words.
    let reason = reason.rsplit_once(" at line ").map_or(reason.as_str(), |(reason, _)| reason).to_owned();
    Error::Syntax { place, column: Some(error.column()), reason }
}

#[cfg(feature = "parquet")]
mod parquet {
    //! Rows of a parquet file.

    use std::fs::File;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;
    use std::sync::Arc;

    use parquet::errors::ParquetError;
    use parquet::file::reader::FileReader as _;
    use parquet::file::serialized_reader::SerializedFileReader;
    use parquet::record::{Field, Row};
    use serde_json::{Map, Value, json};

    use super::{Error, Place, Take, Unit, take_row};

    pub(super) fn read(path: &Path, take: &mut Take<'_>) -> Result<(), Error> {
        let file = File::open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let reader = reading(path, 1, || SerializedFileReader::new(file))?;
        let mut rows = reading(path, 1, || reader.get_row_iter(None))?;
        let file: Arc<Path> = path.into();
        for number in 1.. {
            let Some(row) = reading(path, number, || rows.next().transpose())? else { break };
            take_row(Place { file: Arc::clone(&file), unit: Unit::Row, number }, object(&row), take)?;
        }
        Ok(())
    }

    /// What is null is left away: every call of a tool has the arguments of all tools in such a file.
    fn object(row: &Row) -> Map<String, Value> {
        let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
        fields.filter(|(_, value)| !value.is_null()).collect()
    }

    /// A field as JSON. The library's own way makes base64 of text that is not declared as such, and panics at a date far
    /// away; bytes that are no text are an empty object here, and times the numbers that stand in the file.
    fn value(field: &Field) -> Value {
        match field {
            Field::Bytes(bytes) => bytes.as_utf8().map_or(json!({}), Value::from),
            Field::Group(row) => Value::Object(object(row)),
            Field::ListInternal(list) => list.elements().iter().map(value).collect(),
            Field::MapInternal(map) => {
                let key = |key: &Field| match value(key) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                Value::Object(map.entries().iter().map(|(name, field)| (key(name), value(field))).collect())
            }
            Field::Date(days) => json!(days),
            Field::TimeMillis(time) => json!(time),
            Field::TimeMicros(time) | Field::TimestampMillis(time) | Field::TimestampMicros(time) => {
                json!(time)
            }
            number_or_text => number_or_text.to_json_value(),
        }
    }

    /// What the library reads. It has asserts that a broken file can reach.
    fn reading<T>(
        path: &Path,
        number: usize,
        read: impl FnOnce() -> Result<T, ParquetError>,
    ) -> Result<T, Error> {
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(broken(path, number, &error.to_string())),
            Err(_) => Err(broken(path, number, "the file is broken")),
        }
    }

    fn broken(path: &Path, number: usize, reason: &str) -> Error {
        let place = Place { file: path.into(), unit: Unit::Row, number };
        Error::Syntax { place, column: None, reason: reason.to_owned() }
    }
}

#[cfg(not(feature = "parquet"))]
mod parquet {
    //! In a build without parquet its files are of no known kind.

    use std::path::Path;

    use super::{Error, Take};

    pub(super) fn read(path: &Path, _: &mut Take<'_>) -> Result<(), Error> {
        Err(Error::UnknownKind { path: path.to_owned() })
    }
}
