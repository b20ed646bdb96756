"""Read what config.json says about a quantised checkpoint, and what it becomes when the checkpoint is dequantised.

A quantised checkpoint keeps most weights as codes of 3 to 8 bits and scales. config.json names the method under
`quantization_config`, at its top level or inside a section such as text_config. Older files call it
`compression_config`, and ModelOpt has a file of its own, hf_quant_config.json. `quantised_tensors` then finds the
tensors, and `dequantise` computes their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_init.checkpoint.files import read_json_object, source_file
from milora_init.errors import CheckpointError

HF_QUANT_CONFIG = "hf_quant_config.json"
UNQUANTISED = "start from the unquantised checkpoint, or dequantise this one with the tool that made it and save it"
CONFIG_KEYS = ("quantization_config", "compression_config")
_DROPPED_KEYS = (*CONFIG_KEYS, "expert_dtype")
# quant_method by the name of the rules that read it; see `quantised_tensors`.
METHODS: Mapping[str, str] = {
    "fp8": "fp8", "mxfp8": "fp8", "mxfp4": "mxfp4", "compressed-tensors": "compressed-tensors",
    "modelopt": "modelopt", "modelopt_fp4": "modelopt", "bitsandbytes": "bitsandbytes",
}  # fmt: skip
# Formats of compressed-tensors whose tensors the rules read, or that leave the format to each group of modules.
_COMPRESSED = (
    "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
# Reasons for well-known methods that no rule reads.
REFUSED: Mapping[str, str] = {
    "gptq": "GPTQ stores weights transposed, with packed zero points in two versions that the files do not tell apart",
    "awq": "AWQ stores weights transposed and in an order that differs between its kernels",
    "auto-round": "AutoRound uses the layouts of GPTQ and AWQ",
    "gguf": "GGUF has formats of its own",
    "quark": "Quark has formats of its own",
    "torchao": "torchao pickles the classes of its tensors",
    "hqq": "HQQ pickles the state of its layers",
    "fbgemm_fp8": "FBGEMM's FP8 stores scales for another layout",
}


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised, by its configuration.

    Attributes:
        method: `quant_method` as it is written, such as `fp8`.
        rules: The name of the rules that read this method, a value of `METHODS`.
        settings: The content of `quantization_config`.
        path: The keys that lead to it in config.json; empty if it is in hf_quant_config.json.
    """

    method: str
    rules: str
    settings: Mapping[str, Any]
    path: tuple[str, ...]


def read_quantisation(folder: Path, config: Mapping[str, Any]) -> Quantisation | None:
    """How the checkpoint in a folder is quantised; None if nothing says that it is.

    Args:
        folder: The folder.
        config: The content of its config.json.

    Raises:
        CheckpointError: A method without a rule, an option of a method that no rule reads, or two configurations that
            differ.
    """
    found = list(_configurations(config, ()))
    own_file = folder / HF_QUANT_CONFIG
    if not found and (own_file.is_file() or own_file.is_symlink()):
        content = read_json_object(source_file(folder, HF_QUANT_CONFIG))
        settings = content.get("quantization", content)
        if isinstance(settings, dict) and settings.get("quant_algo") is not None:
            found = [((), {"quant_method": "modelopt", **settings})]
    if not found:
        return None
    path, settings = found[0]
    if any(other != settings for _, other in found):
        raise CheckpointError(
            f"{folder}/config.json has two different quantization_config, the first under {'.'.join(path)}",
            hint="remove the one that does not describe the weights",
        )
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and settings.get("load_in_4bit"):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in METHODS:
        raise _no_rule(method)
    quantisation = Quantisation(method, METHODS[method], settings, path)
    _refuse_options(quantisation)
    return quantisation


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with dense weights: nothing in it speaks of quantisation."""
    plain = deepcopy(dict(config))

    def strip(section: dict[str, Any]) -> None:
        for key in _DROPPED_KEYS:
            section.pop(key, None)
        for inner in section.values():
            if isinstance(inner, dict):
                strip(inner)

    strip(plain)
    return plain


def configured_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype of the model that config.json names, as torch calls it; None if it names none.

    A composite model may name it only in a section, such as text_config.
    """
    sections = [config, *(v for key, v in config.items() if isinstance(v, dict) and key not in CONFIG_KEYS)]
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            if isinstance(section.get(key), str):
                return str(section[key]).removeprefix("torch.")
    return None


def _configurations(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every quantisation in a config and the configs inside it, with the keys that lead there."""
    for key in CONFIG_KEYS:
        if section.get(key):
            yield (*path, key), section[key]
    for key, inner in section.items():
        if isinstance(inner, dict) and key not in CONFIG_KEYS:
            yield from _configurations(inner, (*path, key))


def _no_rule(method: object) -> CheckpointError:
    name = method if isinstance(method, str) else "unknown"
    known = ", ".join(dict.fromkeys(METHODS.values()))
    reason = REFUSED.get(name, f"its quant_method has no rule here; rules exist for {known}")
    return CheckpointError(f"the checkpoint is quantised ({name[:80]}): {reason}", hint=UNQUANTISED)


def _refuse_options(quantisation: Quantisation) -> None:
    """Raise CheckpointError for options that change the values and that no rule reads."""
    settings, method = quantisation.settings, quantisation.method

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"the checkpoint is quantised ({method}) with {what}", hint=UNQUANTISED)

    if quantisation.rules == "compressed-tensors":
        for key, why in (
            ("transform_config", "its weights are stored rotated"),
            ("sparsity_config", "its weights are stored sparse"),
        ):
            option = settings.get(key)
            if option and not (isinstance(option, dict) and option.get("format") == "dense"):
                raise refuse(f"a {key}: {why}")
        groups = settings.get("config_groups")
        sections = [settings, *(groups.values() if isinstance(groups, dict) else ())]
        for form in (section.get("format") for section in sections if isinstance(section, dict)):
            if form is not None and form not in _COMPRESSED:
                raise refuse(f"the format {str(form)[:40]!r}: rules exist for {', '.join(_COMPRESSED[1:])}")
        status = settings.get("quantization_status", "compressed")
        if status != "compressed":
            raise refuse(f"quantization_status {status!r}: only `compressed` weights are stored as codes")
    if quantisation.rules == "bitsandbytes" and not settings.get("load_in_4bit"):
        raise refuse("8 bits: LLM.int8 keeps outliers in another dtype at run time; 4 bits are read")
    if quantisation.rules == "modelopt":
        algorithm = str(settings.get("quant_algo", ""))
        if algorithm not in ("FP8", "NVFP4", "MIXED_PRECISION", ""):
            raise refuse(f"quant_algo {algorithm[:40]!r}: rules exist for FP8 and NVFP4")
