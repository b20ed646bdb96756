"""The methods: which singular triplets are taken, and what is made of them. Imports no torch.

For a weight W = U diag(s) V^T (m, n), a method takes r triplets (its `mode`) and makes B (m, r) and A (r, n) of them
(its `factors`). The model computes base + scale * B @ A, where scale is alpha / r, or alpha / sqrt(r) with rsLoRA.

    factors       B                 A                   base
    balanced      U sqrt(s/scale)   sqrt(s/scale) V^T   W - scale * B @ A
    orthonormal   U                 V^T                 W - scale * B @ A
    right         0                 V^T                 W
    left          U                 0                   W

With `right` and `left` the model is not changed: no base is written, and the output is an adapter of the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Mode = Literal["min", "max", "mid", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
Factors = Literal["balanced", "orthonormal", "right", "left"]
_FORMULAS: Mapping[Factors, tuple[str, str, str]] = {
    "balanced": ("U sqrt(S/scale)", "sqrt(S/scale) V^T", "W - scale * B @ A"),
    "orthonormal": ("U", "V^T", "W - scale * B @ A"),
    "right": ("0", "V^T", "W"),
    "left": ("U", "0", "W"),
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    Attributes:
        name: As `--method` takes it.
        mode: Which triplets: those of the smallest singular values, the largest, the middle ones, or a random choice.
        factors: What B and A are; see the table of this module.
        source: Where the method was published.
        dropout: `lora_dropout` unless another one is asked for.
        init_lora_weights: The value in adapter_config.json. True makes PEFT load a plain LoRA; its other values make
            PEFT compute its own factors, or freeze one.
    """

    name: str
    mode: Mode
    factors: Factors
    source: str
    dropout: float = 0.0
    init_lora_weights: bool | str = True

    @property
    def writes_base(self) -> bool:
        """Whether the component is taken out of the model, so that a residual base is written."""
        return self.factors in ("balanced", "orthonormal")

    @property
    def trained(self) -> str:
        """Which factors PEFT trains."""
        return "A" if self.init_lora_weights == "mica" else "A and B"

    @property
    def formulas(self) -> str:
        """B, A and the base, in one line."""
        B, A, base = _FORMULAS[self.factors]
        return f"B = {B}, A = {A}, base = {base}"


# Dropout on the input of A removes a part of what the factors carry, so a pair with dropout does not compute the
# model's function in training mode. Where the factors carry the model the default is 0. MiLoRA keeps its authors' 0.05.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("milora", "min", "balanced", "arXiv 2406.09044", dropout=0.05),
        Method("pissa", "max", "balanced", "arXiv 2404.02948"),
        Method("olora-tail", "min", "orthonormal", "arXiv 2606.02437, section 4.1.2"),
        Method("rlmo", "min", "right", "arXiv 2606.31813"),
        Method("rlpo", "max", "right", "arXiv 2606.31813"),
        Method("mica", "min", "left", "arXiv 2604.01694", init_lora_weights="mica"),
        Method("mid", "mid", "balanced", "a control experiment"),
        Method("random", "random", "balanced", "a control experiment"),
    )
}
MILORA = METHODS["milora"]
_OF_MODE: Mapping[str, Method] = {m.mode: m for m in METHODS.values() if m.factors == "balanced"}


def method_of_mode(mode: str) -> Method:
    """The method that takes these triplets and balanced factors: the meaning of `--mode` alone."""
    return _OF_MODE[mode]


def method_of_inputs(inputs: Mapping[str, Any]) -> Method:
    """The method of a recipe, or of the inputs in a manifest. Older manifests have only the mode."""
    return METHODS[inputs["method"]] if "method" in inputs else _OF_MODE.get(inputs.get("mode", "min"), MILORA)
