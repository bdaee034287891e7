"""Models through vLLM, and what mixlm adds inside vLLM."""
