"""Check that a pair computes what its source computes, with the installed transformers and PEFT.

    python scripts/check_pair.py SOURCE OUT

Both run in float32 on random token ids. Prints the relative output error of the pair and of the base alone. The exit
status is 1 unless every adapter tensor was loaded and the pair's error is below a tenth of the base's. Does not import
milora-init, so it also runs with old versions (transformers 4.46 with PEFT 0.13: scripts/check_old_stack.sh).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open


def main() -> int:
    """Compare both models and print the errors; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    source, base = load(args.source), load(args.out)
    model = peft.PeftModel.from_pretrained(base, str(args.out), subfolder="lora", is_trainable=True).eval()
    with safe_open(str(args.out / "lora" / "adapter_model.safetensors"), framework="pt") as file:
        planned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    loaded = peft.get_peft_model_state_dict(model)
    intact = planned.keys() == loaded.keys() and all(torch.equal(loaded[name], t) for name, t in planned.items())
    trainable = sum(parameter.requires_grad for parameter in model.parameters())

    torch.manual_seed(0)
    ids = torch.randint(0, source.config.vocab_size, (2, 16))
    with torch.no_grad():
        truth = source(input_ids=ids)[0].double()
        with_adapter = relative(model(input_ids=ids)[0].double(), truth)
        with model.disable_adapter():
            without = relative(model(input_ids=ids)[0].double(), truth)
    print(
        f"transformers {transformers.__version__}, peft {peft.__version__}: {len(planned)} adapter tensors, "
        f"{trainable} trainable; off by {with_adapter:.1e} with the adapter, {without:.1e} without"
    )
    return 0 if intact and trainable == len(planned) and with_adapter < 0.1 * without else 1


def load(folder: Path) -> Any:
    """The model of a folder in float32, by the class that its config.json names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    # `dtype` was `torch_dtype` before transformers 4.56; a cast after loading works with both.
    return cls.from_pretrained(folder).float().eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    sys.exit(main())
