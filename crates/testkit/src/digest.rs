//! Stored digests of logits: what shows that two machines, or two instruction sets, compute the same bits.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

use crate::fixtures;

const FILE: &str = "digests.json";

/// Tests of one process bless one after another.
static BLESSING: Mutex<()> = Mutex::new(());

/// BLAKE3 over the bits of logits, little-endian, in order: 64 hex digits.
pub fn of_logits<'a>(rows: impl IntoIterator<Item = &'a [f32]>) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::new();
    for row in rows {
        bytes.clear();
        bytes.extend(row.iter().flat_map(|x| x.to_bits().to_le_bytes()));
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// The digests of one numerics class, by name of what was computed.
///
/// With `BITFAST_BLESS=1` in the environment what is computed is written to the file instead of compared
/// (`BITFAST_BLESS=1 cargo test -p bitfast-testkit --test golden_digest -- --include-ignored`; then run it again
/// without, on every machine at hand). Only a change of the numerics version justifies that.
pub struct Stored {
    class: &'static str,
    bless: bool,
}

impl Stored {
    /// The digests of `class` in `fixtures/digests.json`.
    pub fn of(class: &'static str) -> Self {
        Self { class, bless: std::env::var("BITFAST_BLESS").is_ok_and(|v| v == "1") }
    }

    /// Compares `found`, by name, with the file, or blesses it; names every difference. `how` says on what it
    /// was computed.
    pub fn check(&self, how: &str, found: &BTreeMap<String, String>) {
        let _one_at_a_time = self.bless.then(|| BLESSING.lock());
        let mut all: BTreeMap<String, BTreeMap<String, String>> = fixtures::json(FILE);
        let stored = all.entry(self.class.to_owned()).or_default();
        if self.bless {
            stored.extend(found.clone());
            let text = serde_json::to_string_pretty(&all).expect("maps of strings");
            std::fs::write(fixtures::path(FILE), text + "\n").expect("the fixtures are writable");
            return;
        }
        let mut differences = String::new();
        for (name, digest) in found {
            let want = stored.get(name).map_or("nothing", String::as_str);
            if want != digest {
                let _ = writeln!(differences, "{name}: found {digest}, stored is {want}");
            }
        }
        assert!(
            differences.is_empty(),
            "class {}, on {how}:\n{differences}These bits were promised to every machine of the class. If the \
             contract was changed on purpose, raise the numerics version and set BITFAST_BLESS=1.",
            self.class
        );
    }
}
