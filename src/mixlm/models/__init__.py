"""Models by name, folder or GGUF file: finding, fetching, converting and caching them."""
