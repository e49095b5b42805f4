//! Opens a GGUF file or a folder of safetensors, reads all weights as a load would, and prints what it found:
//! `cargo run --release -p bitfast-model --example inspect -- PATH [threads]`

use std::path::Path;
use std::sync::Arc;

use bitfast_model::{
    Gguf, GgufSource, ModelConfig, SafetensorsSource, WeightSource, tensor_specs, weights_digest,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: inspect PATH [threads]")?;
    let path = Path::new(&path);
    let threads = args.next().map_or(Ok(2), |n| n.parse())?;
    let (config, source): (ModelConfig, Box<dyn WeightSource>) = if path.is_dir() {
        let config = path.join("config.json");
        let text = std::fs::read_to_string(&config)?;
        let config = ModelConfig::from_hf_json(&config.display().to_string(), &text)?;
        (config, Box::new(SafetensorsSource::open(path)?))
    } else {
        let gguf = Arc::new(Gguf::open(path)?);
        for (key, value) in gguf.metadata().iter() {
            let text: String = format!("{value:?}").chars().take(100).collect();
            println!("{key} = {text}");
        }
        for (name, tensor) in gguf.tensors() {
            println!("{name} {:?} {}", tensor.shape, tensor.dtype);
        }
        let config = ModelConfig::from_gguf(&gguf)?;
        let source = GgufSource::new(gguf, &config);
        (config, Box::new(source))
    };
    println!("{config:#?}");
    let specs = tensor_specs(&config);
    println!("{} parameters in {} tensors", config.num_parameters(), specs.len());
    println!("weights {}", weights_digest(&*source, specs, threads)?);
    println!("config  {}", config.digest());
    Ok(())
}
