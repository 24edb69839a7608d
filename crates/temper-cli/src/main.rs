//! The command `temper`.
fn main() {}
