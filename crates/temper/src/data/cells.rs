//! Messages in tables, whose cells are text: as JSON they are read as what they are.

use serde_json::{Map, Value};

use super::schema::role;

/// What stands in a cell.
enum Cell {
    /// Messages as JSON: a list of them, or one.
    Messages(Value),
    /// A list of messages as Python prints it.
    Python,
    /// Anything else.
    Text,
}

impl Cell {
    fn of(value: Option<&Value>) -> Cell {
        let text = value.and_then(Value::as_str).unwrap_or_default().trim_start();
        let is_python = |key: &&str| text.starts_with(&format!("[{{'{key}': "));
        if ["role", "content", "from", "value"].iter().any(is_python) {
            return Cell::Python;
        }
        let json = text.starts_with(['[', '{']).then(|| serde_json::from_str(text).ok()).flatten();
        match json {
            Some(Value::Array(list)) if list.iter().all(|it| role(it).is_some()) => {
                Cell::Messages(list.into())
            }
            Some(one) if role(&one).is_some() => Cell::Messages(one),
            _ => Cell::Text,
        }
    }

    fn is_list(&self) -> bool {
        matches!(self, Cell::Messages(Value::Array(list)) if !list.is_empty())
    }
}

/// Reads the cells of columns that have messages. What is asked for may itself be JSON: answers are messages only where all
/// of a row are, beside a prompt of messages or as two whole conversations.
///
/// # Errors
/// The column that has them as Python prints them.
pub(super) fn unfold(fields: &mut Map<String, Value>) -> Result<(), &'static str> {
    for column in ["messages", "conversations"] {
        if let Cell::Messages(messages @ Value::Array(_)) = Cell::of(fields.get(column)) {
            fields.insert(column.to_owned(), messages);
        }
    }
    let has = |column: &&str| fields.get(*column).is_some_and(|value| !value.is_null());
    let answers = ["completion", "chosen", "rejected"].into_iter().filter(has);
    let answers: Vec<(&str, Cell)> = answers.map(|column| (column, Cell::of(fields.get(column)))).collect();
    let prompt = Cell::of(fields.get("prompt"));
    let all = |is: fn(&Cell) -> bool| answers.iter().all(|(_, cell)| is(cell));
    let are_two = answers.len() == 2;
    if all(|cell| matches!(cell, Cell::Python)) && (are_two || matches!(prompt, Cell::Python)) {
        return Err(answers.first().map_or("prompt", |(column, _)| *column));
    }
    let is_array = |column: &str| fields.get(column).is_some_and(Value::is_array);
    let after_messages = prompt.is_list() || is_array("prompt") || is_array("conversations");
    let are_whole = are_two && all(Cell::is_list);
    if !all(|cell| matches!(cell, Cell::Messages(_))) || !(after_messages || are_whole) {
        return Ok(());
    }
    for (column, cell) in answers.into_iter().chain([("prompt", prompt)]) {
        if let Cell::Messages(messages) = cell {
            fields.insert(column.to_owned(), messages);
        }
    }
    Ok(())
}
