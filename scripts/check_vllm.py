"""The two halves of check_vllm.sh: make models and adapters (this project's environment), serve them (vLLM's).

Each case is a tiny random model that is initialised, trained for a few steps, and converted. vLLM serves the original
with the converted adapter, or the merged model. Its log-probabilities of a prompt must be those that transformers and
PEFT compute with the trained pair in float32. vLLM's kernels for experts are in Triton, which has no CPU: their
arithmetic is replaced by plain torch here, on the tensors that vLLM's own loader has put in place.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT = [3, 5, 9, 13, 4, 7]
CASES = ("llama", "mixtral", "qwen3_moe", "mixtral-down", "llama-cut", "llama-merged")
TOLERANCE = 1e-3


def make(folder: Path) -> None:
    """Make every case, with the log-probabilities that vLLM should find."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support.families import FAMILIES, Family
    from support.family_training import initialize_family, load, pattern_options, train

    from milora_init.api import convert, merge

    expected: dict[str, dict[str, Any]] = {}
    for case in CASES:
        name, _, kind = case.partition("-")
        # vLLM's attention on the CPU needs heads of 32.
        family: Family = dataclasses.replace(FAMILIES[name], sizes={**FAMILIES[name].sizes, "head_dim": 32})
        options: dict[str, Any] = {"target": ("experts.down_proj",)} if kind == "down" else pattern_options(family)
        work = folder / "cases" / case
        source, out = work / "source", work / "out"
        if not (work / "trained").is_dir():
            initialize_family(family, work, "float32", **options)
            train(family, out, work / "trained")
        model, adapter = source, work / "plain"
        if kind == "merged":
            merge(out, work / "merged", adapter=work / "trained", overwrite=True, progress=False)
            model, adapter = work / "merged", Path()
        else:
            convert(out, work / "trained", adapter, for_="vllm", rank=5 if kind == "cut" else None, overwrite=True)
        base, lora = (source, adapter) if kind == "cut" else (out, work / "trained")
        with torch.no_grad():
            logits = load(family, base, lora).eval()(input_ids=torch.tensor([PROMPT])).logits[0]
        found = logits.log_softmax(-1)[torch.arange(len(PROMPT) - 1), torch.tensor(PROMPT[1:])].tolist()
        adapter_text = str(adapter) if kind != "merged" else ""
        expected[case] = {"model": str(model), "adapter": adapter_text, "log_probabilities": found}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))


def serve(folder: Path) -> int:
    """Serve every case in a process of its own; the exit status is 1 if one differs."""
    failed = 0
    for case in json.loads((folder / "expected.json").read_text()):
        failed += subprocess.run([sys.executable, __file__, "one", str(folder), case], check=False).returncode != 0
    return 1 if failed else 0


def serve_one(folder: Path, case: str) -> int:
    """Compare one case."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    os.environ.update(settings)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = _experts_in_torch
    expected = json.loads((folder / "expected.json").read_text())[case]
    llm = LLM(
        model=expected["model"], skip_tokenizer_init=True, enable_lora=True, max_lora_rank=64, dtype="float32",
        enforce_eager=True, max_model_len=32, max_num_seqs=2,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, expected["adapter"]) if expected["adapter"] else None
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = llm.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=adapter, use_tqdm=False)[0]
    found = [next(iter(place.values())).logprob for place in output.prompt_logprobs[1:]]
    error = max(abs(a - b) for a, b in zip(found, expected["log_probabilities"], strict=True))
    print(f"{case:14} largest difference {error:.1e}  {'ok' if error < TOLERANCE else 'DIFFERS'}", flush=True)
    return 0 if error < TOLERANCE else 1


def _experts_in_torch(  # noqa: PLR0913  the signature of vLLM
    self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
) -> None:
    """What vLLM's TritonExperts.apply computes: gated experts with the factors of the adapter of each token."""
    import torch

    context = self._lora_context
    of_token = [] if context is None else context.punica_wrapper.token_lora_indices.tolist()
    result = torch.zeros_like(output)
    for token, x in enumerate(hidden_states):
        lora = of_token[token] if token < len(of_token) else -1
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            gate_up = w1[expert] @ x
            if lora >= 0:
                pairs = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                gate_up = gate_up + torch.cat([b[lora, expert] @ (a[lora, expert] @ x) for a, b in pairs])
            gate, up = gate_up.chunk(2)
            y = torch.nn.functional.silu(gate) * up
            down = w2[expert] @ y
            if lora >= 0:
                a, b = context.w2_lora_a_stacked[0], context.w2_lora_b_stacked[0]
                down = down + b[lora, expert] @ (a[lora, expert] @ y)
            result[token] += weight * down
    output.copy_(result)


def main() -> int:
    """Run one half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("make", "serve", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", nargs="?", default="")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.half == "make":
        make(folder)
        return 0
    return serve(folder) if given.half == "serve" else serve_one(folder, given.case)


if __name__ == "__main__":
    sys.exit(main())
