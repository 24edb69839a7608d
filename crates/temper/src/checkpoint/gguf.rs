//! The GGUF container (versions 2 and 3): metadata and the places of tensors, checked before use.
//!
//! Nothing is allocated by a count that the file's length does not cover, and every tensor's bytes lie
//! inside the file and apart from the others'.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use temper_kernels::quants::StoredType;

use super::Error;
use super::error::printable;

/// Elements of all arrays together; the largest vocabularies need under a million.
const MOST_ELEMENTS: u64 = 1 << 24;
/// Longest key or tensor name in bytes, as the format states for keys.
const LONGEST_NAME: u64 = 65_535;
/// ggml's own limit.
const MOST_DIMENSIONS: u32 = 4;
/// Where tensors begin when `general.alignment` does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value; arrays hold scalars and strings only.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    /// The value in a few words, for messages.
    pub fn describe(&self) -> String {
        match self {
            Value::Integer(value) => format!("`{value}`"),
            Value::Float(value) => format!("`{value}`"),
            Value::Bool(value) => format!("`{value}`"),
            Value::String(value) => format!("`{}`", printable(value)),
            Value::Array(values) => format!("an array of {} values", values.len()),
        }
    }
}

/// A tensor's place in the file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub name: String,
    /// Outermost dimension first, as everywhere in temper; the file has them reversed.
    pub shape: Vec<usize>,
    pub stored: StoredType,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: usize,
}

/// What the head of a GGUF file says.
pub(super) struct Container {
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    /// In the file's order; names are unique.
    pub tensors: Vec<Entry>,
}

impl Container {
    /// Reads and checks everything before the tensors' bytes.
    pub fn read(file: &File, path: &Path) -> Result<Container, Error> {
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let mut head =
            Head { input: BufReader::new(file), position: 0, length, elements: MOST_ELEMENTS, path };
        let version = head.version()?;
        let tensor_count = head.u64("number of tensors")?;
        let key_count = head.u64("number of metadata keys")?;
        let metadata = head.metadata(key_count)?;
        let mut tensors = head.tensors(tensor_count)?;
        place(&mut tensors, alignment(&metadata, path)?, head.position, length, path)?;
        Ok(Container { version, metadata, tensors })
    }
}

/// `general.alignment`, a power of two.
fn alignment(metadata: &BTreeMap<String, Value>, path: &Path) -> Result<u64, Error> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::Integer(value @ 1..=0x1_0000)) if (value as u64).is_power_of_two() => Ok(value as u64),
        Some(other) => Err(Error::Metadata {
            path: path.to_owned(),
            key: "general.alignment".into(),
            expected: "a power of two of at most 65536".into(),
            found: other.describe(),
        }),
    }
}

/// Turns offsets into positions in the file and checks that tensors lie apart and inside it.
fn place(entries: &mut [Entry], alignment: u64, head: u64, length: u64, path: &Path) -> Result<(), Error> {
    let start = head.next_multiple_of(alignment);
    for entry in entries.iter_mut() {
        let what = || format!("place of tensor `{}`", printable(&entry.name));
        if !entry.offset.is_multiple_of(alignment) {
            let expected = format!("a multiple of {alignment}");
            return Err(Error::damaged(path, what(), expected, entry.offset.to_string()));
        }
        let offset = start.checked_add(entry.offset);
        match offset.and_then(|offset| offset.checked_add(entry.bytes as u64)) {
            Some(end) if end <= length => entry.offset += start,
            _ => {
                let expected = format!("{} bytes inside the file's {length}", entry.bytes);
                return Err(Error::damaged(path, what(), expected, format!("offset {}", entry.offset)));
            }
        }
    }
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|entry| entry.offset);
    for pair in order.windows(2) {
        let end = pair[0].offset + pair[0].bytes as u64;
        if pair[1].offset < end {
            let what = format!("place of tensor `{}`", printable(&pair[1].name));
            let expected = format!("an offset after the end of `{}` at {end}", printable(&pair[0].name));
            return Err(Error::damaged(path, what, expected, pair[1].offset.to_string()));
        }
    }
    Ok(())
}

/// A reader that knows how much of the file is left.
struct Head<'a> {
    input: BufReader<&'a File>,
    position: u64,
    length: u64,
    /// Array elements that may still come.
    elements: u64,
    path: &'a Path,
}

impl Head<'_> {
    /// Takes `count` bytes, of which the file must have as many.
    fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>, Error> {
        self.fits(count, 1, what)?;
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Checks that `count` things of at least `size` bytes can follow.
    fn fits(&self, count: u64, size: u64, what: &str) -> Result<(), Error> {
        let left = self.length - self.position;
        if count.checked_mul(size).is_none_or(|bytes| bytes > left) {
            let expected = format!("a length of at most {} in the {left} bytes that are left", left / size);
            return Err(Error::damaged(self.path, what, expected, count.to_string()));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.input.read_exact(bytes).map_err(Error::io("read", self.path))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        self.fits(N as u64, 1, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String, Error> {
        let length = self.u64(what)?;
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes).map_err(|error| Error::damaged(self.path, what, "UTF-8", error.to_string()))
    }

    fn name(&mut self, what: &str) -> Result<String, Error> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > LONGEST_NAME {
            let expected = format!("1 to {LONGEST_NAME} bytes");
            return Err(Error::damaged(self.path, what, expected, format!("{} bytes", name.len())));
        }
        Ok(name)
    }

    fn version(&mut self) -> Result<u32, Error> {
        let magic: [u8; 4] = self.array("magic number")?;
        if &magic != b"GGUF" {
            return Err(Error::damaged(
                self.path,
                "magic number",
                "`GGUF`",
                format!("`{}`", magic.escape_ascii()),
            ));
        }
        match self.u32("version")? {
            version @ 2..=3 => Ok(version),
            version if (2..=3).contains(&version.swap_bytes()) => {
                let expected = "a little-endian file";
                Err(Error::damaged(self.path, "version", expected, "a big-endian one"))
            }
            version => Err(Error::damaged(self.path, "version", "2 or 3", version.to_string())),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, Error> {
        // The shortest entry: a key of one byte (8 + 1), a type (4), a byte.
        self.fits(count, 14, "number of metadata keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.name("metadata key")?;
            let what = format!("metadata key `{}`", printable(&key));
            let value_type = self.u32(&what)?;
            let value = match value_type {
                9 => self.array_value(&what)?,
                scalar => self.scalar(scalar, &what)?,
            };
            if metadata.insert(key, value).is_some() {
                return Err(Error::damaged(self.path, what, "one value", "a second one"));
            }
        }
        Ok(metadata)
    }

    fn array_value(&mut self, what: &str) -> Result<Value, Error> {
        let element_type = self.u32(what)?;
        let count = self.u64(what)?;
        let size = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        self.fits(count, size, &format!("number of elements of {what}"))?;
        let Some(left) = self.elements.checked_sub(count) else {
            let expected = format!("at most {MOST_ELEMENTS} array elements in all");
            return Err(Error::damaged(self.path, what, expected, "more"));
        };
        self.elements = left;
        (0..count).map(|_| self.scalar(element_type, what)).collect::<Result<_, _>>().map(Value::Array)
    }

    fn scalar(&mut self, value_type: u32, what: &str) -> Result<Value, Error> {
        Ok(match value_type {
            0 => Value::Integer(u8::from_le_bytes(self.array(what)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.array(what)?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array(what)?))),
            7 => match self.array(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(Error::damaged(self.path, what, "0 or 1", other.to_string())),
            },
            8 => Value::String(self.string(what)?),
            10 => Value::Integer(u64::from_le_bytes(self.array(what)?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.array(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            other => {
                let expected = "a scalar, a string or an array of these";
                return Err(Error::damaged(self.path, what, expected, format!("value type {other}")));
            }
        })
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Entry>, Error> {
        // The shortest entry: a name of one byte (8 + 1), one dimension (4 + 8), a type (4), an offset
        // (8).
        self.fits(count, 33, "number of tensors")?;
        let mut names = std::collections::HashSet::new();
        let mut tensors = Vec::new();
        for _ in 0..count {
            let entry = self.tensor()?;
            if !names.insert(entry.name.clone()) {
                let what = format!("tensor `{}`", printable(&entry.name));
                return Err(Error::damaged(self.path, what, "one tensor of this name", "a second one"));
            }
            tensors.push(entry);
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Entry, Error> {
        let name = self.name("tensor name")?;
        let what = format!("tensor `{}`", printable(&name));
        let dimensions = self.u32(&what)?;
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            let expected = format!("1 to {MOST_DIMENSIONS} dimensions");
            return Err(Error::tensor(self.path, &name, expected, dimensions.to_string()));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            match usize::try_from(size) {
                Ok(size) if size > 0 => shape.insert(0, size),
                _ => {
                    return Err(Error::tensor(
                        self.path,
                        &name,
                        "dimensions of at least 1",
                        size.to_string(),
                    ));
                }
            }
        }
        let number = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let Some(stored) = StoredType::from_ggml(number) else {
            let expected = "F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL or IQ4_XS";
            return Err(Error::tensor(self.path, &name, expected, ggml_name(number)));
        };
        let row = shape.last().copied().unwrap_or(1);
        let values = shape.iter().copied().try_fold(1usize, usize::checked_mul);
        // Blocks never cross rows, so the innermost dimension must be whole blocks.
        match values.filter(|_| row.is_multiple_of(stored.block_values())).and_then(|n| stored.bytes_of(n)) {
            Some(bytes) => Ok(Entry { name, shape, stored, offset, bytes }),
            None => {
                let expected = format!("rows of whole blocks of {} values", stored.block_values());
                Err(Error::tensor(self.path, &name, expected, format!("shape {shape:?}")))
            }
        }
    }
}

/// The f64 with the same shortest decimal form: 1e-5 stays 1e-5 in a config that is saved again.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The name of a ggml type that temper does not read.
fn ggml_name(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16..=19 | 21 | 22 | 29 => "an IQ type",
        24..=27 => "an integer type",
        34 | 35 => "a ternary type",
        _ => "an unknown type",
    };
    format!("{name} (number {number})")
}
