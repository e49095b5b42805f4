//! Two reports side by side.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// What is compared, and whether more of it is better.
const KEYS: &[(&str, bool)] = &[
    ("request_throughput", true),
    ("request_goodput", true),
    ("output_throughput", true),
    ("total_token_throughput", true),
    ("mean_ttft_ms", false),
    ("median_ttft_ms", false),
    ("p99_ttft_ms", false),
    ("mean_tpot_ms", false),
    ("median_tpot_ms", false),
    ("p99_tpot_ms", false),
    ("median_itl_ms", false),
    ("p99_itl_ms", false),
    ("median_e2el_ms", false),
    ("p99_e2el_ms", false),
];

/// What has to be the same for a comparison to mean anything.
const SETUP: &[&str] = &[
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "total_input_tokens",
    "total_output_tokens",
    "failed",
];

/// Compares two files that `bench serve` wrote (this one's or vLLM's).
pub fn compare(a: &Path, b: &Path) -> Result<String> {
    let (left, right) = (read(a)?, read(b)?);
    let mut lines = vec![format!("A: {}\nB: {}", a.display(), b.display())];
    for key in SETUP {
        if left.get(key) != right.get(key) {
            let shown = |v: &Value| v.get(*key).map_or("not told".to_string(), Value::to_string);
            lines.push(format!("note: {key} differs: {} and {}", shown(&left), shown(&right)));
        }
    }
    lines.push(format!("{:<24} {:>12} {:>12} {:>9}", "", "A", "B", "B to A"));
    for (key, more_is_better) in KEYS {
        let (Some(x), Some(y)) = (left[key].as_f64(), right[key].as_f64()) else { continue };
        if x == 0.0 && y != 0.0 {
            // A run in which nothing succeeded has zeros.
            lines.push(format!("{key:<24} {x:>12.2} {y:>12.2} {:>9} not comparable", "-"));
            continue;
        }
        let percent = if x == 0.0 { 0.0 } else { (y / x - 1.0) * 100.0 };
        let word = match percent {
            p if p.abs() < 0.05 => "same",
            p if (p > 0.0) == *more_is_better => "better",
            _ => "worse",
        };
        lines.push(format!("{key:<24} {x:>12.2} {y:>12.2} {percent:>+8.1}% {word}"));
    }
    Ok(lines.join("\n"))
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::file(path, e))?;
    if value.get("request_throughput").is_none() {
        return Err(Error::file(path, "is no report of bench serve"));
    }
    Ok(value)
}
