//! What ARCHITECTURE.md promises and a test can read: who may know whom, where `unsafe` may stand, that files say
//! what they are and that named paths exist.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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

fn architecture() -> String {
    fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// Modules of the library, and those that each may use: the table under "Inside the library".
fn edges(text: &str) -> Vec<(&str, Vec<&str>)> {
    let table = text.split("Inside the library:").nth(1).unwrap().trim_start();
    let rows = table.lines().take_while(|line| line.starts_with('|')).skip(2);
    let edges = rows.map(|row| {
        let mut names = row.split('`').skip(1).step_by(2);
        (names.next().unwrap(), names.collect())
    });
    edges.collect()
}

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
    let architecture = architecture();
    let edges = edges(&architecture);
    assert!(edges.len() > 10, "{edges:?}");
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
        if ["lib", "error", "hex"].contains(&module.as_str()) {
            continue;
        }
        let (_, allowed) = edges
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("`{module}` has no line in ARCHITECTURE.md"));
        for used in used_modules(&text) {
            assert!(
                used == module || used == "hex" || allowed.contains(&used),
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

/// Fixtures are models of a few thousand parameters; what is larger was made or fetched, and belongs nowhere here.
#[test]
fn no_tracked_file_is_large() {
    let Ok(list) = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output() else { return };
    for name in String::from_utf8(list.stdout).unwrap().split_terminator('\0') {
        // One that is deleted but still listed has no length.
        let len = fs::metadata(root().join(name)).map_or(0, |data| data.len());
        assert!(len <= 1 << 20, "{name} has {len} bytes");
    }
}

#[test]
fn paths_named_in_documents_exist() {
    let of_repository = |word: &&str| {
        ["bench/", "crates/", "docs/", "examples/", "fixtures/", "reference/"]
            .iter()
            .any(|top| word.starts_with(top))
    };
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let docs = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let top = ["ARCHITECTURE.md", "README.md", "BENCHMARKS.md"].map(|name| root().join(name));
    let mut checked = 0;
    for document in docs.chain(top) {
        let text = fs::read_to_string(&document).unwrap();
        for path in text.split('`').skip(1).step_by(2).filter(of_repository) {
            // A placeholder stands for any.
            if !path.contains(['<', '*', ' ']) {
                assert!(root().join(path).exists(), "{} names `{path}`", document.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 20, "only {checked} paths found");
}
