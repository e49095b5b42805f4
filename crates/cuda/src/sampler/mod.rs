//! The row sampler on the device: the bits of `ops::sample_row` for every row, whatever shares the step.
//!
//! Up to five launches, each only if some row needs it: a pass over all logits (NaN, the largest, Gumbel-max without filters); a
//! second one over rows with top-p or min-p; a block for each row with filters; a pass for ranks and log-sum-exp; a block for each
//! row with logprobs. Nothing is decided on the host in between.

use bitfast_ops::{RowSample, SampleRow};

use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Pinned, Stream};
use crate::jit::{Jit, KernelSource};
use crate::rows::MATH;

mod layout;

use layout::Step;

const SHARED: &str = include_str!("../../kernels/sampler.cuh");
const SCAN: &[&str] = &[MATH, SHARED, include_str!("../../kernels/sampler_scan.cu")];
const WEIGH: &[&str] = &[MATH, SHARED, include_str!("../../kernels/sampler_weigh.cu")];
const SELECT: &[&str] = &[MATH, SHARED, include_str!("../../kernels/sampler_select.cu")];

/// Tokens that a block of a row pass takes at a time.
const UNIT: usize = 2048;
/// Threads of the row passes and of the blocks that put a row in order.
const PASS_THREADS: u32 = 256;
const ORDER_THREADS: u32 = 1024;

/// A launch of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// NaN, the largest logits, Gumbel-max without filters.
    Scan,
    /// Sums of weights and Gumbel-max of rows with top-p or min-p.
    Weigh,
    /// Rows with top-k or top-p.
    Filter,
    /// Ranks and sums of weights of rows with logprobs.
    WeighRaw,
    /// Log-sum-exp and best tokens of the same.
    Top,
}

impl Pass {
    const ALL: [Self; 5] = [Self::Scan, Self::Weigh, Self::Filter, Self::WeighRaw, Self::Top];
}

/// The compiled sampler of a vocabulary, with room for a step's rows.
pub struct Sampler {
    device: Device,
    vocab: usize,
    max_rows: usize,
    scan: Kernel,
    weigh: Kernel,
    filter: Kernel,
    top: Kernel,
    /// Changed logits of rows with filters.
    kept: Buffer,
    /// Sums of 128 weights, of one pass at a time.
    runs: Buffer,
    /// A step's words, and the same on the host.
    words: Buffer,
    words_host: Pinned,
    tops: Buffer,
    /// Answers, then best tokens.
    answers_host: Pinned,
    under_way: Option<Step>,
}

impl Sampler {
    /// For up to `max_rows` rows of `vocab` logits a step; takes [`Self::device_bytes`] of device memory now, so that sampling never
    /// runs out of it but for the size of what requests bring along.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, vocab: usize, max_rows: usize) -> Result<Self> {
        let [scan, weigh, select] = Self::sources(vocab).map(|source| jit.cubin(&source));
        let select = select?;
        let words = max_rows * 256;
        Ok(Self {
            device: device.clone(),
            vocab,
            max_rows,
            scan: device.kernel(&scan?, "scan", 0)?,
            weigh: device.kernel(&weigh?, "weigh", 0)?,
            filter: device.kernel(&select, "filter", 0)?,
            top: device.kernel(&select, "top", 0)?,
            kept: device.alloc(max_rows * vocab * 4)?,
            runs: device.alloc(max_rows * run_bytes(vocab))?,
            words: device.alloc(words * 4)?,
            words_host: device.pinned(words)?,
            tops: device.alloc(max_rows * 32 * 8)?,
            answers_host: device.pinned(Step::answer_words(max_rows) + max_rows * 64)?,
            under_way: None,
        })
    }

    /// Device memory that [`Self::new`] takes, nearly: the changed logits of every row.
    pub fn device_bytes(vocab: usize, max_rows: usize) -> u64 {
        (max_rows * (vocab * 4 + run_bytes(vocab) + 1024 + 32 * 8)) as u64
    }

    /// The kernels for a vocabulary, to compile them ahead of [`Self::new`].
    pub fn sources(vocab: usize) -> [KernelSource; 3] {
        let source =
            |name, parts| KernelSource { name, parts, defines: vec![("VOCAB", vocab as i64)], wgmma_n: None };
        [source("sampler_scan", SCAN), source("sampler_weigh", WEIGH), source("sampler_select", SELECT)]
    }

    /// [`Self::enqueue`], then [`Self::collect`].
    ///
    /// # Errors
    /// The driver's.
    pub fn run(
        &mut self,
        stream: &Stream,
        logits: &Buffer,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<RowSample>> {
        self.enqueue(stream, logits, rows)?;
        self.collect(stream)
    }

    /// Queues the answers to `rows` behind what makes `logits` (`[rows, vocab]` fp32; left as they are) and returns without waiting.
    /// Rows may share logits.
    ///
    /// Panics on more rows than there is room for, a row outside `logits`, a scored token outside the vocabulary, or if the last
    /// step was not collected.
    ///
    /// # Errors
    /// The driver's.
    pub fn enqueue(&mut self, stream: &Stream, logits: &Buffer, rows: &[SampleRow<'_>]) -> Result<()> {
        assert!(self.under_way.is_none(), "the last step's answers were not collected");
        assert!(rows.len() <= self.max_rows, "{} rows, room for {}", rows.len(), self.max_rows);
        let held = logits.len() / (self.vocab * 4);
        for row in rows {
            assert!((row.logit_row as usize) < held, "row {} of {held} rows of logits", row.logit_row);
        }
        let step = Step::new(self.vocab, rows);
        if !rows.is_empty() {
            self.upload(stream, &step)?;
            self.launch(stream, logits, &step)?;
            let answers = Step::answer_words(step.rows);
            // SAFETY: `collect` waits for the stream before it looks at the answers, and no buffer goes before.
            unsafe {
                self.answers_host.copy_from(stream, &self.words, answers, 0)?;
                if step.tops > 0 {
                    self.answers_host.copy_from(stream, &self.tops, 2 * step.tops, answers)?;
                }
            }
        }
        self.under_way = Some(step);
        Ok(())
    }

    /// Waits for the step that was queued last and returns its answers, in the order of its rows.
    ///
    /// Panics if none is under way.
    ///
    /// # Errors
    /// The driver's, also those of earlier kernels.
    pub fn collect(&mut self, stream: &Stream) -> Result<Vec<RowSample>> {
        let step = self.under_way.take().expect("a step was queued");
        stream.synchronize()?;
        let (answers, tops) = self.answers_host.words().split_at(Step::answer_words(step.rows));
        Ok(step.parse(answers, tops))
    }

    /// Copies a step's words to the device; makes room if rows bring long lists or ask for many tokens.
    fn upload(&mut self, stream: &Stream, step: &Step) -> Result<()> {
        let words = step.words.len();
        if words > self.words_host.len() {
            let size = words.next_power_of_two();
            self.words = self.device.alloc(size * 4)?;
            self.words_host = self.device.pinned(size)?;
        }
        if step.tops * 8 > self.tops.len() {
            self.tops = self.device.alloc((step.tops * 8).next_power_of_two())?;
        }
        let answers = Step::answer_words(step.rows) + step.tops * 2;
        if answers > self.answers_host.len() {
            self.answers_host = self.device.pinned(answers.next_power_of_two())?;
        }
        self.words_host.words_mut()[..words].copy_from_slice(&step.words);
        // SAFETY: the host words change in the next step only, which comes after `collect`.
        unsafe { self.words_host.copy_to(stream, words, &self.words) }
    }

    /// The kernels of the step under way, in order, and how many rows each one works on.
    ///
    /// Panics if none is under way.
    pub fn passes(&self) -> Vec<(Pass, usize)> {
        let step = self.under_way.as_ref().expect("a step was queued");
        Pass::ALL.into_iter().map(|pass| (pass, step.list(pass).len)).filter(|(_, rows)| *rows > 0).collect()
    }

    /// Launches one of [`Self::passes`] once more, to time it; answers that were not collected before are lost.
    ///
    /// Panics if no step is under way.
    ///
    /// # Errors
    /// The driver's.
    pub fn repeat(&self, stream: &Stream, logits: &Buffer, pass: Pass) -> Result<()> {
        let step = self.under_way.as_ref().expect("a step was queued");
        self.pass(stream, logits, step, pass, Overlap::WithPrevious)
    }

    fn launch(&self, stream: &Stream, logits: &Buffer, step: &Step) -> Result<()> {
        for pass in Pass::ALL {
            // The first one follows a copy.
            let overlap = if pass == Pass::Scan { Overlap::None } else { Overlap::WithPrevious };
            self.pass(stream, logits, step, pass, overlap)?;
        }
        Ok(())
    }

    /// One kernel, if any row needs it.
    fn pass(
        &self,
        stream: &Stream,
        logits: &Buffer,
        step: &Step,
        pass: Pass,
        overlap: Overlap,
    ) -> Result<()> {
        let list = step.list(pass);
        if list.len == 0 {
            return Ok(());
        }
        let words = self.words.ptr();
        let (answers, rows, list_at) = (words, words + step.rows_at() as u64, words + list.at as u64 * 4);
        let [logits, kept, runs, tops] = [logits, &self.kept, &self.runs, &self.tops].map(Buffer::ptr);
        let whole =
            Launch { grid: [self.parts(list.len), list.len as u32, 1], threads: PASS_THREADS, overlap };
        let order = Launch { grid: [list.len as u32, 1, 1], threads: ORDER_THREADS, overlap };
        let [logits, kept, runs, tops, words, answers, rows, list_at] =
            [logits, kept, runs, tops, words, answers, rows, list_at].map(Arg::Ptr);
        let raw = Arg::I32((pass == Pass::WeighRaw).into());
        // SAFETY: the kernels' signatures. Rows of logits were checked; `kept` and `runs` have room for `max_rows` rows, `tops` for the step's
        // tokens; the lists that rows refer to lie in `words`.
        unsafe {
            match pass {
                Pass::Scan => self.scan.launch(stream, whole, &[logits, words, rows, kept, answers]),
                Pass::Weigh | Pass::WeighRaw => {
                    self.weigh.launch(stream, whole, &[logits, kept, rows, list_at, raw, runs, answers])
                }
                Pass::Filter => self.filter.launch(stream, order, &[kept, rows, list_at, runs, answers]),
                Pass::Top => self.top.launch(stream, order, &[logits, rows, list_at, runs, tops, answers]),
            }
        }
    }

    /// Blocks of a row in a pass over `rows` rows: as many as run at once, six on a multiprocessor.
    fn parts(&self, rows: usize) -> u32 {
        (6 * self.device.sms() / rows).clamp(1, self.vocab.div_ceil(UNIT)) as u32
    }
}

/// Bytes of one row's sums of 128 weights, eight for each chunk of 1024.
fn run_bytes(vocab: usize) -> usize {
    vocab.div_ceil(1024) * 8 * 4
}
