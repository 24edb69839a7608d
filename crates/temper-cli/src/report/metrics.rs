//! `metrics.jsonl` by columns. Reading never fails: what is no object with a step is counted and left out, and a
//! last line without its end waits for the rest.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The numbers of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// As in the file.
    pub name: String,
    /// Step and value, by step.
    pub points: Vec<(f64, f64)>,
}

/// All numbers of a run.
#[derive(Debug, Default)]
pub struct Metrics {
    /// In the order in which their names came.
    columns: Vec<Column>,
    /// Lines that are no object with a step.
    pub damaged: usize,
    /// Values that are null, which is how JSON writes what is no finite number.
    pub not_finite: usize,
}

impl Metrics {
    /// Adds the whole lines of some bytes, and says how many bytes they are. The rest can be given again when
    /// the file has grown.
    pub fn extend(&mut self, bytes: &[u8]) -> usize {
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut cells = Vec::new();
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            cells.clear();
            let mut parser = serde_json::Deserializer::from_slice(line);
            let read = Line { columns: &mut self.columns, cells: &mut cells }.deserialize(&mut parser);
            match read.and_then(|step| parser.end().map(|()| step)) {
                Ok(Some(step)) => self.add(step, &cells),
                _ => self.damaged += 1,
            }
        }
        self.columns.iter_mut().for_each(put_in_order);
        whole
    }

    fn add(&mut self, step: f64, cells: &[(usize, f64)]) {
        for &(column, value) in cells {
            match value.is_finite() {
                true => self.columns[column].points.push((step, value)),
                false => self.not_finite += 1,
            }
        }
    }

    /// The columns that have points.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|column| !column.points.is_empty())
    }

    /// A column's points; none when there is no such column.
    pub fn points(&self, name: &str) -> &[(f64, f64)] {
        self.columns.iter().find(|column| column.name == name).map_or(&[], |column| &column.points)
    }
}

/// Sorts by step where that is needed; of two values of a step the later one counts.
fn put_in_order(column: &mut Column) {
    let points = &mut column.points;
    if points.is_sorted_by(|left, right| left.0 < right.0) {
        return;
    }
    points.reverse();
    points.sort_by(|left, right| left.0.total_cmp(&right.0));
    points.dedup_by(|left, right| left.0 == right.0);
}

/// Reads an object into cells, and returns its step.
struct Line<'a> {
    columns: &'a mut Vec<Column>,
    /// Number of the column, and the value.
    cells: &'a mut Vec<(usize, f64)>,
}

impl<'de> DeserializeSeed<'de> for Line<'_> {
    type Value = Option<f64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Line<'_> {
    type Value = Option<f64>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut step = None;
        // The keys of a line come as those of the line before, so the next column is mostly the right one.
        let mut next = 0;
        while let Some(key) = map.next_key_seed(Key { columns: self.columns, next })? {
            let value = map.next_value()?;
            match (key, value) {
                (None, Cell(value)) => step = value.filter(|step| step.is_finite()),
                (Some(column), Cell(Some(value))) => {
                    self.cells.push((column, value));
                    next = column + 1;
                }
                (Some(column), Cell(None)) => next = column + 1,
            }
        }
        Ok(step)
    }
}

/// The number of the column that a key names; none for `step`.
struct Key<'a> {
    columns: &'a mut Vec<Column>,
    next: usize,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Option<usize>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        let Key { columns, next } = self;
        if key == "step" {
            return Ok(None);
        }
        if columns.get(next).is_some_and(|column| column.name == key) {
            return Ok(Some(next));
        }
        let found = columns.iter().position(|column| column.name == key);
        Ok(Some(found.unwrap_or_else(|| {
            columns.push(Column { name: key.to_owned(), points: Vec::new() });
            columns.len() - 1
        })))
    }
}

/// A number, not a number for null, or none for anything else.
struct Cell(Option<f64>);

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor).map(Cell)
    }
}

struct CellVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Option<f64>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Some(f64::NAN))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    fn read(text: &str) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.extend(text.as_bytes());
        metrics
    }

    #[test]
    fn a_file_that_grows_is_read_as_if_at_once() {
        let text = "{\"step\":1,\"loss\":2.5,\"grad_norm\":1}\n{\"step\":1,\"eval_loss\":3}\n{\"step\":2,\"loss\":2}\n";
        let whole = read(text);
        for cut in 0..=text.len() {
            let mut grown = Metrics::default();
            let consumed = grown.extend(&text.as_bytes()[..cut]);
            assert!(consumed == 0 || text.as_bytes()[consumed - 1] == b'\n');
            grown.extend(&text.as_bytes()[consumed..]);
            assert!(grown.columns().eq(whole.columns()) && grown.damaged == 0, "cut at {cut}");
        }
        assert_eq!(whole.points("loss"), [(1.0, 2.5), (2.0, 2.0)]);
        assert_eq!(whole.points("eval_loss"), [(1.0, 3.0)]);
    }

    #[test]
    fn damaged_lines_are_counted_and_left_out() {
        let metrics = read(
            "{\"step\":1,\"loss\":2}\nnonsense\n{\"loss\":1}\n[1]\n{\"step\":2,\"loss\":1} x\n{\"step\":3,\"loss\":\n\
             {\"step\":null,\"loss\":1}\n\n{\"step\":4,\"loss\":null,\"note\":\"x\",\"more\":{\"a\":[1]}}\n\
             {\"step\":5,\"loss\":0.5}\n{\"step\":6",
        );
        assert_eq!(metrics.points("loss"), [(1.0, 2.0), (5.0, 0.5)]);
        assert_eq!((metrics.damaged, metrics.not_finite), (6, 1));
        let names: Vec<_> = metrics.columns().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["loss"]);
    }

    #[test]
    fn of_steps_out_of_order_the_later_line_counts() {
        let metrics = read("{\"step\":3,\"a\":1}\n{\"step\":1,\"a\":2}\n{\"step\":3,\"a\":5}\n");
        assert_eq!(metrics.points("a"), [(1.0, 2.0), (3.0, 5.0)]);
    }

    #[test]
    fn any_bytes_are_read() {
        proptest::proptest!(|(bytes: Vec<u8>)| {
            let consumed = Metrics::default().extend(&bytes);
            assert!(consumed <= bytes.len());
        });
    }
}
