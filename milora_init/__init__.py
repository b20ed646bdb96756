"""milora-init: initialise MiLoRA and its kin from a checkpoint, streamed."""

__version__ = "0.1.0"
