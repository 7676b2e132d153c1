"""From LoRA files to experts and banks."""
