//! `temper inspect`.
use crate::args::Inspect;
use anyhow::Result;
pub fn run(_options: &Inspect) -> Result<()> {
    Ok(())
}
