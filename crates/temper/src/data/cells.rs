//! Messages in tables, whose cells are text: as JSON they are read as what they are, so that a record means the same in a
//! table as in JSON.

use serde_json::{Map, Value};

/// What stands in a cell.
#[derive(PartialEq)]
enum Cell {
    /// A list of messages as JSON, or one.
    Messages(Value),
    /// Messages as Python prints them, or cut off.
    Broken,
    /// Anything else, JSON too: it may be what is asked for.
    Text,
}

impl Cell {
    fn of(value: Option<&Value>) -> Cell {
        let text = value.and_then(Value::as_str).unwrap_or_default().trim();
        let begins = |quote: &str| {
            let keys = ["role", "content", "from", "value"];
            keys.iter().any(|key| text.starts_with(&format!("[{{{quote}{key}{quote}:")))
        };
        let names = ["'user'", "'assistant'", "'human'", "'gpt'"];
        if begins("'") && text.ends_with("}]") && names.iter().any(|name| text.contains(name)) {
            return Cell::Broken;
        }
        if !text.starts_with(['[', '{']) {
            return Cell::Text;
        }
        match serde_json::from_str(text) {
            Ok(Value::Array(list)) if list.iter().all(is_message) => Cell::Messages(list.into()),
            Ok(one) if is_message(&one) => Cell::Messages(one),
            Err(_) if begins("\"") => Cell::Broken,
            _ => Cell::Text,
        }
    }

    fn is_list(&self) -> bool {
        matches!(self, Cell::Messages(Value::Array(list)) if !list.is_empty())
    }
}

/// Whether it has who says it, and what.
fn is_message(value: &Value) -> bool {
    let says = |who: &str, what: &[&str]| {
        value.get(who).is_some_and(Value::is_string) && what.iter().any(|key| value.get(key).is_some())
    };
    says("role", &["content", "tool_calls"]) || says("from", &["value"])
}

/// Reads the cells of columns that have messages. Without a list among them, prompt and answers are text.
///
/// # Errors
/// The column of prompt or answers whose messages are broken.
pub(super) fn unfold(row: &mut Map<String, Value>) -> Result<(), &'static str> {
    for column in ["messages", "conversations"] {
        if let Cell::Messages(messages @ Value::Array(_)) = Cell::of(row.get(column)) {
            row.insert(column.to_owned(), messages);
        }
    }
    let columns = ["prompt", "completion", "chosen", "rejected"];
    let cells = columns.map(|column| (column, Cell::of(row.get(column))));
    if let Some((column, _)) = cells.iter().find(|(_, cell)| *cell == Cell::Broken) {
        return Err(column);
    }
    let of_conversations =
        !row.contains_key("prompt") && row.get("conversations").is_some_and(Value::is_array);
    if of_conversations || cells.iter().any(|(_, cell)| cell.is_list()) {
        for (column, cell) in cells {
            if let Cell::Messages(messages) = cell {
                row.insert(column.to_owned(), messages);
            }
        }
    }
    Ok(())
}
