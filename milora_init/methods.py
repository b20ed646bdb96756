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
        use: What it is for, in a few words.
        reported: What others report of it, with the number of each paper: nothing here is our own result.
        init_lora_weights: The value in adapter_config.json. True makes PEFT load a plain LoRA; its other values make
            PEFT compute its own factors, or freeze one.
    """

    name: str
    mode: Mode
    factors: Factors
    source: str
    use: str
    reported: str
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


# `lora_dropout` of every method, unless another one is asked for. Dropout acts on the input of A, so in training mode
# it removes a part of what the factors carry. Where that was taken out of the base, the pair then does not compute the
# model's function, and starts from a higher loss: docs/methods.md has what was measured, for milora too. With
# reinforcement learning, the policy that samples and the policy that is trained would be two functions.
DROPOUT = 0.0

_RL_COLLAPSE = (
    "For reinforcement learning with verifiable rewards, arXiv:2512.23165, arXiv:2601.09361 and arXiv:2606.31813 "
    "report that PiSSA and MiLoRA do worse than LoRA or collapse."
)
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "milora", "min", "balanced", "arXiv 2406.09044", use="supervised fine-tuning",
            reported="arXiv:2406.09044 reports gains over LoRA and PiSSA. arXiv:2602.04998 reports nine LoRA variants, "
            "MiLoRA and PiSSA among them, within 1 to 2 % of each other when each has its own learning rate. "
            + _RL_COLLAPSE,
        ),
        Method(
            "pissa", "max", "balanced", "arXiv 2404.02948",
            use="supervised fine-tuning that starts in the largest directions",
            reported="arXiv:2404.02948 reports gains over LoRA, arXiv:2602.04998 none beyond 1 to 2 % when each has "
            "its own learning rate. " + _RL_COLLAPSE,
        ),
        Method(
            "olora-tail", "min", "orthonormal", "arXiv 2606.02437, section 4.1.2",
            use="reinforcement learning with a residual base",
            reported="arXiv:2606.02437 reports that the singular vectors without the singular values train stably and "
            "beat LoRA in reinforcement learning.",
        ),
        Method(
            "rlmo", "min", "right", "arXiv 2606.31813", use="reinforcement learning",
            reported="arXiv:2606.31813 reports that it trains stably and beats LoRA in reinforcement learning.",
        ),
        Method(
            "rlpo", "max", "right", "arXiv 2606.31813", use="comparisons with rlmo",
            reported="The largest directions in the same form, arXiv:2606.31813.",
        ),
        Method(
            "mica", "min", "left", "arXiv 2604.01694", use="continued pretraining",
            reported="Method of arXiv:2604.01694. PEFT's own benchmark (Llama-3.2-3B, MetaMathQA) reports 43.1 % "
            "for it and 47.8 % for LoRA, with more forgetting.",
            init_lora_weights="mica",
        ),
        Method(
            "mid", "mid", "balanced", "a control experiment", use="comparisons",
            reported="Triplets from the middle of the spectrum.",
        ),
        Method(
            "random", "random", "balanced", "a control experiment", use="comparisons",
            reported="Triplets drawn at random; `--seed` sets which.",
        ),
    )
}  # fmt: skip
MILORA = METHODS["milora"]
_OF_MODE: Mapping[str, Method] = {m.mode: m for m in METHODS.values() if m.factors == "balanced"}


def method_of_mode(mode: str) -> Method:
    """The method that takes these triplets and balanced factors: the meaning of `--mode` alone."""
    return _OF_MODE[mode]


def method_of_inputs(inputs: Mapping[str, Any]) -> Method:
    """The method of a recipe, or of the inputs in a manifest. Older manifests have only the mode."""
    return METHODS[inputs["method"]] if "method" in inputs else _OF_MODE.get(inputs.get("mode", "min"), MILORA)


def recorded_method(inputs: object) -> Method | None:
    """The method that inputs in a record name; None for those of another command, or of a damaged file."""
    if not isinstance(inputs, Mapping):
        return None
    name, mode = inputs.get("method"), inputs.get("mode")
    if name is not None:
        return METHODS.get(name) if isinstance(name, str) else None
    return _OF_MODE.get(mode) if isinstance(mode, str) else None
