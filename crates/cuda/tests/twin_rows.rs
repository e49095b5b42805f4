//! Row kernels compute the bits of ops::exact and ops::reference. Needs an H100 or H200 and NVRTC:
//! `--include-ignored` runs the tests there.

use bitfast_cuda::attention::{AttentionSpec, BLOCK_TOKENS, Cached, block_bytes, element_offset};
use bitfast_cuda::driver::Overlap;
use bitfast_cuda::rows::{Gather, QkvPrep, QkvPrepArgs, QkvPrepSpec, RmsNorm, RowOp, SiluMul};
use bitfast_ops::{NormDesc, RopeTable, bf16, exact, reference};

mod gpu;
use gpu::{Gpu, bytes, compile, exact_gpu, floats, gpu, uniform, wide, word, words};

const ROWS: [usize; 17] = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 128, 129, 256, 1000, 4096];
/// Shapes that are no anchor model's are tried on fewer rows.
const FEW_ROWS: &[usize] = &[1, 7, 16, 17, 33, 64, 129];
/// Poison behind an output.
const TAIL: usize = 512;

fn rows_for(anchor: bool) -> &'static [usize] {
    if anchor { &ROWS } else { FEW_ROWS }
}

const NORM_D: [usize; 10] = [100, 576, 1000, 1023, 1024, 1536, 2048, 4096, 5120, 8192];

fn norm_desc(unit_offset: bool) -> NormDesc {
    NormDesc { eps: 1e-5, unit_offset }
}

fn qkv_specs() -> Vec<QkvPrepSpec> {
    let heads = [(9, 3, 64, 64), (16, 8, 128, 128), (5, 1, 128, 64), (4, 2, 256, 256), (8, 2, 256, 64)];
    heads
        .into_iter()
        .flat_map(|(heads, kv_heads, head_dim, rot_dim)| {
            let attention = AttentionSpec { heads, kv_heads, head_dim };
            [None, Some(norm_desc(false)), Some(norm_desc(true))].map(|qk_norm| QkvPrepSpec {
                attention,
                rot_dim,
                qk_norm,
            })
        })
        .collect()
}

#[test]
#[ignore = "needs NVRTC"]
fn every_kernel_compiles() {
    let mut ops: Vec<RowOp> = [100, 576, 2048].map(|d| RowOp::Gather { d }).to_vec();
    for d in NORM_D {
        for (unit_offset, residual) in [(false, false), (false, true), (true, false), (true, true)] {
            ops.push(RowOp::RmsNorm { d, desc: norm_desc(unit_offset), residual });
        }
    }
    ops.extend([100, 1536, 4096, 6144].map(|inner| RowOp::SiluMul { inner }));
    ops.extend(qkv_specs().into_iter().map(RowOp::QkvPrep));
    compile(&ops.iter().map(RowOp::source).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs an H100 or H200"]
fn gather_equals_the_reference() {
    let gpu = gpu();
    for d in [100, 576, 2048, 4096] {
        check_gather(&gpu, d, &ROWS);
    }
}

fn check_gather(gpu: &Gpu, d: usize, all_rows: &[usize]) {
    let kernel = Gather::new(&gpu.device, &gpu.jit, d).expect("a kernel");
    let table = wide(301 * d, 1, -100, 200);
    let on_gpu = gpu.upload(&bytes(&table));
    for &rows in all_rows {
        let ids: Vec<u32> = (0..rows as u64).map(|i| (word(i, 2) % 301) as u32).collect();
        let out = gpu.poisoned(rows * d * 2 + TAIL);
        let index = gpu.upload(&words(&ids));
        kernel.launch(&gpu.stream, Overlap::None, rows, &on_gpu, &index, &out).expect("launch");
        gpu.assert_equal(&format!("gather {rows} x {d}"), &out, &bytes(&reference::embed(&table, d, &ids)));
    }
    let out = gpu.poisoned(2 * d * 2);
    let index = gpu.upload(&words(&[u32::MAX, 300]));
    kernel.launch(&gpu.stream, Overlap::None, 2, &on_gpu, &index, &out).expect("launch");
    let mut expected = vec![bf16::ZERO; d];
    expected.extend(&table[300 * d..]);
    gpu.assert_equal("a row of padding", &out, &bytes(&expected));
}

#[test]
#[ignore = "needs an H100 or H200"]
fn norms_equal_the_reference() {
    let gpu = gpu();
    for d in NORM_D {
        for unit_offset in [false, true] {
            check_norms(&gpu, d, unit_offset, rows_for([576, 2048, 4096].contains(&d)));
        }
    }
}

fn check_norms(gpu: &Gpu, d: usize, unit_offset: bool, all_rows: &[usize]) {
    let desc = norm_desc(unit_offset);
    let kernel = RmsNorm::new(&gpu.device, &gpu.jit, d, desc).expect("a kernel");
    let w = wide(d, 3, -6, 8);
    let on_gpu = gpu.input(&bytes(&w));
    for &rows in all_rows {
        // From the denormals on: nothing is flushed.
        let low = if rows % 2 == 0 { -20 } else { -127 };
        let (x, delta) = (wide(rows * d, 4, low, 30), wide(rows * d, 5, low, 29));
        let out = gpu.poisoned(rows * d * 2 + TAIL);
        let what = format!("rms_norm {rows} x {d}, {desc:?}");
        let input = gpu.input(&bytes(&x));
        kernel.launch(&gpu.stream, Overlap::None, rows, &input, &on_gpu, &out).expect("launch");
        gpu.assert_equal(&what, &out, &bytes(&reference::rms_norm(&x, &w, desc)));

        let mut residual = x.clone();
        let expected = reference::add_rms_norm(&mut residual, &delta, &w, desc);
        out.fill(&gpu.stream, 0xFF).expect("poison");
        let delta = gpu.input(&bytes(&delta));
        kernel.launch_add(&gpu.stream, Overlap::None, rows, &input, &delta, &on_gpu, &out).expect("launch");
        gpu.assert_equal(&format!("add {what}"), &out, &bytes(&expected));
        gpu.assert_equal(&format!("residual of {what}"), &input, &bytes(&residual));
    }
}

/// Small enough to run under compute-sanitizer.
#[test]
#[ignore = "needs an H100 or H200"]
fn small_rows() {
    let gpu = exact_gpu();
    check_norms(&gpu, 100, false, &[1, 7]);
    check_norms(&gpu, 2048, true, &[3]);
    let kernel = SiluMul::new(&gpu.device, &gpu.jit, 100).expect("a kernel");
    check_silu(&gpu, &kernel, 100, &wide(500, 8, -30, 38), &wide(500, 9, -60, 80));
    let specs = qkv_specs();
    for spec in [specs[1], specs[5], specs[6]] {
        let kernel = QkvPrep::new(&gpu.device, &gpu.jit, spec).expect("a kernel");
        check_qkv(&gpu, &kernel, spec, 9);
    }
    check_gather(&gpu, 100, &[1, 17]);
}

/// The comparison can fail: rows whose lanes are summed in another order have another norm.
#[test]
#[ignore = "needs an H100 or H200"]
fn another_order_of_lanes_differs() {
    let gpu = gpu();
    let (rows, d, desc) = (129, 2048, norm_desc(false));
    let kernel = RmsNorm::new(&gpu.device, &gpu.jit, d, desc).expect("a kernel");
    let (x, w) = (wide(rows * d, 6, -8, 9), wide(d, 7, -3, 4));
    let out = gpu.poisoned(rows * d * 2);
    kernel
        .launch(&gpu.stream, Overlap::None, rows, &gpu.upload(&bytes(&x)), &gpu.upload(&bytes(&w)), &out)
        .expect("launch");
    let mut differs = false;
    for (row, got) in x.chunks(d).zip(gpu.read(&out).chunks(d * 2)) {
        // A plain chain over the row.
        let sum = row.iter().fold(0f32, |s, x| x.to_f32().mul_add(x.to_f32(), s));
        let r = 1.0 / sum.mul_add(1.0 / d as f32, desc.eps).sqrt();
        let y: Vec<bf16> =
            row.iter().zip(&w).map(|(x, w)| exact::f32_to_bf16((x.to_f32() * r) * w.to_f32())).collect();
        differs |= got != bytes(&y);
    }
    assert!(differs, "cannot tell a chain from the tree");
}

#[test]
#[ignore = "needs an H100 or H200"]
fn silu_mul_equals_the_reference() {
    let gpu = gpu();
    for inner in [100, 1536, 6144, 14336] {
        let kernel = SiluMul::new(&gpu.device, &gpu.jit, inner).expect("a kernel");
        for &rows in rows_for(inner == 1536 || inner == 6144) {
            check_silu(
                &gpu,
                &kernel,
                inner,
                &wide(rows * inner, 8, -30, 38),
                &wide(rows * inner, 9, -60, 80),
            );
        }
    }
    // More rows than a grid's second extent has: several launches.
    let (inner, rows) = (24, 65_535 + 700);
    let kernel = SiluMul::new(&gpu.device, &gpu.jit, inner).expect("a kernel");
    check_silu(&gpu, &kernel, inner, &wide(rows * inner, 8, -30, 38), &wide(rows * inner, 9, -60, 80));
    // Every finite gate.
    let inner = 4096;
    let kernel = SiluMul::new(&gpu.device, &gpu.jit, inner).expect("a kernel");
    let gates: Vec<bf16> =
        (0..=u16::MAX).map(bf16::from_bits).map(|g| if g.is_finite() { g } else { bf16::ONE }).collect();
    check_silu(&gpu, &kernel, inner, &gates, &uniform(gates.len(), 10, 3.0));
}

fn check_silu(gpu: &Gpu, kernel: &SiluMul, inner: usize, g: &[bf16], u: &[bf16]) {
    let rows = g.len() / inner;
    let rows_of = g.chunks(inner).zip(u.chunks(inner));
    let x: Vec<bf16> = rows_of.flat_map(|(g, u)| g.iter().chain(u)).copied().collect();
    let out = gpu.poisoned(rows * inner * 2 + TAIL);
    kernel.launch(&gpu.stream, Overlap::None, rows, &gpu.input(&bytes(&x)), &out).expect("launch");
    gpu.assert_equal(&format!("silu_mul {rows} x {inner}"), &out, &bytes(&reference::silu_mul(g, u)));
}

#[test]
#[ignore = "needs an H100 or H200"]
fn qkv_prep_equals_the_reference() {
    let gpu = gpu();
    for spec in qkv_specs() {
        let kernel = QkvPrep::new(&gpu.device, &gpu.jit, spec).expect("a kernel");
        // Those of SmolLM2 and of Qwen3-1.7B, with norms and without.
        let anchor = spec.attention.heads != 5 && spec.attention.head_dim <= 128;
        // The last ones leave a block that has fewer rows than the others.
        for &rows in rows_for(anchor).iter().chain(&[2049, 5003]) {
            check_qkv(&gpu, &kernel, spec, rows);
        }
    }
}

fn check_qkv(gpu: &Gpu, kernel: &QkvPrep, spec: QkvPrepSpec, rows: usize) {
    let AttentionSpec { heads, kv_heads, head_dim } = spec.attention;
    let inv_freq: Vec<f32> =
        (0..spec.rot_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / spec.rot_dim as f64) as f32).collect();
    let table = RopeTable::new(&inv_freq, 400);
    let positions: Vec<u32> = (0..rows as u64).map(|i| (word(i, 11) % 400) as u32).collect();
    let blocks = rows.div_ceil(BLOCK_TOKENS) + 2;
    let mut slots: Vec<u32> = (0..(blocks * BLOCK_TOKENS) as u32).collect();
    slots.sort_by_key(|s| word(u64::from(*s), 12));
    slots.truncate(rows);
    if rows > 7 {
        slots[5] = u32::MAX; // padding: stored nowhere
    }
    let all = heads + 2 * kv_heads;
    let qkv = wide(rows * all * head_dim, 13, -10, 14);
    let weights = [wide(head_dim, 14, -2, 3), wide(head_dim, 15, -2, 3)];

    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    for row in qkv.chunks(all * head_dim) {
        let (q, rest) = row.split_at(heads * head_dim);
        let (k, v) = rest.split_at(kv_heads * head_dim);
        for (part, data) in parts.iter_mut().zip([q, k, v]) {
            part.extend_from_slice(data);
        }
    }
    for (part, w) in parts.iter_mut().zip(&weights) {
        if let Some(desc) = spec.qk_norm {
            reference::qk_norm(part, w, desc);
        }
        reference::rope(part, head_dim, &table, &positions);
    }
    let mut cache = vec![0xFF; blocks * block_bytes(&spec.attention)];
    for (which, data) in [(Cached::Key, &parts[1]), (Cached::Value, &parts[2])] {
        for (i, value) in data.iter().enumerate() {
            let (row, head, dim) = (i / (kv_heads * head_dim), i / head_dim % kv_heads, i % head_dim);
            if slots[row] != u32::MAX {
                let at = element_offset(&spec.attention, slots[row] as usize, head, which, dim);
                cache[at..at + 2].copy_from_slice(&value.to_bits().to_le_bytes());
            }
        }
    }

    let kv = gpu.poisoned(cache.len());
    let q_out = gpu.poisoned(rows * heads * head_dim * 2 + TAIL);
    let [q_norm, k_norm] = weights.map(|w| gpu.input(&bytes(&w)));
    let args = QkvPrepArgs {
        qkv: &gpu.input(&bytes(&qkv)),
        norms: spec.qk_norm.map(|_| (&q_norm, &k_norm)),
        cos: &gpu.upload(&floats(&table.cos)),
        sin: &gpu.upload(&floats(&table.sin)),
        positions: &gpu.upload(&words(&positions)),
        slots: &gpu.upload(&words(&slots)),
        kv: &kv,
        q_out: &q_out,
    };
    // SAFETY: positions are below 400 and slots inside the cache.
    unsafe { kernel.launch(&gpu.stream, Overlap::None, rows, args) }.expect("launch");
    gpu.assert_equal(&format!("queries of {rows} rows, {spec:?}"), &q_out, &bytes(&parts[0]));
    gpu.assert_equal(&format!("cache of {rows} rows, {spec:?}"), &kv, &cache);
}
