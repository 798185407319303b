"""LLM families: a loader, a chat template, a tokenizer, LoRA targets."""
