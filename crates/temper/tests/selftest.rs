//! The checks of `temper selftest`.

use temper::selftest::{self, Check};
use temper_kernels::{Cpu, Precision};

fn assert_passed(checks: impl IntoIterator<Item = Check>) {
    let failed: Vec<Check> = checks.into_iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn attention() {
    assert_passed(selftest::attention());
}

#[test]
fn gradients() {
    assert_passed(selftest::gradients());
}

#[test]
fn forest() {
    assert_passed(selftest::forest(&Cpu::new(2, Precision::F32).unwrap()));
}

#[test]
fn adapters() {
    assert_passed(selftest::adapters(&Cpu::new(2, Precision::F32).unwrap()));
}

#[test]
fn dpo_identity() {
    assert_passed(selftest::dpo_identity());
}
