//! The ledger: what became of every record and every token.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::Place;

/// Why a record is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The two sides of a preference differ before their last answer.
    PromptsDiffer,
    /// A side does not end with an answer of the assistant.
    NoAnswer,
    /// Nothing stands before the answers of a preference's conversations.
    NoPrompt,
    /// An answer is empty.
    EmptyAnswer,
    /// Its only answer is marked as a bad one.
    BadAnswer,
    /// It is longer than allowed, and such records are to be left out.
    TooLong,
    /// Its answer alone is longer than allowed, so that nothing of the prompt is left.
    NoRoom,
    /// No token of it is to be trained.
    NoTarget,
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Reason::PromptsDiffer => "prompts differ before the last answer",
            Reason::NoAnswer => "does not end with an answer",
            Reason::NoPrompt => "nothing stands before the answer",
            Reason::EmptyAnswer => "empty answer",
            Reason::BadAnswer => "marked as a bad answer",
            Reason::TooLong => "longer than allowed",
            Reason::NoRoom => "answer leaves no room for the prompt",
            Reason::NoTarget => "no token to train",
        })
    }
}

/// Records left out: how many for each reason, and the first of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dropped(BTreeMap<Reason, (usize, Place)>);

impl Dropped {
    /// Counts one.
    pub(super) fn add(&mut self, reason: Reason, place: &Place) {
        self.0.entry(reason).or_insert_with(|| (0, place.clone())).0 += 1;
    }

    /// How many for a reason.
    pub fn count(&self, reason: Reason) -> usize {
        self.0.get(&reason).map_or(0, |(count, _)| *count)
    }

    /// How many in all.
    pub fn total(&self) -> usize {
        self.0.values().map(|(count, _)| count).sum()
    }

    /// Reason, number, and the first one's place.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, usize, &Place)> {
        self.0.iter().map(|(&reason, (count, place))| (reason, *count, place))
    }
}

/// Tokens of sequences. The prompt of a pair counts for both of its sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tokens {
    /// All tokens of all rendered records.
    pub read: usize,
    /// Tokens that are targets.
    pub trained: usize,
    /// Tokens that are only seen.
    pub context: usize,
    /// Tokens left out, by truncation or with their record.
    pub cut: usize,
}

/// What became of every record and every token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ledger {
    /// Records in the files.
    pub read: usize,
    /// Records that are trained.
    pub used: usize,
    /// Records left out.
    pub dropped: Dropped,
    /// Sequences of the records that are trained.
    pub sequences: usize,
    /// Sequences that were shortened.
    pub shortened: usize,
    /// Tokens.
    pub tokens: Tokens,
    /// Sequences whose text would be other tokens if prompt and answer were tokenised in one.
    pub joint_differs: usize,
    /// Records whose messages after the last answer are not used.
    pub unanswered: usize,
    /// Records equal to an earlier one.
    pub duplicates: usize,
    /// Pairs whose two answers are equal.
    pub equal_answers: usize,
    /// Records of more than a mebibyte.
    pub large: usize,
}

impl Ledger {
    /// Whether every record and every token is accounted for.
    pub fn balance(&self) -> bool {
        let Tokens { read, trained, context, cut } = self.tokens;
        self.read == self.used + self.dropped.total() && read == trained + context + cut
    }

    /// As the manifest of a run keeps it; remarks that count nothing are left out.
    pub fn to_json(&self) -> Value {
        let dropped: Map<String, Value> =
            self.dropped.iter().map(|(reason, count, _)| (reason.to_string(), count.into())).collect();
        let Tokens { read, trained, context, cut } = self.tokens;
        let mut ledger = json!({
            "records": { "read": self.read, "used": self.used, "dropped": dropped },
            "tokens": { "read": read, "trained": trained, "context": context, "cut": cut },
        });
        for (name, count) in self.remarks().into_iter().filter(|(_, count)| *count > 0) {
            ledger[name.trim()] = count.into();
        }
        ledger
    }

    /// Further counts, as they are said.
    fn remarks(&self) -> [(&'static str, usize); 7] {
        [
            ("sequences", self.sequences),
            ("  shortened", self.shortened),
            ("  other tokens if tokenised in one", self.joint_differs),
            ("records with messages after the last answer", self.unanswered),
            ("duplicates", self.duplicates),
            ("pairs with equal answers", self.equal_answers),
            ("records over 1 MiB", self.large),
        ]
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![("records read".to_owned(), self.read), ("  used".to_owned(), self.used)];
        for (reason, count, first) in self.dropped.iter() {
            lines.push((format!("  dropped: {reason} (first: {first})"), count));
        }
        lines.push(("tokens read".to_owned(), self.tokens.read));
        lines.push(("  trained".to_owned(), self.tokens.trained));
        lines.push(("  context".to_owned(), self.tokens.context));
        lines.push(("  cut".to_owned(), self.tokens.cut));
        let remarks = self.remarks().into_iter().filter(|(_, count)| *count > 0);
        lines.extend(remarks.map(|(name, count)| (name.to_owned(), count)));
        let numbers: Vec<String> = lines.iter().map(|(_, count)| grouped(*count)).collect();
        let width = numbers.iter().map(String::len).max().unwrap_or(0);
        for ((name, _), number) in lines.iter().zip(&numbers) {
            writeln!(formatter, "{number:>width$}  {name}")?;
        }
        Ok(())
    }
}

/// A number with commas between thousands.
pub fn grouped(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or(u64::MAX).to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
