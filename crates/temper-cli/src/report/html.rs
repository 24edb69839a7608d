//! Pages that need nothing beside themselves: the frame, escaping, tables.

use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};

const STYLE: &str = include_str!("style.css");

/// What a page runs, and on what.
pub struct Script<'a> {
    /// The whole script.
    pub code: &'a str,
    /// In the element `data`.
    pub data: &'a Value,
}

/// What a page may do.
#[derive(Clone, Copy)]
enum May {
    /// Nothing: it is a file.
    LoadNothing,
    /// Ask whoever served it.
    AskItsServer,
}

/// The whole file. Its policy lets nothing be loaded, and no script run but the one given.
pub fn document(title: &str, body: &str, script: Option<Script>) -> String {
    framed(title, body, script, May::LoadNothing)
}

/// A page with its policy, which also lets nothing be loaded but from its server, and no other script run.
pub fn served(title: &str, body: &str, script: Option<Script>) -> (String, String) {
    let policy = policy(script.as_ref(), May::AskItsServer);
    (framed(title, body, script, May::AskItsServer), format!("{policy}; frame-ancestors 'none'"))
}

fn policy(script: Option<&Script>, may: May) -> String {
    let allowed = script.map(|script| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(script.code))));
    let allowed = allowed.as_deref().unwrap_or("'none'");
    let (connect, form) = match may {
        May::LoadNothing => ("", "'none'"),
        May::AskItsServer => (" connect-src 'self';", "'self'"),
    };
    format!(
        "default-src 'none'; style-src 'unsafe-inline'; script-src {allowed};{connect} base-uri 'none'; \
         form-action {form}"
    )
}

fn framed(title: &str, body: &str, script: Option<Script>, may: May) -> String {
    let title = escaped(title);
    let policy = policy(script.as_ref(), may);
    let scripts = script.map_or_else(String::new, |Script { code, data }| {
        let data = embedded(data);
        format!("<script type=\"application/json\" id=\"data\">{data}</script>\n<script>{code}</script>\n")
    });
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n{body}{scripts}</body>\n</html>\n"
    )
}

/// A part of a page, unless there is nothing in it.
pub fn section(title: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{title}</h2>\n{body}</section>\n")
}

/// A table: the first column names its row.
#[derive(Debug, Default)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// The rows' cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Writes it as text, the columns aligned.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows: Vec<&Vec<String>> = std::iter::once(&self.header).chain(&self.rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        for row in &rows {
            let cells = row.iter().enumerate();
            let cells = cells.map(|(column, cell)| format!("{cell:>width$}", width = width(column)));
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  "))?;
        }
        Ok(())
    }
}

impl Table {
    /// As HTML; nothing without rows.
    pub fn html(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let header = each(&self.header, |cell| format!("<th>{}</th>", escaped(cell)));
        let rows = each(&self.rows, |row| {
            format!("<tr>{}</tr>\n", each(row, |cell| format!("<td>{}</td>", escaped(cell))))
        });
        format!(
            "<div class=\"scroll\"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
        )
    }
}

/// The items' HTML, one after another.
pub fn each<T>(items: &[T], html: impl Fn(&T) -> String) -> String {
    items.iter().map(html).collect()
}

/// Text as it stands in an element or an attribute.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

/// JSON as it can stand in a script element: in JSON these letters are always inside strings.
fn embedded(value: &Value) -> String {
    let mut text = value.to_string();
    for (letter, escape) in
        [("<", "\\u003c"), (">", "\\u003e"), ("\u{2028}", "\\u2028"), ("\u{2029}", "\\u2029")]
    {
        if text.contains(letter) {
            text = text.replace(letter, escape);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_ends_the_data_early() {
        let hostile = json!({ "a</script><!--": "\u{2028}]]></SCRIPT><script>alert(1)</script>" });
        let text = embedded(&hostile);
        assert!(!text.contains('<') && !text.contains('\u{2028}'), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), hostile);
        assert_eq!(escaped("\"it's\" <b>&"), "&quot;it&#39;s&quot; &lt;b&gt;&amp;");
    }

    #[test]
    fn only_the_given_script_may_run() {
        let page = document("t", "", Some(Script { code: "alert(1)", data: &Value::Null }));
        assert!(page.contains("script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"), "{page}");
        assert!(document("t", "", None).contains("script-src 'none'"));
    }
}
