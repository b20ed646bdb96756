"""Plan every model type of the installed transformers, from names and shapes only.

    python scripts/sweep_architectures.py                     # all of them, some minutes
    python scripts/sweep_architectures.py llama mixtral       # these
    python scripts/sweep_architectures.py --json sweep.json

Each type's default config, reduced to a few layers, is built on the meta device and written as a checkpoint with names
and shapes but no data. It is planned with `all-linear`, and with `experts` if it has any; PEFT checks on the meta
device that it would load the adapter. Prints one line a type:

    resolved   the number of modules and of experts' matrices
    refused    milora-init refuses it; the reason that a user would read
    not built  transformers cannot build it from its default config, or cannot save it
    no model   the config of a part of other models
    FAILED     any other error; the exit status is then 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from milora_init.checkpoint.dtypes import DTYPE_NAMES
from milora_init.checkpoint.header import plan_header
from milora_init.errors import MiloraError
from milora_init.options import InitOptions
from milora_init.plan.peft_check import require_loadable
from milora_init.plan.plan import make_plan

LAYERS = 2
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
    "num_encoder_layers", "num_decoder_layers", "num_hidden_layers_vision",
)  # fmt: skip
# In order of preference: the class that a user of the model would train.
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForSequenceClassification", "Model")


def main() -> int:
    """Plan the types and print a line for each and the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them if none is named")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for model_type in args.types or sorted(transformers.CONFIG_MAPPING):
        outcome, what = judge(model_type)
        rows.append({"type": model_type, "outcome": outcome, "what": what})
        print(f"{model_type:32} {outcome:10} {what}", flush=True)
    counts = Counter(row["outcome"] for row in rows)
    print(f"\ntransformers {transformers.__version__}: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if counts["FAILED"] else 0


def judge(model_type: str) -> tuple[str, str]:
    """The outcome for a model type, and the details."""
    try:
        if model_class(transformers.CONFIG_MAPPING[model_type]) is None:
            return "no model", "a part of others"
    except Exception as error:
        return "not built", _short(error)
    outcome = "not built", ""
    for layers in (LAYERS, None):  # some configs list their layers and cannot be reduced
        with tempfile.TemporaryDirectory() as folder:
            try:
                architecture = write_checkpoint(model_type, Path(folder), layers)
            except Exception as error:
                outcome = "not built", _short(error)
                continue
            try:
                return "resolved", f"{architecture}: {plan(Path(folder))}"
            except MiloraError as error:
                outcome = "refused", f"{architecture}: {error.message.replace(folder, '.')}"
                if "does not build" not in error.message:
                    break
            except Exception as error:
                return "FAILED", f"{architecture}: {_short(error)}"
    return outcome


def plan(folder: Path) -> str:
    """Plan everything that can be adapted, and check that PEFT would load the adapter."""
    options: dict[str, Any] = {"model": str(folder), "out": str(folder / "out"), "rank": 1}
    made = make_plan(InitOptions(**options, target=("all-linear",)), folder)
    targets = ["all-linear", *(["experts"] if made.structure.experts else [])]
    made = make_plan(InitOptions(**options, target=tuple(targets)), folder)
    checked_by = require_loadable(made)
    experts = sum(w.weight.expert is not None for w in made.weights)
    reasons = Counter(
        reason.partition(",")[0] for reason in made.structure.refused.values() if "not a linear layer" not in reason
    )
    counts = f"{len(made.weights) - experts} modules" + (f", {experts} experts' matrices" if experts else "")
    left = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{counts}, by {checked_by}" + (f" (left out: {left})" if left else "")


def write_checkpoint(
    model_type: str, folder: Path, layers: int | None, *, change: Callable[[Any], object] = lambda _: None
) -> str:
    """Write a checkpoint of this type without data: config.json and a sparse file with a header. Returns its class.

    `change` may change the config before the model is built.
    """
    from transformers.core_model_loading import revert_weight_conversion

    config: Any = transformers.CONFIG_MAPPING[model_type]()
    if layers is not None:
        cut_down(config, layers)
    change(config)
    cls = model_class(type(config))
    with torch.device("meta"):
        model: Any = cls(config)
    model.tie_weights()
    stored: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # a tied tensor is saved once
            seen[id(tensor)] = name
            stored[name] = tensor.detach() if isinstance(tensor, Tensor) else tensor
    names = revert_weight_conversion(model, stored)
    header = plan_header(
        ((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in names.items()),
        metadata={"format": "pt"},
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header.raw)
        file.truncate(header.file_bytes)
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    return str(cls.__name__)


def cut_down(config: Any, layers: int) -> None:
    """Reduce a config to a few layers, if it states their number."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    for part in parts:
        for key in _LAYER_COUNTS:
            if isinstance(vars(part).get(key), int):
                setattr(part, key, min(getattr(part, key), layers))
        for key, value in list(vars(part).items()):
            if key.endswith(("layer_types", "layers_block_type")) and isinstance(value, list):
                setattr(part, key, value[:layers])


def model_class(config: type) -> Any:
    """The class that a user of this config would most likely train; None for the config of a part of a model."""
    stem = config.__name__.removesuffix("Config")
    for head in _HEADS:
        cls = getattr(transformers, stem + head, None)
        if isinstance(cls, type) and getattr(cls, "config_class", None) is config:
            return cls
    return transformers.MODEL_MAPPING.get(config, None)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


if __name__ == "__main__":
    sys.exit(main())
