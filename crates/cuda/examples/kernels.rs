//! Compiles every kernel instance without a GPU: `kernels LIBNVRTC [FOLDER]`. A line each, of fields between tabs:
//! architecture, name and macros, registers, bytes spilled, `serialised` or `-`, file. With a folder, the cubins for
//! sm_90a are written there, and one instance of each kernel is tried on other architectures too, on which nobody has
//! run them; the last field is the compiler's first complaint where it does not compile.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitfast_cuda::CudaError;
use bitfast_cuda::catalogue::{check, kernels};
use bitfast_cuda::jit::{ARCH, Jit, KernelSource};

/// Architectures that nobody has run the kernels on.
const UNTESTED: [&str; 3] = ["sm_80", "sm_89", "sm_100a"];

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).map(PathBuf::from);
    let (library, folder) = (args.next(), args.next());
    let jit = Jit::new(library.as_deref(), None)?;
    let sources = kernels();
    let mut work: Vec<(&str, usize)> = (0..sources.len()).map(|i| (ARCH, i)).collect();
    if folder.is_some() {
        let mut seen = BTreeSet::new();
        let first: Vec<usize> = (0..sources.len()).filter(|i| seen.insert(sources[*i].name)).collect();
        work.extend(UNTESTED.iter().flat_map(|arch| first.iter().map(move |i| (*arch, *i))));
    }
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(vec![String::new(); work.len()]));
    let worker = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(arch, i)) = work.get(at) else { return };
            let file = folder.as_ref().filter(|_| arch == ARCH).map(|f| f.join(format!("{i}.cubin")));
            let line = line(&jit, arch, &sources[i], file);
            lines.lock().expect("no worker panics")[at] = line;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(worker))));
    let lines = lines.into_inner().expect("no worker panics");
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn line(jit: &Jit, arch: &str, source: &KernelSource, file: Option<PathBuf>) -> String {
    let label = source.label();
    match check(jit, arch, source) {
        Ok((report, cubin)) => {
            let file = file.map_or(Ok("-".to_owned()), |file| {
                std::fs::write(&file, cubin).map(|()| file.display().to_string())
            });
            let file = file.unwrap_or_else(|e| format!("cannot be written: {e}"));
            let serialised = if report.serialised { "serialised" } else { "-" };
            format!("{arch}\t{label}\t{}\t{}\t{serialised}\t{file}", report.registers, report.spilled)
        }
        Err(CudaError::Compile { log, .. }) => {
            let complaint = log.lines().find(|l| l.contains("error")).unwrap_or("no reason given");
            format!("{arch}\t{label}\t-\t-\tfailed\t{}", complaint.trim())
        }
        Err(error) => format!("{arch}\t{label}\t-\t-\tfailed\t{error}"),
    }
}
