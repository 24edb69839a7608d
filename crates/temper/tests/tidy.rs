//! What ARCHITECTURE.md promises and a test can read: who may know whom, where `unsafe` may stand, that files say
//! what they are and that named paths exist.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Every Rust file below a folder, with its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

/// Module of the library → the modules it may use. `error` is everybody's.
const EDGES: [(&str, &[&str]); 12] = [
    ("checkpoint", &[]),
    ("text", &["checkpoint"]),
    ("data", &["text"]),
    ("parallel", &[]),
    ("model", &["checkpoint", "data", "parallel"]),
    ("objective", &[]),
    ("optim", &["model", "parallel"]),
    ("score", &["data", "model"]),
    ("generate", &["data", "model", "text"]),
    (
        "train",
        &[
            "checkpoint",
            "data",
            "generate",
            "model",
            "objective",
            "optim",
            "parallel",
            "score",
            "system",
            "text",
        ],
    ),
    ("selftest", &["data", "model", "objective"]),
    ("system", &[]),
];

/// Lower-case words that follow `crate::`.
fn used_modules(text: &str) -> Vec<&str> {
    text.match_indices("crate::")
        .map(|(at, prefix)| &text[at + prefix.len()..])
        .map(|rest| &rest[..rest.find(|c: char| !(c.is_ascii_lowercase() || c == '_')).unwrap_or(rest.len())])
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn modules_know_only_whom_they_may() {
    let src = root().join("crates/temper/src");
    for (path, text) in sources(&src) {
        let relative = path.strip_prefix(&src).unwrap();
        let module = relative
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap()
            .trim_end_matches(".rs")
            .to_owned();
        if ["lib", "error"].contains(&module.as_str()) {
            continue;
        }
        let (_, allowed) = EDGES
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("`{module}` has no line in EDGES"));
        for used in used_modules(&text) {
            assert!(
                used == module || allowed.contains(&used),
                "{}: `{module}` may not use `{used}`",
                relative.display()
            );
        }
    }
}

#[test]
fn crates_depend_in_one_direction() {
    let manifest =
        |name: &str| fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).unwrap();
    let dependencies = |name: &str| manifest(name).split("[dependencies]").nth(1).unwrap().to_owned();
    assert!(!dependencies("temper-kernels").contains("temper"));
    assert!(!dependencies("temper").contains("temper-cli"));
}

#[test]
fn unsafe_stands_in_kernels_and_before_mpi_alone() {
    for name in ["temper", "temper-cli"] {
        for (path, text) in sources(&root().join("crates").join(name).join("src")) {
            if path.ends_with("temper-cli/src/ranks/mpi.rs") {
                continue;
            }
            let found = text.lines().find(|line| {
                !line.trim_start().starts_with("//")
                    && (line.contains("unsafe {")
                        || line.contains("unsafe fn")
                        || line.contains("unsafe impl"))
            });
            assert!(found.is_none(), "{}: {}", path.display(), found.unwrap_or_default());
        }
    }
}

#[test]
fn the_library_reads_no_environment() {
    for name in ["temper", "temper-kernels"] {
        for (path, text) in sources(&root().join("crates").join(name).join("src")) {
            assert!(!text.contains("env::var"), "{}", path.display());
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in sources(&root().join("crates")) {
        assert!(text.starts_with("//!"), "{} does not begin with `//!`", path.display());
    }
}

#[test]
fn paths_named_in_the_architecture_exist() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let of_repository = |word: &&str| {
        ["crates/", "docs/", "examples/", "fixtures/", "reference/"].iter().any(|top| word.starts_with(top))
    };
    let mut checked = 0;
    for path in text.split('`').skip(1).step_by(2).filter(of_repository) {
        assert!(root().join(path).exists(), "ARCHITECTURE.md names `{path}`");
        checked += 1;
    }
    assert!(checked > 10, "only {checked} paths found");
}
