//! TensorBoard's event file: records with checksums, each an `Event` in protocol buffers with the scalars of a line of
//! metrics or the text of a sample. The tags are TRL's where TRL has the metric.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};
use serde_json::Value;

const PREFIX: &str = "events.out.tfevents.";
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// TensorFlow's number for tensors of strings.
const DT_STRING: u64 = 7;

/// An open event file.
pub(super) struct EventFile {
    file: File,
    /// Samples of the newest step.
    samples: (u64, usize),
    /// How long before now a line was written, while earlier lines are written again.
    ago: f64,
}

impl EventFile {
    /// A new file with these lines, in place of an earlier one. Its name is a later one, so that a TensorBoard that is
    /// watching goes on with it.
    pub fn create(folder: &Path, metrics: &[Value], samples: &[Value]) -> io::Result<EventFile> {
        for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                fs::remove_file(entry.path())?;
            }
        }
        let name = format!("{PREFIX}{:010}.temper.{}.0", now() as u64, std::process::id());
        let mut events = EventFile { file: File::create(folder.join(name))?, samples: (0, 0), ago: 0.0 };
        let seconds = |line: &Value| line["seconds"].as_f64().unwrap_or(0.0);
        events.ago = metrics.iter().map(seconds).sum();
        let version = [double(1, now() - events.ago), bytes(3, b"brain.Event:2")].concat();
        events.file.write_all(&record(&version))?;
        let mut samples = samples.iter().peekable();
        let step = |line: &Value| line["step"].as_u64();
        for line in metrics {
            while let Some(sample) = samples.next_if(|sample| step(sample) < step(line)) {
                events.add_sample(sample)?;
            }
            events.ago -= seconds(line);
            events.add_metrics(line)?;
        }
        events.ago = 0.0;
        samples.try_for_each(|sample| events.add_sample(sample))?;
        Ok(events)
    }

    /// Adds the numbers of a line of metrics.
    pub fn add_metrics(&mut self, line: &Value) -> io::Result<()> {
        let evaluated = line.get("eval_loss").is_some();
        let values = line.as_object().into_iter().flatten().filter_map(|(key, value)| {
            let tag = match key.strip_prefix("eval_") {
                Some(name) => format!("eval/{name}"),
                // An evaluation has the epoch of its step again.
                None if evaluated || key == "step" => return None,
                None => format!("train/{key}"),
            };
            let value = value.as_f64()? as f32;
            Some(bytes(1, &[bytes(1, tag.as_bytes()), float(2, value)].concat()))
        });
        let values: Vec<u8> = values.flatten().collect();
        self.add(line, &values)
    }

    /// Adds a sample as a text of its own tag.
    pub fn add_sample(&mut self, line: &Value) -> io::Result<()> {
        let text = |key: &str| line[key].as_str().unwrap_or_default();
        let step = line["step"].as_u64().unwrap_or(0);
        let index = if self.samples.0 == step { self.samples.1 + 1 } else { 1 };
        self.samples = (step, index);
        let tag = format!("samples/{index}/text_summary");
        let markdown = format!("**{}**\n\n{}", text("prompt"), text("answer"));
        let plugin = bytes(1, &bytes(1, b"text"));
        let shape = bytes(2, &number(1, 1));
        let tensor = [number(1, DT_STRING), bytes(2, &shape), bytes(8, markdown.as_bytes())].concat();
        self.add(line, &bytes(1, &[bytes(1, tag.as_bytes()), bytes(8, &tensor), bytes(9, &plugin)].concat()))
    }

    /// Adds an event at the line's step.
    fn add(&mut self, line: &Value, summary: &[u8]) -> io::Result<()> {
        let step = number(2, line["step"].as_u64().unwrap_or(0));
        let event = [double(1, now() - self.ago), step, bytes(5, summary)].concat();
        self.file.write_all(&record(&event))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Length and content, each with its checksum.
fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), content, &masked(content)].concat()
}

/// TensorFlow's form of CRC-32C.
fn masked(content: &[u8]) -> [u8; 4] {
    CRC.checksum(content).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

// Fields of protocol buffers: the number and the kind, then the value.

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn double(field: u64, value: f64) -> Vec<u8> {
    [varint(field << 3 | 1), value.to_le_bytes().to_vec()].concat()
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    [&varint(field << 3 | 2), &varint(content.len() as u64), content].concat()
}

fn float(field: u64, value: f32) -> Vec<u8> {
    [varint(field << 3 | 5), value.to_le_bytes().to_vec()].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(10);
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As TensorFlow's own writer has it.
    #[test]
    fn the_first_record_is_tensorflows() {
        let event = [double(1, 0.0), bytes(3, b"brain.Event:2")].concat();
        assert_eq!(event.len(), 24);
        assert_eq!(record(&event)[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
        // CRC-32C of "123456789" is e3069283.
        assert_eq!(CRC.checksum(b"123456789"), 0xe306_9283);
        assert_eq!(varint(300), [0xac, 0x02]);
    }
}
