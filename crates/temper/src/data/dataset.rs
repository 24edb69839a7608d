//! A dataset: the whole way from files to examples, and its ledger.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::ledger::{Ledger, Reason};
use super::records::{self, Record, Records};
use super::render::{Draft, Example, Fitted, Renderer, Sequence, Truncation};
use super::{Error, Schema};
use crate::hex;

/// What the data is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Supervised fine-tuning; of preferences the chosen side.
    Sft,
    /// Learning from preferences.
    Preference,
    /// Next-token training on documents, joined and cut into blocks.
    Pretrain,
    /// Log-probs of what there is; nothing is cut.
    Score,
}

/// Examples made of files.
#[derive(Debug)]
pub struct Dataset {
    /// The examples, in the order of the records.
    pub examples: Vec<Example>,
    /// What became of every record and token.
    pub ledger: Ledger,
    /// What kind the records are.
    pub schema: Schema,
    /// Columns that neither the schema nor the chat template reads.
    pub unread_columns: Vec<String>,
    /// The records, for naming them.
    pub records: Vec<Record>,
}

impl Dataset {
    /// Reads and renders a file or folder.
    ///
    /// # Errors
    /// When a file cannot be read, is of another schema than the purpose needs, a record cannot be rendered, or nothing is left.
    pub fn load(path: &Path, renderer: &Renderer<'_>, purpose: Purpose) -> Result<Self, Error> {
        let read = records::read(path)?;
        let expected = match purpose {
            Purpose::Preference if !read.schema.is_preference() => Some(
                "preferences: `chosen` + `rejected`, alone or with `prompt`, `instruction` or `conversations`",
            ),
            Purpose::Pretrain if read.schema != Schema::Text => Some("documents: `text`, or .txt files"),
            _ => None,
        };
        if let Some(expected) = expected {
            return Err(Error::WrongSchema { path: path.to_owned(), expected, found: read.schema });
        }
        let (examples, ledger) = match purpose {
            Purpose::Pretrain => blocks(&read, renderer)?,
            Purpose::Score => {
                let truncation = match renderer.truncation {
                    Truncation::Drop => Truncation::Drop,
                    _ => Truncation::Error,
                };
                examples(&read, &Renderer { truncation, ..*renderer }, purpose)?
            }
            Purpose::Sft | Purpose::Preference => examples(&read, renderer, purpose)?,
        };
        if examples.is_empty() {
            return Err(Error::NothingToTrain { path: path.to_owned(), dropped: ledger.dropped });
        }
        let unread_columns = read.unread_columns(renderer.template);
        let Records { records, schema, .. } = read;
        Ok(Self { examples, ledger, schema, unread_columns, records })
    }

    /// SHA-256 over all examples' tokens and spans, in hexadecimal: equal for equal training, however the
    /// files are named and compressed.
    pub fn content_hash(&self) -> String {
        let mut hash = Sha256::new();
        let mut number = |number: usize| hash.update((number as u64).to_le_bytes());
        for example in &self.examples {
            number(example.sequences.len());
            for sequence in &example.sequences {
                number(sequence.tokens.len());
                sequence.tokens.iter().for_each(|&token| number(token as usize));
                number(sequence.trained.len());
                sequence
                    .trained
                    .iter()
                    .for_each(|span| [span.start, span.end].into_iter().for_each(&mut number));
            }
        }
        hex(&hash.finalize())
    }
}

/// The ledger's page of the records as they were read.
fn opened(read: &Records) -> Ledger {
    Ledger {
        read: read.records.len() + read.dropped.total(),
        dropped: read.dropped.clone(),
        duplicates: read.duplicates,
        equal_answers: read.equal_answers,
        large: read.large,
        ..Ledger::default()
    }
}

/// An example for each record.
fn examples(
    read: &Records,
    renderer: &Renderer<'_>,
    purpose: Purpose,
) -> Result<(Vec<Example>, Ledger), Error> {
    type Rendered = Result<(Draft, Result<Vec<Fitted>, Reason>), Error>;
    let render = |record: &Record| -> Rendered {
        let draft = renderer.draft(record, purpose)?;
        let fitted = renderer.fit(&draft, record, purpose)?;
        Ok((draft, fitted))
    };
    let rendered: Vec<Rendered> = read.records.par_iter().map(render).collect();
    let mut ledger = opened(read);
    let mut examples = Vec::with_capacity(rendered.len());
    for (record, rendered) in rendered.into_iter().enumerate() {
        let (draft, fitted) = rendered?;
        let tokens: usize = draft.sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        ledger.tokens.read += tokens;
        match fitted {
            Err(reason) => {
                ledger.tokens.cut += tokens;
                ledger.dropped.add(reason, &read.records[record].place);
            }
            Ok(mut fitted) => {
                fitted.retain(|fitted| fitted.sequence.targets() > 0);
                ledger.shortened += fitted.iter().filter(|fitted| !fitted.cut.is_empty()).count();
                ledger.joint_differs += draft.joint_differs;
                ledger.unanswered += usize::from(draft.unanswered);
                let sequences: Vec<Sequence> = fitted.into_iter().map(|fitted| fitted.sequence).collect();
                // What told the answers apart may have been cut.
                let equal = |pair: &[Sequence]| draft.pair && pair.len() == 2 && pair[0] == pair[1];
                ledger.equal_answers += usize::from(equal(&sequences) && !equal(&draft.sequences));
                enter(&mut ledger, &sequences, tokens);
                ledger.used += 1;
                examples.push(Example { record, sequences });
            }
        }
    }
    Ok((examples, ledger))
}

/// Enters what is left of so many tokens.
fn enter(ledger: &mut Ledger, sequences: &[Sequence], read: usize) {
    let kept: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
    let trained: usize = sequences.iter().map(Sequence::targets).sum();
    ledger.sequences += sequences.len();
    ledger.tokens.trained += trained;
    ledger.tokens.context += kept - trained;
    ledger.tokens.cut += read - kept;
}

/// All documents as one stream of tokens, each with its end, cut into blocks that do not overlap.
fn blocks(read: &Records, renderer: &Renderer<'_>) -> Result<(Vec<Example>, Ledger), Error> {
    let draft = |record: &Record| renderer.draft(record, Purpose::Pretrain);
    let drafts: Vec<Result<Draft, Error>> = read.records.par_iter().map(draft).collect();
    let mut ledger = opened(read);
    ledger.used = read.records.len();
    let mut stream = Vec::new();
    let mut ends = Vec::with_capacity(drafts.len());
    for draft in drafts {
        stream.extend(draft?.sequences.into_iter().flat_map(|sequence| sequence.tokens));
        ends.push(stream.len());
    }
    ledger.tokens.read = stream.len();
    let mut examples = Vec::new();
    let length = renderer.max_length.max(1);
    for (start, block) in (0..).step_by(length).zip(stream.chunks(length)) {
        // A lone token predicts nothing.
        if block.len() < 2 {
            ledger.tokens.cut += block.len();
            continue;
        }
        let trained = Vec::from([1..block.len()]);
        let sequences = vec![Sequence { tokens: block.to_vec(), trained, prompt: 0 }];
        enter(&mut ledger, &sequences, block.len());
        let record = ends.partition_point(|&end| end <= start);
        examples.push(Example { record, sequences });
    }
    Ok((examples, ledger))
}
