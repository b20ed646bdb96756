"""The training methods: what each one trains, and which folders fit it.

train.py, evaluate.py and compare.py read METHODS. All that they need of milora_init is in this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from milora_init.hub.source import is_repository
from milora_init.lora.folder import adapter_folder
from milora_init.manifest import MANIFEST, Manifest, read_manifest
from milora_init.methods import METHODS as INITIAL
from milora_init.options import read_recipe

RECIPE = "math"  # rank, targets and dropout of a fresh LoRA, and of the paper's GSM8K and MATH runs


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train.

    Attributes:
        name: As on the command line; of a method with an initial adapter, as `milora-init --method` has it.
        starts_from: `pair`: the residual base and its initial adapter. `adapter`: the initial adapter on the original
            model, for methods that write no base. `fresh`: a new LoRA (B = 0) on the original model. `full`: every
            weight of the original model.
        alpha_per_rank: alpha / rank in the authors' experiments. LoRA has 2, all others 1.
    """

    name: str
    starts_from: Literal["pair", "adapter", "fresh", "full"]
    alpha_per_rank: int = 1

    @property
    def is_initial(self) -> bool:
        """Whether it trains the initial adapter of an output of milora-init."""
        return self.starts_from in ("pair", "adapter")


METHODS = {
    method.name: method
    for method in (
        *(Method(name, "pair" if initial.writes_base else "adapter") for name, initial in INITIAL.items()),
        Method("lora", "fresh", alpha_per_rank=2),
        Method("full", "full"),
    )
}


class MismatchError(ValueError):
    """METHOD, BASE, the data and the options do not fit together. The message says what to do."""


def require_packages(*names: str) -> None:
    """Raise MismatchError if one of the packages of the extra `train` is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MismatchError(f"the package {name} is not installed; install the extra: pip install '.[train]'")


@dataclass(frozen=True, slots=True)
class Start:
    """What a training starts from.

    Attributes:
        method: The method.
        model: Folder or Hub id of the weights to load.
        revision: Commit of a model on the Hub; None for the newest, and for a folder.
        adapter: Folder of the initial adapter; None for `fresh` and `full`.
        rank, alpha, scale, dropout: Of the adapter; None for `full`.
        targets: Modules of a fresh LoRA; empty for an initial adapter, which has its own.
    """

    method: Method
    model: str
    adapter: str | None
    revision: str | None = None
    rank: int | None = None
    alpha: int | None = None
    scale: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ()


def find_start(
    name: str, base: str, *, rank: int | None = None, alpha: int | None = None, dropout: float | None = None
) -> Start:
    """What `name` starts from in `base`. Reads no weights.

    Args:
        name: A key of METHODS.
        base: For `pair` and `adapter` an output of milora-init, for `fresh` and `full` an original model.
        rank, alpha: Of a fresh LoRA; for an initial adapter they must be its own.
        dropout: None means the adapter's own, or the recipe's.

    Raises:
        MismatchError: The base does not fit the method, or an option does not fit the adapter.
    """
    method, manifest = METHODS[name], manifest_of(base)
    if not method.is_initial:
        if manifest is not None:
            raise MismatchError(
                f"{base} is an output of milora-init, not the original model: "
                f"train {name} on {manifest.source['model']}"
            )
        if method.starts_from == "full":
            if (rank, alpha, dropout) != (None, None, None):
                raise MismatchError("full trains all weights: leave --rank, --alpha and --dropout out")
            return Start(method, base, None)
        recipe = read_recipe(RECIPE)
        rank = rank or int(recipe["rank"])
        alpha = alpha or method.alpha_per_rank * rank
        dropout = float(recipe["dropout"]) if dropout is None else dropout
        scale = alpha / rank
        targets = tuple(recipe["target"])
        return Start(method, base, None, rank=rank, alpha=alpha, scale=scale, dropout=dropout, targets=targets)
    if manifest is None:
        if not Path(base).is_dir() and not is_repository(base):
            raise MismatchError(f"{base}: no such folder")
        if (Path(base).parent / MANIFEST).is_file():
            raise MismatchError(f"{base} is a part of the pair {Path(base).parent}: name that")
        raise MismatchError(
            f"{base} has no {MANIFEST}: make the base first, with "
            f"milora-init --model {base} --method {name} --out FOLDER"
        )
    made_with = manifest.method.name
    if made_with != name:
        raise MismatchError(
            f"{base} was made with method {made_with}, not {name}: train {made_with} on it, or make another output "
            f"with milora-init --method {name}"
        )
    adapter = adapter_folder(Path(folder_of(base)), manifest.method)
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for option, given, own in (("rank", rank, config["r"]), ("alpha", alpha, config["lora_alpha"])):
        if given not in (None, own):
            raise MismatchError(
                f"the adapter of {base} has {option} {own}, not {given}: give it to milora-init instead"
            )
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    model, revision = base, None
    if method.starts_from == "adapter":
        model, revision = str(config["base_model_name_or_path"]), config.get("revision")
    own_dropout = float(config["lora_dropout"])
    chosen = own_dropout if dropout is None else dropout
    return Start(
        method, model, str(adapter), revision, rank=config["r"], alpha=config["lora_alpha"], scale=scale, dropout=chosen
    )


def manifest_of(base: str) -> Manifest | None:
    """The manifest of a folder or Hub repository, None where there is none."""
    folder = folder_of(base)
    return read_manifest(Path(folder)) if folder else None


def folder_of(base: str) -> str:
    """The local folder of an output of milora-init; of a Hub repository its snapshot. Empty where there is none."""
    if Path(base).is_dir():
        return base
    if not is_repository(base):  # `milora-init push` writes to no other
        return ""
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    found = cached_file(base, MANIFEST, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return ""
    return str(snapshot_download(base, allow_patterns=[MANIFEST, "lora/*", "adapter_*"]))


def make_start(method: Method, model: str, out: Path, *, rank: int) -> None:
    """Run milora-init for a method that has an initial adapter, its base in float32, with alpha = rank."""
    from milora_init import InitOptions, initialize

    dtype = "float32" if method.starts_from == "pair" else "auto"
    initialize(InitOptions(model=model, out=str(out), rank=rank, method=method.name, dtype=dtype, device=("cpu",)))


def merge_pair(base: str, adapter: str | None, out: Path) -> None:
    """Write base and adapter as one plain model; a finished one is left as it is."""
    from milora_init.export.merge import merge

    merge(base, str(out), adapter=adapter)
