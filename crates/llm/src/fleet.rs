use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitfast_engine::{
    EngineHandle, EngineInfo, EngineRequest, EngineStats, Event, Health, RequestGuard, Shutdown, SleepLevel,
    SleepState, StepRecord, Transition,
};

use crate::error::{Error, Result};

/// The data-parallel engines of one model, as one: they share the weights, and each has its own threads, KV
/// cache and queue. An engine's place is its rank, from 0.
///
/// Which engine answers a request moves no bit of the answer: it enters neither sampling nor sums. (A request
/// without a seed draws one from its engine's stream, and says which.) Clones share the engines.
#[derive(Clone)]
pub struct Fleet {
    engines: Arc<[EngineHandle]>,
    /// Held from comparing loads to submitting, so that requests that come at once are spread.
    routing: Arc<Mutex<()>>,
}

impl Fleet {
    pub(crate) fn new(engines: Vec<EngineHandle>) -> Self {
        assert!(!engines.is_empty(), "a fleet of no engines");
        Self { engines: engines.into(), routing: Arc::default() }
    }

    /// Engines in it: `data_parallel_size`.
    pub fn size(&self) -> usize {
        self.engines.len()
    }

    /// The engines, by rank.
    pub fn engines(&self) -> &[EngineHandle] {
        &self.engines
    }

    /// The engine of that rank; the error names `data_parallel_rank`.
    pub fn engine(&self, rank: usize) -> Result<&EngineHandle> {
        self.engines.get(rank).ok_or_else(|| {
            let message = format!("{rank} is out of range: there are {} engines, from 0", self.size());
            Error::invalid("data_parallel_rank", message)
        })
    }

    /// The settled configuration of one engine; all have the same, but for `config.rank`, seed and cache key.
    pub fn info(&self) -> &EngineInfo {
        self.engines[0].info()
    }

    /// Tokens that the KV caches of all engines hold.
    pub fn kv_cache_tokens(&self) -> usize {
        self.engines.iter().map(|engine| engine.info().kv_cache_tokens()).sum()
    }

    /// Queues a request on the engine of rank `pinned`, else on the one with the fewest live requests (running
    /// or waiting), the lowest rank among equals. [`RequestGuard::rank`] says where it went.
    pub fn submit_with(
        &self,
        request: EngineRequest,
        pinned: Option<usize>,
        sink: Box<dyn FnMut(Event) + Send>,
    ) -> Result<RequestGuard> {
        if let Some(rank) = pinned {
            return Ok(self.engine(rank)?.submit_with(request, sink)?);
        }
        let _routing = self.routing.lock().unwrap_or_else(PoisonError::into_inner);
        let loads = self.engines.iter().map(EngineHandle::load);
        Ok(self.engines[least(loads)].submit_with(request, sink)?)
    }

    /// Aborts the live request `id`, wherever it is; false if there is none.
    pub fn abort(&self, id: &str) -> bool {
        self.engines.iter().any(|engine| engine.abort(id))
    }

    /// Aborts every request that is live now.
    pub fn abort_all(&self) {
        self.engines.iter().for_each(EngineHandle::abort_all);
    }

    /// Counters and gauges over all engines.
    pub fn stats(&self) -> EngineStats {
        self.rank_stats().into_iter().reduce(|a, b| a + b).expect("a fleet has engines")
    }

    /// Counters and gauges of each engine, by rank.
    pub fn rank_stats(&self) -> Vec<EngineStats> {
        self.engines.iter().map(EngineHandle::stats).collect()
    }

    /// Records of the steps after number `since`, of each engine by rank; steps are numbered by engine.
    pub fn step_stats(&self, since: u64) -> Vec<Vec<StepRecord>> {
        self.engines.iter().map(|engine| engine.step_stats(since)).collect()
    }

    /// Pauses all engines; deep levels return once memory has been given back. See [`EngineHandle::pause`].
    pub fn pause(&self, level: SleepLevel) -> Result<()> {
        let begun = self.engines.iter().map(|engine| engine.begin_pause(level));
        let begun = begun.collect::<Result<Vec<_>, _>>()?;
        if level > SleepLevel::Pause {
            begun.into_iter().try_for_each(Transition::wait)?;
        }
        Ok(())
    }

    /// Ends every pause, returning once all engines have their memory again. If one cannot have it, all sleep
    /// on, and [`sleep_state`](Self::sleep_state) has the reason.
    pub fn resume(&self) -> Result<()> {
        let before: Vec<SleepState> = self.engines.iter().map(EngineHandle::sleep_state).collect();
        // One after another: they share the weights, which the first one to wake reads.
        for engine in &*self.engines {
            let Err(error) = engine.resume() else { continue };
            for (engine, state) in self.engines.iter().zip(&before) {
                if let (SleepState::Asleep { level, .. }, SleepState::Awake) = (state, engine.sleep_state()) {
                    engine.pause(*level)?;
                }
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// How the engines sleep: that of the deepest sleeper, a failed attempt to wake first.
    pub fn sleep_state(&self) -> SleepState {
        let rank = |state: &SleepState| match state {
            SleepState::Awake => (false, None),
            SleepState::Asleep { level, failed_wake } => (failed_wake.is_some(), Some(*level)),
        };
        self.engines.iter().map(EngineHandle::sleep_state).max_by_key(rank).expect("a fleet has engines")
    }

    /// Whether any engine is paused.
    pub fn is_paused(&self) -> bool {
        self.engines.iter().any(EngineHandle::is_paused)
    }

    /// Forgets every cached prefix of every engine.
    pub fn reset_prefix_cache(&self) {
        self.engines.iter().for_each(EngineHandle::reset_prefix_cache);
    }

    /// Records steps and ops of all engines, each into a file `{prefix}.rank{rank}.json.gz` (with a number where that
    /// is there) under `profile_dir`. See [`EngineHandle::start_profile`].
    pub fn start_profile(&self, prefix: &str) -> Result<()> {
        for (rank, engine) in self.engines.iter().enumerate() {
            let Err(error) = engine.start_profile(prefix) else { continue };
            for begun in &self.engines[..rank] {
                if let Ok(file) = begun.stop_profile() {
                    let _ = std::fs::remove_file(file);
                }
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Ends the recording of every engine; gives the files, complete, by rank.
    pub fn stop_profile(&self) -> Result<Vec<PathBuf>> {
        // Every engine stops, also after one that fails to write.
        let stopped: Vec<_> = self.engines.iter().map(EngineHandle::stop_profile).collect();
        Ok(stopped.into_iter().collect::<Result<_, _>>()?)
    }

    /// Whether there is a recording.
    pub fn is_profiling(&self) -> bool {
        self.engines.iter().any(EngineHandle::is_profiling)
    }

    /// Whether all engines can serve: the worst of their states, and of the dead ones the first one's reason.
    pub fn health(&self) -> Health {
        let mut worst = Health::Serving;
        for (rank, engine) in self.engines.iter().enumerate() {
            match engine.health() {
                Health::Dead(reason) if self.size() == 1 => return Health::Dead(reason),
                Health::Dead(reason) => return Health::Dead(format!("engine {rank}: {reason}")),
                Health::Stopping => worst = Health::Stopping,
                Health::Serving => {}
            }
        }
        worst
    }

    /// Ends all engines and waits for them, and ends a recording; true when all ended within `timeout`. See [`EngineHandle::shutdown`].
    pub fn shutdown(&self, how: Shutdown, timeout: Duration) -> bool {
        let start = Instant::now();
        let ended = std::thread::scope(|scope| {
            let ends: Vec<_> = self
                .engines
                .iter()
                .map(|engine| {
                    scope.spawn(move || engine.shutdown(how, timeout.saturating_sub(start.elapsed())))
                })
                .collect();
            // All are joined before the answer: `all` would stop at the first refusal.
            ends.into_iter().map(|end| end.join().unwrap_or(false)).fold(true, |all, ended| all & ended)
        });
        if self.is_profiling() {
            // Nobody is left to be told of a failure.
            let _ = self.stop_profile();
        }
        ended
    }
}

/// Index of the least, the first among equals.
fn least(loads: impl Iterator<Item = usize>) -> usize {
    loads.enumerate().min_by_key(|(rank, load)| (*load, *rank)).expect("a fleet has engines").0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_loaded_engine_is_chosen_and_the_lowest_rank_among_equals() {
        for (loads, chosen) in [(&[3][..], 0), (&[0, 0, 0], 0), (&[2, 1, 1], 1), (&[5, 4, 3, 3], 2)] {
            assert_eq!(least(loads.iter().copied()), chosen, "{loads:?}");
        }
    }
}
