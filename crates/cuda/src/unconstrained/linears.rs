use std::collections::HashMap;
use std::ffi::{c_int, c_void};

use super::library::{CublasLt, Owned, check};
use crate::driver::{Buffer, CublasLtChoice, Stream};
use crate::linear::{LinearSpec, Output};
use crate::{CudaError, Result};

/// Memory for partial sums of one product, bytes.
const WORKSPACE: usize = 32 << 20;
/// More than the second-level cache of an H100 holds, bytes.
const COLD: usize = 64 << 20;
/// Timed launches of a candidate, in turns; the fastest counts.
const ROUNDS: usize = 4;
/// A candidate must need less than this part of the first one's time to be taken instead: a few launches tell no smaller difference.
const CLEARLY: f32 = 0.97;

/// Rows of steps that a token budget fills are multiples of this.
pub const FULL_STEP: usize = 1024;

/// `CUDA_R_32F`, `CUDA_R_16BF`.
const TYPE_F32: c_int = 0;
const TYPE_BF16: c_int = 14;

/// Which of the algorithms that the heuristics propose for a shape is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The one they expect to be the fastest.
    First,
    /// The fastest of the first `of`, by a measurement with cold caches when a shape is met first. Beyond `rows` rows only shapes of whole
    /// [`FULL_STEP`]s are measured, and the others have the first: it costs more there than it gains, and hardly any comes twice.
    Fastest {
        /// Candidates.
        of: usize,
        /// Most rows that are measured whatever they are.
        rows: usize,
    },
}

/// Linear layers `Y[rows, n] = X[rows, k] W[n, k]^T` by cuBLASLt: bf16 in, fp32 sums, bf16 or fp32 out. Work is queued on one stream at a time.
pub struct Linears {
    lt: CublasLt,
    choice: Choice,
    product: Owned,
    preference: Owned,
    workspace: Buffer,
    /// What timings write to empty the caches.
    cold: Option<Buffer>,
    /// By shape; never iterated.
    plans: HashMap<Shape, Plan>,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    k: usize,
    rows: usize,
    output: Output,
}

/// A shape's matrices, column by column as the library wants them: W is `[k, n]` and transposed, X `[k, rows]`, Y `[n, rows]`.
struct Layouts {
    w: Owned,
    x: Owned,
    y: Owned,
}

struct Plan {
    layouts: Layouts,
    algorithm: [u64; 8],
}

/// Addresses of one product.
#[derive(Clone, Copy)]
struct Operands {
    w: u64,
    x: u64,
    y: u64,
}

impl Linears {
    /// Allocates the workspace.
    ///
    /// # Errors
    /// The library's or the driver's.
    pub fn new(lt: &CublasLt, choice: Choice) -> Result<Self> {
        const COMPUTE_F32: c_int = 68;
        const TRANSPOSE_A: c_int = 3;
        const MAX_WORKSPACE_BYTES: c_int = 1;
        let (api, transposed) = (lt.api(), 1 as c_int);
        let product = Owned::new(lt, "cublasLtMatmulDescCreate", api.product_destroy, |api, out| {
            // SAFETY: writes one handle.
            unsafe { (api.product_create)(out, COMPUTE_F32, TYPE_F32) }
        })?;
        let value = (&raw const transposed).cast::<c_void>();
        // SAFETY: the attribute is an int, whose size is passed along.
        let set = unsafe { (api.product_set)(product.handle(), TRANSPOSE_A, value, size_of::<c_int>()) };
        check("cublasLtMatmulDescSetAttribute", set)?;
        let destroy = api.preference_destroy;
        let preference = Owned::new(lt, "cublasLtMatmulPreferenceCreate", destroy, |api, out| {
            // SAFETY: writes one handle.
            unsafe { (api.preference_create)(out) }
        })?;
        let bytes = WORKSPACE as u64;
        let value = (&raw const bytes).cast::<c_void>();
        // SAFETY: the attribute is a u64, whose size is passed along.
        let set = unsafe { (api.preference_set)(preference.handle(), MAX_WORKSPACE_BYTES, value, 8) };
        check("cublasLtMatmulPreferenceSetAttribute", set)?;
        let cold = match choice {
            Choice::First => None,
            Choice::Fastest { .. } => Some(lt.device().alloc(COLD)?),
        };
        let workspace = lt.device().alloc(WORKSPACE)?;
        Ok(Self { lt: lt.clone(), choice, product, preference, workspace, cold, plans: HashMap::new() })
    }

    /// The library's major, minor and patch version.
    pub fn version(&self) -> [i32; 3] {
        self.lt.version()
    }

    /// Queues `y = x w^T`: `x` bf16 `[rows, k]`, `w` bf16 `[n, k]` at byte `w_offset`, `y` `[rows, n]`. The first call for a shape chooses its
    /// algorithm and may wait for the stream: it cannot be captured, all others can.
    ///
    /// # Errors
    /// The library's (no algorithm for the shape among them) or the driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn multiply(
        &mut self,
        stream: &Stream,
        spec: &LinearSpec,
        x: &Buffer,
        w: &Buffer,
        w_offset: usize,
        y: &Buffer,
        rows: usize,
    ) -> Result<()> {
        let LinearSpec { n, k, output, .. } = *spec;
        assert!(output != Output::SiluMul, "cuBLASLt does not multiply gates and ups: {spec:?}");
        assert!(rows > 0 && x.len() >= rows * k * 2, "x holds {} bytes, {rows} x {k} needed", x.len());
        assert!(w.len() >= w_offset + n * k * 2, "w holds {} bytes, {n} x {k} needed", w.len());
        assert!(y.len() >= rows * n * spec.output_bytes(), "y holds {} bytes, {rows} x {n} needed", y.len());
        let shape = Shape { n, k, rows, output };
        let operands = Operands { w: w.ptr() + w_offset as u64, x: x.ptr(), y: y.ptr() };
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(stream, shape, operands)?;
            self.plans.insert(shape, plan);
        }
        let plan = &self.plans[&shape];
        self.launch(stream, &plan.layouts, &plan.algorithm, operands)
    }

    fn plan(&self, stream: &Stream, shape: Shape, operands: Operands) -> Result<Plan> {
        let layouts = self.layouts(shape)?;
        let wanted = match self.choice {
            Choice::Fastest { of, rows } if shape.rows <= rows || shape.rows.is_multiple_of(FULL_STEP) => {
                of.max(1)
            }
            Choice::First | Choice::Fastest { .. } => 1,
        };
        let candidates = self.candidates(&layouts, wanted)?;
        let none = || CudaError::Call {
            call: "cublasLtMatmulAlgoGetHeuristic",
            name: "no algorithm".to_owned(),
            message: format!("{shape:?}"),
        };
        let algorithm = match &candidates[..] {
            [] => return Err(none()),
            [only] => only.algorithm,
            several => self.fastest(stream, &layouts, several, operands)?,
        };
        Ok(Plan { layouts, algorithm })
    }

    fn layouts(&self, shape: Shape) -> Result<Layouts> {
        let layout = |element: c_int, rows: usize, cols: usize| {
            let destroy = self.lt.api().layout_destroy;
            Owned::new(&self.lt, "cublasLtMatrixLayoutCreate", destroy, |api, out| {
                // SAFETY: writes one handle.
                unsafe { (api.layout_create)(out, element, rows as u64, cols as u64, rows as i64) }
            })
        };
        let out = if shape.output == Output::F32 { TYPE_F32 } else { TYPE_BF16 };
        Ok(Layouts {
            w: layout(TYPE_BF16, shape.k, shape.n)?,
            x: layout(TYPE_BF16, shape.k, shape.rows)?,
            y: layout(out, shape.n, shape.rows)?,
        })
    }

    /// Up to `wanted` algorithms, the one that is expected to be the fastest first.
    fn candidates(&self, layouts: &Layouts, wanted: usize) -> Result<Vec<CublasLtChoice>> {
        let mut found = vec![CublasLtChoice::default(); wanted];
        let mut count = 0;
        let Layouts { w, x, y } = layouts;
        // SAFETY: live descriptors; writes at most `wanted` results and their number.
        let status = unsafe {
            (self.lt.api().heuristic)(
                self.lt.handle(),
                self.product.handle(),
                w.handle(),
                x.handle(),
                y.handle(),
                y.handle(),
                self.preference.handle(),
                wanted as c_int,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        found.truncate(usize::try_from(count).unwrap_or(0));
        found.retain(|c| c.state == 0 && c.workspace <= WORKSPACE);
        Ok(found)
    }

    /// The algorithm that is clearly faster than the first, if there is one, the caches cold; those that refuse are out.
    fn fastest(
        &self,
        stream: &Stream,
        layouts: &Layouts,
        candidates: &[CublasLtChoice],
        to: Operands,
    ) -> Result<[u64; 8]> {
        let (start, end) = (self.lt.device().event()?, self.lt.device().event()?);
        // The launches that are not timed load the kernels.
        let works = |c: &&CublasLtChoice| self.launch(stream, layouts, &c.algorithm, to).is_ok();
        let candidates: Vec<_> = candidates.iter().filter(works).collect();
        let mut times = vec![f32::INFINITY; candidates.len()];
        for _ in 0..ROUNDS {
            for (candidate, time) in candidates.iter().zip(&mut times) {
                if let Some(cold) = &self.cold {
                    cold.fill(stream, 0)?;
                }
                stream.record(&start)?;
                self.launch(stream, layouts, &candidate.algorithm, to)?;
                stream.record(&end)?;
                *time = time.min(start.elapsed_ms(&end)?);
            }
        }
        let fastest = times.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
        let chosen = fastest.filter(|(_, time)| *time < CLEARLY * times[0]).map_or(0, |(i, _)| i);
        candidates.get(chosen).map(|c| c.algorithm).ok_or_else(|| CudaError::Call {
            call: "cublasLtMatmul",
            name: "no algorithm works".to_owned(),
            message: "all that the heuristics proposed were refused".to_owned(),
        })
    }

    fn launch(&self, stream: &Stream, layouts: &Layouts, algorithm: &[u64; 8], to: Operands) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let Layouts { w, x, y } = layouts;
        // SAFETY: the layouts are those of the operands, whose sizes `multiply` checked; the workspace is this stream's alone; scalars are
        // read before the call returns.
        check("cublasLtMatmul", unsafe {
            (self.lt.api().multiply)(
                self.lt.handle(),
                self.product.handle(),
                &raw const one,
                to.w,
                w.handle(),
                to.x,
                x.handle(),
                &raw const zero,
                to.y,
                y.handle(),
                to.y,
                y.handle(),
                algorithm,
                self.workspace.ptr(),
                self.workspace.len(),
                stream.handle(),
            )
        })
    }
}
