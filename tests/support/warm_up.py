"""Imported by the fork server: what every run computes once per process, and no test changes."""

from __future__ import annotations

import gc
from contextlib import suppress

with suppress(ImportError):  # an older transformers has no such table; building it compiles hundreds of patterns
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")

# What is imported by now stays: the garbage collector of a fork need not look at it, and so copies no memory of it.
gc.collect()
gc.freeze()
