"""Language models (PaLM, transformers), LoRA and PEFT adapters, checkpoints, sharding and compilation."""
