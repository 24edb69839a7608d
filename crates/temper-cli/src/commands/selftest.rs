//! `temper selftest`.
use crate::args::Selftest;
use anyhow::Result;
pub fn run(_options: &Selftest) -> Result<()> {
    Ok(())
}
