//! Opens a model, reads all its weights as a load would, and prints what it found:
//! `cargo run --release -p bitfast-model --example inspect -- PATH [threads]`

use std::path::Path;

use bitfast_model::{LoadFormat, ModelFiles, tensor_specs, weights_digest};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: inspect PATH [threads]")?;
    let threads = args.next().map_or(Ok(2), |n| n.parse())?;
    let format = if Path::new(&path).exists() { LoadFormat::Auto } else { LoadFormat::Dummy };
    let files = ModelFiles::open(Path::new(&path), format)?;
    println!("{:#?}\n{:?}", files.config, files.generation);
    if let Some(gguf) = &files.gguf {
        for (key, value) in gguf.metadata().iter() {
            let text: String = format!("{value:?}").chars().take(100).collect();
            println!("{key} = {text}");
        }
        for (name, t) in gguf.tensors() {
            println!("{name} {:?} {}", t.shape, t.dtype);
        }
    }
    let specs = tensor_specs(&files.config);
    let bytes: usize = specs.iter().map(|s| 2 * s.elements()).sum();
    let digest = weights_digest(&*files.source, specs, threads)?;
    println!("{:.1} MB of bf16", bytes as f64 / 1e6);
    println!("weights {digest}\nconfig  {}", files.config.digest());
    Ok(())
}
