"""The versions of PEFT that load our adapters. Imports no torch, because a report names them."""

from __future__ import annotations

PEFT_FOR_MODULES = "0.13"
PEFT_FOR_EXPERTS = "0.19.1"  # the first that knows which side of a fused parameter is `out`
TESTED_WITH_MICA = "0.21.2"
