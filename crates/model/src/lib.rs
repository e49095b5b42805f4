//! Model configs, weight files (safetensors, GGUF, dummy) and one forward pass per architecture.
