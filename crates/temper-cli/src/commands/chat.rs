//! `temper chat`.
use crate::args::Chat;
use anyhow::Result;
pub fn run(_options: &Chat) -> Result<()> {
    Ok(())
}
