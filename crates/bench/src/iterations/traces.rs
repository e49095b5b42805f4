//! Traces of the profiler: found by exact prefix, fetched until complete, never over an older file.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::read::MultiGzDecoder;
use serde::de::IgnoredAny;
use tokio::time::{Instant, sleep};

use super::control::Dialect;
use super::{Bench, Shape};
use crate::client::Client;
use crate::error::{Error, Result};

/// Time between two tries.
const RETRY: Duration = Duration::from_millis(500);

/// Names of traces, by endpoint.
pub type Known = Vec<BTreeSet<String>>;

impl Bench<'_> {
    /// The traces that are there before we made any.
    pub(super) async fn known_traces(&self) -> Result<Known> {
        let mut known = Known::new();
        for (control, _) in &self.servers {
            let wanted = self.settings.trace_dir.is_some() && control.dialect == Dialect::Bitfast;
            known.push(if wanted { listed(&control.client).await? } else { BTreeSet::new() });
        }
        Ok(known)
    }

    /// Fetches the new traces of every shape from every endpoint that hands them out; gives the files.
    pub(super) async fn fetch_traces(
        &self,
        dir: &Path,
        shapes: &[Shape],
        known: &Known,
    ) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
        let deadline = Instant::now() + self.settings.trace_timeout;
        let mut files = Vec::new();
        for (index, (control, _)) in self.servers.iter().enumerate() {
            if control.dialect != Dialect::Bitfast {
                continue;
            }
            for shape in shapes {
                files.extend(
                    fetch(&control.client, dir, index, &shape.trace_prefix(), &known[index], deadline)
                        .await?,
                );
            }
        }
        Ok(files)
    }
}

async fn fetch(
    client: &Client,
    dir: &Path,
    endpoint: usize,
    prefix: &str,
    known: &BTreeSet<String>,
    deadline: Instant,
) -> Result<Vec<PathBuf>> {
    let url = client.url("/debug/traces");
    let mut why = format!("no trace begins with {prefix:?}");
    loop {
        let names: Vec<_> =
            listed(client).await?.difference(known).filter(|n| has_prefix(n, prefix)).cloned().collect();
        let mut complete = Vec::new();
        for name in &names {
            let reply = client.get(&format!("/debug/traces/{name}")).await?;
            match check(name, &reply.body) {
                _ if reply.status != 200 => why = reply.refusal().to_string(),
                Ok(()) => complete.push((name, reply.body)),
                Err(reason) => why = format!("{name}: {reason}"),
            }
        }
        if !names.is_empty() && complete.len() == names.len() {
            return complete.into_iter().map(|(name, body)| store(dir, endpoint, name, &body)).collect();
        }
        if Instant::now() > deadline {
            return Err(Error::answer(url, format!("traces did not become complete: {why}")));
        }
        sleep(RETRY).await;
    }
}

async fn listed(client: &Client) -> Result<BTreeSet<String>> {
    let reply = client.get("/debug/traces").await?;
    let body = reply.json()?;
    if let Some(error) = body["error"].as_str() {
        return Err(Error::answer(&reply.url, format!("no traces can be had: {error}")));
    }
    let names = body["traces"].as_array().into_iter().flatten().filter_map(|n| n.as_str());
    // A name becomes a part of a path here.
    let safe =
        |n: &&str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    Ok(names.filter(safe).map(str::to_string).collect())
}

/// `decode_ctx8_in128_bs1` is no prefix of `decode_ctx8_in128_bs16...`.
fn has_prefix(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
}

/// Whether it is whole JSON.
fn check(name: &str, body: &[u8]) -> std::result::Result<(), String> {
    let mut text = Vec::new();
    let json = if name.ends_with(".gz") {
        MultiGzDecoder::new(body).read_to_end(&mut text).map_err(|e| e.to_string())?;
        &text[..]
    } else {
        body
    };
    serde_json::from_slice::<IgnoredAny>(json).map(drop).map_err(|e| e.to_string())
}

/// Writes `endpoint{i}_{name}`, with a number where that is there already.
fn store(dir: &Path, endpoint: usize, name: &str, body: &[u8]) -> Result<PathBuf> {
    let (stem, extension) = name.find(".json").map_or((name, ""), |at| name.split_at(at));
    for number in 1.. {
        let copy = if number == 1 { String::new() } else { format!("-{number}") };
        let path = dir.join(format!("endpoint{endpoint}_{stem}{copy}{extension}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => {
                file.write_all(body).map_err(|e| Error::file(&path, e))?;
                return Ok(path);
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(Error::file(&path, e)),
        }
    }
    unreachable!("there are more numbers than files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_exact() {
        assert!(has_prefix("decode_ctx8_in1_bs1_rank0.json.gz", "decode_ctx8_in1_bs1"));
        assert!(has_prefix("decode_ctx8_in1_bs1.json", "decode_ctx8_in1_bs1"));
        assert!(!has_prefix("decode_ctx8_in1_bs16_rank0.json", "decode_ctx8_in1_bs1"));
        assert!(!has_prefix("x_decode_ctx8_in1_bs1.json", "decode_ctx8_in1_bs1"));
    }

    #[test]
    fn half_a_trace_is_none() {
        let whole = b"{\"traceEvents\":[1,2,3]}";
        let mut gz = Vec::new();
        flate2::read::GzEncoder::new(&whole[..], flate2::Compression::fast()).read_to_end(&mut gz).unwrap();
        check("a.json", whole).unwrap();
        check("a.json.gz", &gz).unwrap();
        assert!(check("a.json", &whole[..10]).is_err());
        assert!(check("a.json.gz", &gz[..gz.len() - 4]).is_err());
        assert!(check("a.json.gz", whole).is_err());
    }
}
