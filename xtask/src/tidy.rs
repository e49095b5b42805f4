//! Rules of the source tree that the compiler does not check. Each names file and line.

use std::fs;
use std::path::{Path, PathBuf};

/// Which crates of the workspace a crate may call. The picture is in ARCHITECTURE.md.
const ARROWS: &[(&str, &[&str])] = &[
    ("ops", &[]),
    ("scheduler", &[]),
    ("text", &[]),
    ("cpu", &["ops"]),
    ("cuda", &["ops"]),
    ("model", &["ops"]),
    ("engine", &["scheduler", "model", "ops"]),
    ("llm", &["engine", "text", "model", "ops", "cpu", "cuda"]),
    ("server", &["llm"]),
    ("bench", &["llm", "server"]),
    ("python", &["llm"]),
    ("cli", &["llm", "server", "bench"]),
    ("testkit", &["llm", "engine", "text", "model", "scheduler", "ops", "cpu", "cuda"]),
];

/// Most lines of a source file.
const MAX_LINES: usize = 700;

/// Where `unsafe` may stand.
const UNSAFE_PLACES: &[&str] = &["crates/cpu/", "crates/cuda/", "crates/model/src/bytes.rs"];

const UNSAFE_FORMS: &[&str] =
    &["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern", "#[unsafe("];

/// Crates whose results may depend on nothing but their arguments.
const PURE: &[&str] = &["ops", "cpu", "cuda", "model", "scheduler", "text"];

/// What a pure crate may not read.
const AMBIENT: &[&str] = &["Instant::now", "SystemTime::now", "env::var", "thread_rng", "rand::rng"];

/// A hash map's order is an input too: a file that has one says so.
const HASHED: &[&str] = &["HashMap", "HashSet"];
const HASHED_EXCUSE: &str = "never iterated";

/// The only file of the product that reads the environment.
const ENV_FILE: &str = "crates/llm/src/env.rs";

/// What no file may say: leftovers, and paths of somebody's machine. (In pieces, or this file would.)
const FORBIDDEN: &[&str] = &[
    concat!("dbg", "!("),
    concat!("FIX", "ME"),
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/wo", "rk/"),
];

/// Every broken rule, as `file:line: what`.
pub fn check(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let crates = subfolders(&root.join("crates"));
    for dir in &crates {
        check_crate(dir, &mut found);
    }
    let mut files = Vec::new();
    for dir in ["crates", "xtask"] {
        collect(&root.join(dir), &mut files);
    }
    collect_top(root, &mut files);
    for file in files {
        let name = file.strip_prefix(root).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        if let Ok(text) = fs::read_to_string(&file) {
            check_text(&name, &text, &mut found);
        }
    }
    check_env_table(root, &mut found);
    found
}

fn check_crate(dir: &Path, found: &mut Vec<String>) {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let manifest_path = dir.join("Cargo.toml");
    let Ok(manifest) = fs::read_to_string(&manifest_path) else { return };
    let shown = format!("crates/{name}/Cargo.toml");
    check_arrows(&name, &shown, &manifest, found);
    if !manifest.contains("[lints]\nworkspace = true") {
        found.push(format!("{shown}: the workspace's lints are not in force"));
    }
    let entry = ["src/lib.rs", "src/main.rs"].into_iter().find(|f| dir.join(f).exists());
    let text = entry.and_then(|f| fs::read_to_string(dir.join(f)).ok()).unwrap_or_default();
    if !text.starts_with("//! ") {
        found.push(format!("crates/{name}: its first file does not begin with documentation"));
    }
}

fn check_arrows(name: &str, shown: &str, manifest: &str, found: &mut Vec<String>) {
    let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == name) else {
        found.push(format!("{shown}: crate {name} has no row in the table of arrows"));
        return;
    };
    let mut section = "";
    for (index, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim();
        } else if section == "[dependencies]"
            && let Some(rest) = line.strip_prefix("bitfast-")
        {
            let target = rest.split(['.', ' ', '=']).next().unwrap_or_default();
            if !allowed.contains(&target) {
                found.push(format!("{shown}:{}: no arrow {name} -> {target}", index + 1));
            }
        }
    }
}

fn check_text(name: &str, text: &str, found: &mut Vec<String>) {
    let mut push = |line: usize, what: String| found.push(format!("{name}:{}: {what}", line + 1));
    let is_rust = name.ends_with(".rs");
    let lines = text.lines().count();
    if is_rust && lines > MAX_LINES {
        push(MAX_LINES, format!("the file has {lines} lines, more than {MAX_LINES}"));
    }
    let in_crate = name.strip_prefix("crates/").and_then(|rest| rest.split('/').next());
    let pure = in_crate.is_some_and(|c| PURE.contains(&c)) && name.contains("/src/");
    // Unit tests sit at the end of a file, and may read what they like.
    let mut in_tests = name.contains("/tests/");
    for (index, line) in text.lines().enumerate() {
        if let Some(word) = FORBIDDEN.iter().find(|w| line.contains(**w)) {
            push(index, format!("contains {word:?}"));
        }
        if !is_rust {
            continue;
        }
        in_tests |= line.trim_start().starts_with("#[cfg(test)]");
        let code = line.split("//").next().unwrap_or_default();
        if UNSAFE_FORMS.iter().any(|f| code.contains(f))
            && !UNSAFE_PLACES.iter().any(|p| name.starts_with(p))
            && !name.starts_with("xtask/src/tidy.rs")
        {
            push(index, "unsafe code outside its places".into());
        }
        if pure
            && !in_tests
            && !text.contains(HASHED_EXCUSE)
            && let Some(word) = HASHED.iter().find(|w| code.contains(**w))
        {
            push(index, format!("{word}, whose order must not matter here; say \"{HASHED_EXCUSE}\""));
        }
        if pure
            && !in_tests
            && let Some(word) = AMBIENT.iter().find(|w| code.contains(**w))
        {
            push(index, format!("{word} in a crate that may depend on its arguments only"));
        }
        let reads_env = code.contains("env::var(") || code.contains("env::vars(");
        if reads_env && in_crate.is_some_and(|c| c != "testkit") && !in_tests && name != ENV_FILE {
            push(index, format!("reads the environment; only {ENV_FILE} does"));
        }
    }
}

/// The README lists every environment variable.
fn check_env_table(root: &Path, found: &mut Vec<String>) {
    let env = fs::read_to_string(root.join(ENV_FILE)).unwrap_or_default();
    let readme = fs::read_to_string(root.join("README.md")).unwrap_or_default();
    let names = env.lines().filter(|l| l.contains("names: &[")).flat_map(|l| {
        let list = l.split("names: &[").nth(1).unwrap_or_default().split(']').next().unwrap_or_default();
        list.split(',').map(|n| n.trim().trim_matches('"').to_string()).collect::<Vec<_>>()
    });
    for name in names {
        if !name.is_empty() && !readme.contains(&format!("`{name}`")) {
            found.push(format!("README.md: says nothing about the environment variable {name}"));
        }
    }
}

fn subfolders(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.join("Cargo.toml").exists())
        .collect();
    found.sort();
    found
}

const TEXT_KINDS: &[&str] = &["rs", "md", "toml", "py", "cu", "cuh", "sh", "yml"];

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| TEXT_KINDS.contains(&e)) {
            files.push(path);
        }
    }
}

/// Text files right in the root, and CI's script.
fn collect_top(root: &Path, files: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
    files.extend(entries.filter(|p| p.extension().is_some_and(|e| e == "md" || e == "toml")));
    files.push(root.join(".ci/run"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let found = check(root);
        assert!(found.is_empty(), "{} broken rules:\n{}", found.len(), found.join("\n"));
    }

    fn broken(name: &str, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        check_text(name, text, &mut found);
        found
    }

    #[test]
    fn each_rule_can_fail() {
        assert_eq!(broken("crates/llm/src/a.rs", "fn f() { unsafe { g() } }").len(), 1);
        assert_eq!(broken("crates/cpu/src/a.rs", "fn f() { unsafe { g() } }").len(), 0);
        assert_eq!(broken("crates/llm/src/a.rs", "// unsafe { not code }").len(), 0);
        assert_eq!(broken("crates/model/src/a.rs", "let t = Instant::now();").len(), 1);
        assert_eq!(broken("crates/engine/src/a.rs", "let t = Instant::now();").len(), 0);
        assert_eq!(broken("crates/model/src/a.rs", "#[cfg(test)]\nlet t = Instant::now();").len(), 0);
        assert_eq!(broken("crates/cpu/src/a.rs", "let m = HashMap::new();").len(), 1);
        assert_eq!(broken("crates/cpu/src/a.rs", "// never iterated\nlet m = HashMap::new();").len(), 0);
        assert_eq!(broken("crates/cli/src/a.rs", "std::env::var(\"X\")").len(), 1);
        assert_eq!(broken(ENV_FILE, "std::env::var(\"X\")").len(), 0);
        assert_eq!(broken("crates/cli/src/a.rs", &"\n".repeat(701)).len(), 1);
        assert_eq!(broken("LOG.md", concat!("FIX", "ME")).len(), 1);

        let mut found = Vec::new();
        let manifest = "[dependencies]\nbitfast-ops.workspace = true\nbitfast-engine.workspace = true\n";
        check_arrows("model", "Cargo.toml", manifest, &mut found);
        assert_eq!(found, ["Cargo.toml:3: no arrow model -> engine"]);
        found.clear();
        check_arrows(
            "cpu",
            "Cargo.toml",
            "[dev-dependencies]\nbitfast-engine.workspace = true\n",
            &mut found,
        );
        assert!(found.is_empty(), "tests may reach further");
    }
}
