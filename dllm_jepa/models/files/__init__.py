"""Models as files: published checkpoints, adapters in PEFT's layout, merged models, tokenizer files."""
