//! The row sampler on the device: the bits of `ops::sample_row` for every row, whatever shares the step.
//!
//! Up to five launches, each only if some row needs it: a pass over all logits (NaN, the largest, Gumbel-max without filters); a
//! second one over rows with top-p or min-p; a block for each row with filters; a pass for ranks and log-sum-exp; a block for each
//! row with logprobs. Nothing is decided on the host in between. Two small kernels around them read the step's words from the host's
//! memory and write the answers there: a copy and its way to another engine and back would take longer than most steps' passes.

use bitfast_ops::{RowSample, SampleRow};

use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Pinned, Stream};
use crate::jit::{Jit, KernelSource};
use crate::rows::MATH;

mod layout;

use layout::Step;

const CARRY: &[&str] = &[include_str!("../../kernels/sampler_carry.cu")];
const SHARED: &str = include_str!("../../kernels/sampler.cuh");
const SCAN: &[&str] = &[MATH, SHARED, include_str!("../../kernels/sampler_scan.cu")];
const WEIGH: &[&str] = &[MATH, SHARED, include_str!("../../kernels/sampler_weigh.cu")];
const ORDER: &str = include_str!("../../kernels/sampler_order.cuh");
const FILTER: &[&str] = &[MATH, SHARED, ORDER, include_str!("../../kernels/sampler_filter.cu")];
const TOP: &[&str] = &[MATH, SHARED, ORDER, include_str!("../../kernels/sampler_top.cu")];

/// Tokens that a block of a row pass takes at a time, and a warp of it.
const UNIT: usize = 2048;
const GROUP: usize = 128;
/// Threads of the row passes and of the blocks that put a row in order.
const PASS_THREADS: u32 = 256;
const ORDER_THREADS: u32 = 512;

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
    fetch: Kernel,
    scan: Kernel,
    weigh: Kernel,
    filter: Kernel,
    top: Kernel,
    publish: Kernel,
    /// Changed logits of rows with filters.
    kept: Buffer,
    /// Sums of 128 weights, of one pass at a time.
    runs: Buffer,
    /// The largest of each group of neighbours, likewise.
    largest: Buffer,
    /// A step's words, and the same on the host.
    words: Buffer,
    words_host: Pinned,
    /// Answers, then best tokens; kernels write here.
    answers_host: Pinned,
    under_way: Option<Step>,
}

impl Sampler {
    /// Tokens of the largest vocabulary: a block that puts a row in order keeps six bytes of each 128 tokens in shared memory.
    pub const MAX_VOCAB: usize = 520_000;

    /// For up to `max_rows` rows of `vocab` logits a step; takes [`Self::device_bytes`] of device memory now, so that sampling never
    /// runs out of it but for the size of what requests bring along.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, vocab: usize, max_rows: usize) -> Result<Self> {
        let [carry, scan, weigh, filter, top] = Self::sources(vocab).map(|source| jit.cubin(&source));
        let carry = carry?;
        let words = max_rows * 256;
        Ok(Self {
            device: device.clone(),
            vocab,
            max_rows,
            fetch: device.kernel(&carry, "fetch", 0)?,
            scan: device.kernel(&scan?, "scan", 0)?,
            weigh: device.kernel(&weigh?, "weigh", 0)?,
            filter: device.kernel(&filter?, "filter", 0)?,
            top: device.kernel(&top?, "top", 0)?,
            publish: device.kernel(&carry, "publish", 0)?,
            kept: device.alloc(max_rows * vocab * 4)?,
            runs: device.alloc(max_rows * run_bytes(vocab))?,
            largest: device.alloc(max_rows * largest_bytes(vocab))?,
            words: device.alloc(words * 4)?,
            words_host: device.pinned(words)?,
            answers_host: device.pinned(Step::answer_words(max_rows) + max_rows * 64)?,
            under_way: None,
        })
    }

    /// Device memory that [`Self::new`] takes, nearly: the changed logits of every row.
    pub fn device_bytes(vocab: usize, max_rows: usize) -> u64 {
        (max_rows * (vocab * 4 + run_bytes(vocab) + largest_bytes(vocab) + 1024)) as u64
    }

    /// The kernels for a vocabulary, to compile them ahead of [`Self::new`].
    pub fn sources(vocab: usize) -> [KernelSource; 5] {
        let source = |name, parts, defines| KernelSource { name, parts, defines, wgmma_n: None };
        let of_vocab = || vec![("VOCAB", vocab as i64)];
        [
            source("sampler_carry", CARRY, vec![]),
            source("sampler_scan", SCAN, of_vocab()),
            source("sampler_weigh", WEIGH, of_vocab()),
            source("sampler_filter", FILTER, of_vocab()),
            source("sampler_top", TOP, of_vocab()),
        ]
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
            self.make_room(&step)?;
            self.words_host.words_mut()[..step.words.len()].copy_from_slice(&step.words);
            let (words, answers) = (step.words.len(), Step::answer_words(step.rows));
            self.carry(stream, &self.fetch, self.words_host.ptr(), self.words.ptr(), words)?;
            for pass in Pass::ALL {
                self.pass(stream, logits, &step, pass)?;
            }
            self.carry(stream, &self.publish, self.words.ptr(), self.answers_host.ptr(), answers)?;
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

    /// Makes room if rows bring long lists or ask for many tokens.
    fn make_room(&mut self, step: &Step) -> Result<()> {
        let words = step.words.len();
        if words > self.words_host.len() {
            let size = words.next_power_of_two();
            self.words = self.device.alloc(size * 4)?;
            self.words_host = self.device.pinned(size)?;
        }
        let answers = Step::answer_words(step.rows) + step.tops * 2;
        if answers > self.answers_host.len() {
            self.answers_host = self.device.pinned(answers.next_power_of_two())?;
        }
        Ok(())
    }

    /// Words from the host's memory to the device's, or back.
    fn carry(&self, stream: &Stream, kernel: &Kernel, from: u64, to: u64, words: usize) -> Result<()> {
        let blocks = words.div_ceil(4 * PASS_THREADS as usize).min(self.device.sms()) as u32;
        let launch = Launch { grid: [blocks, 1, 1], threads: PASS_THREADS, overlap: Overlap::WithPrevious };
        // SAFETY: both hold so many words. Those on the host change in the next step only, which comes after `collect`, which waits for the stream
        // before it looks at the answers; no buffer goes before.
        unsafe { kernel.launch(stream, launch, &[Arg::Ptr(from), Arg::Ptr(to), Arg::I32(words as i32)]) }
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
        self.pass(stream, logits, step, pass)
    }

    /// One kernel, if any row needs it.
    fn pass(&self, stream: &Stream, logits: &Buffer, step: &Step, pass: Pass) -> Result<()> {
        let list = step.list(pass);
        if list.len == 0 {
            return Ok(());
        }
        let words = self.words.ptr();
        let [words, rows, list_at] = [0, step.rows_at(), 4 * list.at].map(|at| Arg::Ptr(words + at as u64));
        let tops = Arg::Ptr(self.answers_host.ptr() + 4 * Step::answer_words(step.rows) as u64);
        let [logits, kept, runs, largest, answers] =
            [logits, &self.kept, &self.runs, &self.largest, &self.words].map(|buffer| Arg::Ptr(buffer.ptr()));
        let (overlap, rows_here) = (Overlap::WithPrevious, list.len as u32);
        let whole = Launch { grid: [self.parts(list.len), rows_here, 1], threads: PASS_THREADS, overlap };
        let order = Launch { grid: [rows_here, 1, 1], threads: ORDER_THREADS, overlap };
        let raw = Arg::I32((pass == Pass::WeighRaw).into());
        // SAFETY: the kernels' signatures. Rows of logits were checked; `kept`, `runs` and `largest` have room for `max_rows` rows, the answers on the
        // host for the step's tokens; the lists that rows refer to lie in `words`.
        unsafe {
            match pass {
                Pass::Scan => self.scan.launch(stream, whole, &[logits, words, rows, kept, largest, answers]),
                Pass::Weigh | Pass::WeighRaw => {
                    let args = [logits, kept, rows, list_at, raw, runs, largest, answers];
                    self.weigh.launch(stream, whole, &args)
                }
                Pass::Filter => {
                    let args = [logits, kept, rows, list_at, runs, largest, answers];
                    self.filter.launch(stream, order, &args)
                }
                Pass::Top => {
                    let args = [logits, rows, list_at, runs, largest, tops, answers];
                    self.top.launch(stream, order, &args)
                }
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

/// Bytes of one row's largest values.
fn largest_bytes(vocab: usize) -> usize {
    vocab.div_ceil(GROUP) * 4
}
