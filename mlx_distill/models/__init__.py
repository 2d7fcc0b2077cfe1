"""Find a model: a folder, a Hub id, a GGUF file, or the bundled one."""
