"""Models through transformers: safetensors, on CPUs and CUDA."""
