//! `temper selftest`.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use temper::selftest::{self, Check};
use temper_kernels::{Cpu, Precision};

use crate::args::{Checks, Selftest};
use crate::output::results;
use crate::ranks::cores;

/// Runs the checks and writes a line for each.
pub fn run(options: &Selftest) -> Result<()> {
    let mut out = results();
    let groups = match options.what {
        Checks::All => {
            use Checks::{Adapters, Attention, DpoIdentity, Forest, Gradients};
            &[Attention, Gradients, DpoIdentity, Forest, Adapters][..]
        }
        _ => &[options.what][..],
    };
    let (mut failed, mut all) = (0, 0);
    for &group in groups {
        for check in checks(group)? {
            writeln!(out, "{}", line(&check, group, options.json))?;
            out.flush()?;
            failed += usize::from(!check.passed());
            all += 1;
        }
    }
    ensure!(failed == 0, "{failed} of {all} checks failed");
    Ok(())
}

fn checks(group: Checks) -> Result<Vec<Check>> {
    Ok(match group {
        Checks::Attention => selftest::attention().to_vec(),
        Checks::Gradients => selftest::gradients(),
        Checks::DpoIdentity => selftest::dpo_identity(),
        Checks::Forest => selftest::forest(&cpu()?),
        Checks::Adapters => selftest::adapters(&cpu()?),
        Checks::All => Vec::new(),
    })
}

fn cpu() -> Result<Cpu> {
    Cpu::new(cores(), Precision::F32).context("cannot start the threads")
}

fn line(check: &Check, group: Checks, as_json: bool) -> String {
    let Check { name, error, bound } = check;
    let passed = check.passed();
    if as_json {
        return json!({ "check": name, "error": error, "bound": bound, "passed": passed }).to_string();
    }
    // The attention lines are quoted in other places: they stay as they are.
    let bound = if group == Checks::Attention { String::new() } else { format!(" (at most {bound:.0e})") };
    let failed = if passed { "" } else { " FAILED" };
    format!("{name}: {error:.1e}{bound}{failed}")
}
