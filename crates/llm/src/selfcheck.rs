//! Whether this machine computes what the law is defined by: `bitfast selfcheck`.

use std::time::Instant;

use bitfast_cpu::{CpuBackend, CpuOptions, Isa};
use bitfast_cuda::selfcheck::{Extent, Finding};
use bitfast_ops::contract::KOrder;
use bitfast_ops::{
    Backend, BackendError, BatchInputs, Class, Dtype, HostTensor, LinearDesc, LinearKind, SeqInput, bf16,
    reference,
};
use serde::Serialize;

use crate::args::Device;
use crate::error::{Error, Result};

/// What [`selfcheck`] found.
#[derive(Clone, Debug, Serialize)]
pub struct SelfCheck {
    /// The device in words.
    pub device: String,
    /// The numerics class that was checked.
    pub class: String,
    /// Every assumption, in a fixed order.
    pub findings: Vec<SelfCheckFinding>,
    /// How long it took, compiling kernels included.
    pub seconds: f64,
}

/// One assumption of the law, and whether the device keeps it.
#[derive(Clone, Debug, Serialize)]
pub struct SelfCheckFinding {
    /// The assumption in words.
    pub name: String,
    /// Whether the law needs it; others are reported only.
    pub required: bool,
    /// Outputs compared, bit for bit.
    pub outputs: usize,
    /// Those that differ.
    pub differing: usize,
    /// The first of these, as bits: "output 7: 3f800000, expected 3f800001".
    pub first: Option<String>,
}

impl SelfCheck {
    /// Whether the device may serve.
    pub fn passes(&self) -> bool {
        self.findings.iter().all(|f| f.differing == 0 || !f.required)
    }
}

/// Checks `device`: on a GPU that its tensor core computes the step of the `hopper` class with every kind of instruction, tile
/// shape and role of the operands; on a CPU that matrix products on each instruction-set path equal the scalar reference.
///
/// # Errors
/// There is no such device, or it cannot be used. A difference is a finding, not an error.
pub fn selfcheck(device: Device) -> Result<SelfCheck> {
    let start = Instant::now();
    let mut found = match device {
        Device::Cpu => cpu()?,
        Device::Cuda(ordinal) => cuda(ordinal).map_err(|e| Error::invalid("device", e.to_string()))?,
        Device::Auto => match cuda(0) {
            Ok(found) => found,
            Err(_) => cpu()?,
        },
    };
    found.seconds = start.elapsed().as_secs_f64();
    Ok(found)
}

fn cuda(ordinal: usize) -> Result<SelfCheck, bitfast_cuda::CudaError> {
    let library = crate::env::NVRTC.get().map(|(_, path)| std::path::PathBuf::from(path));
    let cache = crate::fetch::cache_dir().ok().map(|dir| dir.join("kernels"));
    let (device, jit) = bitfast_cuda::selfcheck::open(ordinal, library.as_deref(), cache, Extent::Full)?;
    let findings = bitfast_cuda::selfcheck::selfcheck(&device, &jit, Extent::Full)?;
    Ok(SelfCheck {
        device: device.name().to_owned(),
        class: Class::Hopper.name().to_owned(),
        findings: findings.into_iter().map(SelfCheckFinding::from).collect(),
        seconds: 0.0,
    })
}

impl From<Finding> for SelfCheckFinding {
    fn from(f: Finding) -> Self {
        let first =
            f.first.map(|(i, got, expected)| format!("output {i}: {got:08x}, expected {expected:08x}"));
        Self { name: f.name, required: f.required, outputs: f.outputs, differing: f.differing, first }
    }
}

/// Outputs and products of a layer; neither fills whole tiles.
const N: usize = 200;
const K: usize = 352;
/// Rows of a step: kernels for one row, few and many.
const ROWS: [usize; 3] = [1, 8, 70];

fn cpu() -> Result<SelfCheck> {
    let failed = |e: BackendError| Error::Device(e.to_string());
    let mut findings = Vec::new();
    let mut device = String::new();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let options = CpuOptions { isa: Some(isa), pin: false, ..CpuOptions::default() };
        let backend = CpuBackend::new(&options);
        let mut backend = backend.map_err(|e| Error::Device(e.to_string()))?;
        if isa == Isa::detect() {
            device = backend.device();
        }
        for rows in ROWS {
            findings.push(products(&mut backend, isa.name(), rows).map_err(failed)?);
        }
    }
    Ok(SelfCheck { device, class: Class::Portable.name().to_owned(), findings, seconds: 0.0 })
}

/// Logits of `rows` rows against the reference.
fn products<B: Backend>(backend: &mut B, path: &str, rows: usize) -> Result<SelfCheckFinding, BackendError> {
    let desc =
        |name: &str, n| LinearDesc { name: name.into(), kind: LinearKind::Vocab, n, k: K, experts: None };
    let (x, w) = (values(rows * K, 1), values(N * K, 2));
    let host = |n: usize, data: &[bf16]| HostTensor::new(vec![n, K], data.to_vec());
    let table = backend.weight(&desc("table", rows), host(rows, &x))?;
    let weight = backend.weight(&desc("layer", N), host(N, &w))?;
    let mut input = backend.tensor("x", rows, K, Dtype::Bf16)?;
    let mut output = backend.tensor("y", rows, N, Dtype::F32)?;
    backend.begin(&one_token_each(rows, backend.block_sizes()[0]))?;
    backend.embed(&table, &mut input)?;
    backend.logits(&weight, &input, &mut output)?;
    let got = backend.read_f32(&output, rows)?;
    let order: KOrder = desc("layer", N).k_order(backend.class());
    let expected = reference::linear_f32(backend.class(), order, &x, &w, K);
    let mut others = got.iter().zip(&expected).enumerate().filter(|(_, (a, b))| a.to_bits() != b.to_bits());
    let first = others
        .next()
        .map(|(i, (a, b))| format!("output {i}: {:08x}, expected {:08x}", a.to_bits(), b.to_bits()));
    let differing = usize::from(first.is_some()) + others.count();
    let name = format!("{path}: matrix products of {rows} {}", if rows == 1 { "row" } else { "rows" });
    Ok(SelfCheckFinding { name, required: true, outputs: got.len(), differing, first })
}

/// Row `r` is token `r`.
fn one_token_each(rows: usize, block_size: usize) -> BatchInputs {
    let rows = 0..rows as u32;
    let seq =
        |row| SeqInput { first_row: row, num_rows: 1, context_len: 0, block_table: vec![row], state_slot: 0 };
    BatchInputs {
        token_ids: rows.clone().collect(),
        positions: rows.clone().map(|_| 0).collect(),
        slots: rows.clone().map(|row| row * block_size as u32).collect(),
        seqs: rows.clone().map(seq).collect(),
        logit_rows: rows.collect(),
    }
}

/// Both signs, over 36 binary orders, a denormal now and then.
fn values(n: usize, salt: u64) -> Vec<bf16> {
    (0..n as u64)
        .map(|i| {
            let mut z =
                (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD1B5_4A32_D192_ED03);
            z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            let exponent = if z >> 40 & 31 == 0 { 0 } else { 109 + (z >> 16) % 36 };
            bf16::from_bits((z & 0x807F | exponent << 7) as u16)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_cpu_passes_on_every_path_it_has() {
        let found = selfcheck(Device::Cpu).unwrap();
        let paths = Isa::ALL.into_iter().filter(|isa| isa.available()).count();
        assert_eq!(found.findings.len(), 3 * paths);
        assert!(found.device.ends_with(Isa::detect().name()), "{}", found.device);
        assert!(found.passes(), "{:?}", found.findings);
    }

    /// The unconstrained mode splits K where there are few rows: that is another order, and is found.
    #[test]
    fn another_order_is_found() {
        let options =
            CpuOptions { threads: Some(2), batch_invariant: false, pin: false, ..CpuOptions::default() };
        let mut backend = CpuBackend::new(&options).unwrap();
        let finding = products(&mut backend, "unconstrained", 1).unwrap();
        assert!(finding.differing > 0 && finding.first.is_some(), "{finding:?}");
        let failed =
            SelfCheck { device: String::new(), class: String::new(), findings: vec![finding], seconds: 0.0 };
        assert!(!failed.passes());
    }

    #[test]
    fn a_device_that_is_not_there_is_a_typed_error() {
        let error = selfcheck(Device::Cuda(4096)).unwrap_err();
        assert!(error.is_user_error() && error.to_string().starts_with("device: "), "{error}");
    }
}
