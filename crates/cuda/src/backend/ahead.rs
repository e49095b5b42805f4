//! What is made ready before the first step: kernels, room for every step's inputs, captured steps.

use bitfast_ops::Result;

use super::CudaBackend;
use super::graphs::{State, buckets};
use super::kernels::Phase;
use super::memory::failed;
use super::plan::{nobodys, partial_bytes};
use super::step::Most;
use crate::driver::Graph;
use crate::sampler::Sampler;

/// Every tile choice of a linear changes at a multiple of this many rows, above the small ones.
const PLAN_ROWS: usize = 128;
/// Row counts at which the choice for few rows changes.
const FEW_ROWS: [usize; 8] = [1, 9, 17, 33, 49, 65, 97, 193];
/// Keys of one split of attention.
const SPLIT_KEYS: usize = bitfast_ops::contract::ATTN_SPLIT_KEYS;

type Body<'a> = dyn FnMut(&mut CudaBackend) -> Result<()> + 'a;

impl CudaBackend {
    /// Device memory that comes to what the load took: for the sampler, and for gate and up rows.
    pub(super) fn later_bytes(&self) -> u64 {
        let (vocab, logit_rows) = (self.loaded.vocab.get(), self.loaded.logit_rows.get());
        let sampler = if vocab == 0 { 0 } else { Sampler::device_bytes(vocab, logit_rows) };
        let rows = self.loaded.most_rows.get().next_multiple_of(128);
        sampler + (rows * self.loaded.gate_up.get() * 2) as u64
    }

    /// Compiles and loads the kernels that `body` asks for at any number of rows.
    pub(super) fn load_kernels(&mut self, body: &mut Body<'_>) -> Result<()> {
        let logit_rows = self.loaded.logit_rows.get();
        for phase in [Phase::Collect, Phase::Load] {
            self.kernels.phase = phase;
            for rows in self.telling_rows() {
                self.step.pretend(rows, rows.min(logit_rows));
                body(self)?;
            }
            if phase == Phase::Collect {
                let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
                self.run(|be| be.kernels.compile(threads))?;
            }
        }
        self.kernels.phase = Phase::Run;
        Ok(())
    }

    /// Captures the steps that only decode: every padded size, for contexts of 1, 2, 4, ... splits. Their first launches are not met
    /// while somebody waits for an answer, and no address in them changes later.
    pub(super) fn capture_ahead(&mut self, body: &mut Body<'_>) -> Result<()> {
        let (seqs, positions) = (self.loaded.logit_rows.get(), self.loaded.positions.get());
        let seqs = seqs.min(self.loaded.most_rows.get());
        let kv_tokens = self.loaded.kv_tokens.get();
        let partials = self.heads.iter().map(|spec| partial_bytes(spec, seqs, kv_tokens));
        let most = Most {
            rows: self.loaded.most_rows.get(),
            seqs,
            positions,
            partial_bytes: partials.max().unwrap_or(0),
        };
        self.run(|be| be.step.make_room(&be.stream, most))?;
        if self.graphs.is_none() {
            return Ok(());
        }
        for rows in buckets(seqs) {
            let mut splits = 1;
            while splits == 1 || SPLIT_KEYS * (splits / 2) < positions {
                let longest = (SPLIT_KEYS * splits).min(positions.max(1)) - 1;
                self.upload_step(&nobodys(rows, longest))?;
                let Some(key) = self.step.graph else { break };
                if splits == 1 {
                    // Whatever a size needs, such as cuBLASLt's choice, comes with a launch that is not captured.
                    body(self)?;
                }
                let graph = self.capture(body)?;
                self.run(|be| be.stream.upload(&graph))?;
                if let Some(graphs) = &mut self.graphs {
                    graphs.set(key, State::Ready(graph));
                }
                splits *= 2;
            }
        }
        self.run(|be| be.stream.synchronize())
    }

    /// What `body` launches, without running it.
    pub(super) fn capture(&mut self, body: &mut Body<'_>) -> Result<Graph> {
        // An event between two launches would be a part of what is captured.
        let profile = self.profile.take();
        self.run(|be| be.stream.begin_capture())?;
        let ran = body(self);
        let graph = self.stream.end_capture();
        self.profile = profile;
        ran?;
        graph.map_err(failed(&self.name))
    }

    /// Every kernel that steps need is met by a run at one of these row counts.
    fn telling_rows(&self) -> Vec<usize> {
        telling_rows(self.loaded.most_rows.get())
    }
}

fn telling_rows(most: usize) -> Vec<usize> {
    let few = FEW_ROWS.into_iter().filter(|rows| *rows <= most);
    few.chain((PLAN_ROWS + 1..=most).step_by(PLAN_ROWS)).chain([most]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::LAYERS;
    use crate::linear::{LinearSpec, plan};

    /// A kernel that no telling number of rows meets would be compiled while somebody waits for an answer.
    #[test]
    fn telling_rows_meet_every_plan() {
        for most in [8, 100, 200, 512, 2048, 8192] {
            for (name, n, k, kind) in LAYERS {
                let spec = LinearSpec::new(kind, n, k);
                let told: Vec<_> = telling_rows(most).iter().map(|rows| plan(&spec, *rows, 132)).collect();
                let missed = (1..=most).find(|rows| !told.contains(&plan(&spec, *rows, 132)));
                assert_eq!(missed, None, "{name}, steps of up to {most}: rows whose kernel is not loaded");
            }
        }
    }
}
