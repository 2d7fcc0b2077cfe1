"""The reference backend: PyTorch, with transformers' model and peft's LoRA. An extra; nothing else needs torch."""
