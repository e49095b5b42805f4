//! The control endpoints: Bitfast's, or what stock vLLM has of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::client::Client;
use crate::error::{Error, Result};

/// Whose control endpoints a server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// `/debug/...`
    Bitfast,
    /// `/sleep`, `/wake_up`, `/metrics` and so on.
    Vllm,
}

/// A server under control.
#[derive(Clone)]
pub struct Control {
    /// Requests go through it too.
    pub client: Client,
    /// What it speaks.
    pub dialect: Dialect,
}

/// What a server says about itself.
#[derive(Clone, Debug, Serialize)]
pub struct ServerConfig {
    /// Its address.
    pub endpoint: String,
    /// Whose control endpoints it has.
    pub control: Dialect,
    /// Engines that share its requests.
    pub data_parallel_size: usize,
    /// Devices of one layer.
    pub tensor_parallel_size: usize,
    /// Groups of layers.
    pub pipeline_parallel_size: usize,
    /// Devices in all.
    pub world_size: usize,
    /// Size of the vocabulary, where told.
    pub vocab_size: Option<u32>,
    /// Of the server.
    pub version: Option<String>,
    /// What it runs on.
    pub device: Option<String>,
    /// Equal ones promise equal bits.
    pub fingerprint: Option<String>,
    /// All that it says.
    pub all: Value,
}

/// Requests in a server, by its own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchInfo {
    /// In steps.
    pub running: u64,
    /// Not yet.
    pub waiting: u64,
}

/// A step, by the server's account.
#[derive(Clone, Debug, Deserialize)]
pub struct StepStat {
    /// Data-parallel rank.
    #[serde(default)]
    pub engine: usize,
    /// Number of the step, in its engine.
    pub id: u64,
    /// From scheduling to commit.
    pub wall_ms: f64,
    /// The model's part of it.
    #[serde(default)]
    pub device_ms: Option<f64>,
    /// Prompt tokens.
    pub prefill_tokens: u64,
    /// Sequences that decoded.
    pub decode_tokens: u64,
    /// Sequences.
    pub batch_size: u64,
}

/// Ids of the last steps, by engine.
pub type LastSteps = BTreeMap<usize, u64>;

/// Tries of a wake-up, and the time between them.
const WAKE_TRIES: usize = 5;
const WAKE_PAUSE: Duration = Duration::from_millis(200);

impl Control {
    /// Asks a server what it is; the lines say what cannot be had from it.
    pub async fn detect(client: Client) -> Result<(Self, ServerConfig, Vec<String>)> {
        let reply = client.get("/debug/config").await?;
        match reply.status {
            200 => {
                let all = reply.json()?;
                let config = config_of(&client, Dialect::Bitfast, &all, all.clone());
                Ok((Self { client, dialect: Dialect::Bitfast }, config, Vec::new()))
            }
            404 | 405 => Self::detect_vllm(client).await,
            _ => Err(reply.refusal()),
        }
    }

    async fn detect_vllm(client: Client) -> Result<(Self, ServerConfig, Vec<String>)> {
        let at = client.endpoint().to_string();
        let mut notes = vec![
            format!(
                "{at} has no /debug routes: falling back to vLLM's own (/sleep?level=0&mode=keep, /wake_up?tags=scheduling)"
            ),
            format!("{at}: no server step times and no trace download; times are the client's alone"),
        ];
        let info = client.get("/server_info?config_format=json").await?;
        let all = if info.status == 200 { info.json()? } else { Value::Null };
        if all.is_null() {
            notes.push(format!(
                "{at} has no /server_info (HTTP {}): taken as one data-parallel rank; vLLM has it with VLLM_SERVER_DEV_MODE=1",
                info.status
            ));
        }
        let parallel = all.pointer("/vllm_config/parallel_config").cloned();
        // Older versions answer with the config's text.
        let parallel = parallel.unwrap_or_else(|| all["vllm_config"].as_str().map_or(Value::Null, from_text));
        let mut config = config_of(&client, Dialect::Vllm, &parallel, all);
        let version = client.get("/version").await?;
        if version.status == 200 {
            config.version = version.json()?["version"].as_str().map(str::to_string);
        }
        let sleeping = client.get("/is_sleeping").await?;
        if sleeping.status != 200 {
            return Err(Error::Cannot(format!(
                "{at} has neither /debug/config nor /is_sleeping (HTTP {}): scheduling cannot be paused; vLLM needs \
                 VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode",
                sleeping.status
            )));
        }
        Ok((Self { client, dialect: Dialect::Vllm }, config, notes))
    }

    /// Stops scheduling; requests queue.
    pub async fn pause(&self) -> Result {
        let route = match self.dialect {
            Dialect::Bitfast => "/debug/sleep?level=0",
            Dialect::Vllm => "/sleep?level=0&mode=keep",
        };
        self.post(route).await
    }

    /// Starts scheduling again; one try, as it is part of what is timed.
    pub async fn wake(&self) -> Result {
        let route = match self.dialect {
            Dialect::Bitfast => "/debug/wake_up",
            Dialect::Vllm => "/wake_up?tags=scheduling",
        };
        self.post(route).await
    }

    /// Starts scheduling again, trying until it is done.
    pub async fn wake_surely(&self) -> Result {
        let mut last = Ok(());
        for attempt in 0..WAKE_TRIES {
            if attempt > 0 {
                sleep(WAKE_PAUSE).await;
            }
            last = self.wake().await;
            if last.is_ok() {
                break;
            }
        }
        last
    }

    /// Whether the server says that it sleeps; `None` where it does not say.
    pub async fn is_sleeping(&self) -> Option<bool> {
        let reply = self.client.get("/is_sleeping").await.ok().filter(|r| r.status == 200)?;
        reply.json().ok()?["is_sleeping"].as_bool()
    }

    /// Forgets every cached prefix.
    pub async fn reset_prefix_cache(&self) -> Result {
        match self.dialect {
            Dialect::Bitfast => self.post("/debug/reset_prefix_cache").await,
            Dialect::Vllm => self.post("/reset_prefix_cache").await,
        }
    }

    /// Counts the requests in the server.
    pub async fn batch_info(&self) -> Result<BatchInfo> {
        match self.dialect {
            Dialect::Bitfast => {
                let reply = self.client.get("/debug/batch_info").await?;
                let body = reply.json()?;
                let number = |name: &str| {
                    body[name]
                        .as_u64()
                        .ok_or_else(|| Error::answer(&reply.url, format!("no number {name:?}: {body}")))
                };
                Ok(BatchInfo { running: number("num_running")?, waiting: number("num_waiting")? })
            }
            Dialect::Vllm => {
                let reply = self.client.get("/metrics").await?;
                if reply.status != 200 {
                    return Err(reply.refusal());
                }
                let text = String::from_utf8_lossy(&reply.body);
                let sum = |name: &str| {
                    metric(&text, name).ok_or_else(|| Error::answer(&reply.url, format!("no metric {name}")))
                };
                let running = sum("vllm:num_requests_running")?;
                Ok(BatchInfo { running, waiting: sum("vllm:num_requests_waiting")? })
            }
        }
    }

    /// Records of the steps after `since`; nothing where the server keeps none.
    pub async fn steps(&self, since: &LastSteps) -> Result<Vec<StepStat>> {
        #[derive(Deserialize)]
        struct Steps {
            steps: Vec<StepStat>,
        }
        if self.dialect == Dialect::Vllm {
            return Ok(Vec::new());
        }
        let first = since.values().min().copied().unwrap_or(0);
        let reply = self.client.get(&format!("/debug/step_stats?since={first}")).await?;
        if matches!(reply.status, 404 | 405) {
            return Ok(Vec::new());
        }
        if reply.status != 200 {
            return Err(reply.refusal());
        }
        let parsed: Steps = serde_json::from_slice(&reply.body)
            .map_err(|e| Error::answer(&reply.url, format!("cannot be read: {e}")))?;
        let after = |s: &StepStat| s.id > since.get(&s.engine).copied().unwrap_or(0);
        Ok(parsed.steps.into_iter().filter(after).collect())
    }

    /// Whether the server tells the times of its steps.
    pub async fn keeps_steps(&self) -> Result<bool> {
        let route = format!("/debug/step_stats?since={}", u32::MAX);
        Ok(self.dialect == Dialect::Bitfast && self.client.get(&route).await?.status == 200)
    }

    /// Brings the ids of the last steps up to now.
    pub async fn look_at_steps(&self, last: &mut LastSteps) -> Result {
        for step in self.steps(last).await? {
            let id = last.entry(step.engine).or_insert(0);
            *id = step.id.max(*id);
        }
        Ok(())
    }

    /// Starts the profiler.
    pub async fn profile_start(&self, prefix: &str) -> Result {
        match self.dialect {
            Dialect::Bitfast => self.post(&format!("/debug/profile/start?prefix={prefix}")).await,
            Dialect::Vllm => self.post("/start_profile").await,
        }
    }

    /// Stops it; its files are complete, or will be soon.
    pub async fn profile_stop(&self) -> Result {
        match self.dialect {
            Dialect::Bitfast => self.post("/debug/profile/stop").await,
            Dialect::Vllm => self.post("/stop_profile").await,
        }
    }

    async fn post(&self, route: &str) -> Result {
        let reply = self.client.post(route, "").await?;
        if reply.status == 200 { Ok(()) } else { Err(reply.refusal()) }
    }
}

fn config_of(client: &Client, control: Dialect, parallel: &Value, all: Value) -> ServerConfig {
    let size = |name: &str| parallel[name].as_u64().map_or(1, |n| n.clamp(1, 1 << 16) as usize);
    let text = |name: &str| all[name].as_str().map(str::to_string);
    ServerConfig {
        endpoint: client.endpoint().to_string(),
        control,
        data_parallel_size: size("data_parallel_size"),
        tensor_parallel_size: size("tensor_parallel_size"),
        pipeline_parallel_size: size("pipeline_parallel_size"),
        world_size: size("world_size"),
        vocab_size: all["vocab_size"].as_u64().and_then(|n| u32::try_from(n).ok()),
        version: text("version"),
        device: text("device"),
        fingerprint: text("fingerprint"),
        all,
    }
}

/// The sizes in the text of vLLM's config.
fn from_text(text: &str) -> Value {
    let size = |name: &str| {
        let rest = text.split(&format!("{name}=")).nth(1).unwrap_or_default();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(1)
    };
    let (data, tensor) = (size("data_parallel_size"), size("tensor_parallel_size"));
    let pipeline = size("pipeline_parallel_size");
    json!({
        "data_parallel_size": data, "tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline,
        "world_size": data * tensor * pipeline,
    })
}

/// A gauge of Prometheus' text format, summed over its labels.
pub(crate) fn metric(text: &str, name: &str) -> Option<u64> {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // The next character ends the name: a longer name is another gauge.
        let value = match rest.chars().next()? {
            '{' => rest.rsplit_once('}')?.1,
            ' ' => rest,
            _ => return None,
        };
        value.split_whitespace().next()?.parse::<f64>().ok()
    });
    values.reduce(|a, b| a + b).map(|sum| sum as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vllm_says() {
        let text = "# TYPE a gauge\na{e=\"0\"} 3.0\na{e=\"1\"} 4.0\na_total{e=\"0\"} 50.0\nb 1\n";
        assert_eq!((metric(text, "a"), metric(text, "b"), metric(text, "c")), (Some(7), Some(1), None));
        let sizes = from_text("ParallelConfig(tensor_parallel_size=2, data_parallel_size=16, x=1)");
        assert_eq!((&sizes["data_parallel_size"], &sizes["world_size"]), (&json!(16), &json!(32)));
    }
}
