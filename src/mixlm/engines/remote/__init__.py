"""Members behind servers of llama.cpp, vLLM or SGLang."""
