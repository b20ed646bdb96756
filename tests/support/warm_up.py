"""Imported by the fork server: what every run computes once per process, and no test changes."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch
import transformers

from milora_init.cli.main import commands
from milora_init.model.meta_model import uncalled_modules
from milora_init.plan.peft_check import expected_by_peft

with suppress(ImportError):  # an older transformers has no such table; building it compiles hundreds of patterns
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")

commands()
with torch.device("meta"):  # torch prepares each operation on the meta device when it is called first
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval().bfloat16()
uncalled_modules(model)
expected_by_peft(model, {"r": 2, "target_modules": ["q_proj"]}, {})

# What is imported by now stays: the garbage collector of a fork need not look at it, and so copies no memory of it.
gc.collect()
gc.freeze()
