"""Manifests and scans of models that are too large to make, with names that a download may have."""

from __future__ import annotations

import random
from collections.abc import Sequence

from milora_init.accuracy import Certificate, Rounding
from milora_init.expert_slot import ExpertSlot
from milora_init.manifest import Manifest, WeightRecord
from milora_init.spectra import CURVE_POINTS, RankFigures, ScanResult, WeightSpectrum

HOSTILE = "<img src=x onerror=alert(1)>\"'&</title></script><script>alert(2)</script>\x1b]0;T\x07\u202e::error::$x^2$"
LLAMA_405B = [
    f"model.layers.{layer}.{kind}"
    for layer in range(126)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{kind}"
    for layer in range(58)
    for expert in range(256)
    for kind in ("gate_proj", "up_proj", "down_proj")
]
FULL = [f"model.layers.{layer}.kind_{kind}.{'name_' * 20}" for layer in range(300) for kind in range(60)]
SHUFFLED = [f"block{number}.unit{number * 7919 % 50021}.{'long_name_' * 40}{number}" for number in range(45_000)]


def manifest(names: Sequence[str], *, model: str = "org/model", out: str = "out") -> Manifest:
    """A manifest with a weight of each of these names, and figures drawn at random."""
    draw = random.Random(0)
    weights = tuple(_record(name, draw) for name in names)
    return Manifest(
        source={"model": model, "revision": None, "architecture": "LlamaForCausalLM"},
        out=out,
        fingerprint="0" * 64,
        inputs={"rank": 64, "mode": "min", "alpha": 64, "rslora": False},
        versions={"milora_init": "0"},
        adapter={"task_type": "CAUSAL_LM"},
        files={"model.safetensors": 1},
        notices=(),
        weights=weights,
        elapsed_s=1.0,
    )


def _record(name: str, draw: random.Random) -> WeightRecord:
    certificate = Certificate(
        path=draw.choice(("lanczos", "eigh", "svd")), reason="", residual=1e-15, orthogonality=1e-15, gap=0.1,
        component_error=draw.choice((None, 1e-9, 1e-12)), complete="",
    )  # fmt: skip
    expert = ExpertSlot(name, 0, 1, 0, 1) if "experts" in name else None
    return WeightRecord(
        module=name, tensor=f"{name}.weight", shape=(4096, 4096), transposed=False, row=None, expert=expert, key=name,
        source_dtype="bfloat16", dtype="bfloat16", rank=64, scale=1.0, s_first=draw.random(), s_last=1e-3, s_max=9.0,
        energy=draw.random() / 100, untrainable=0, certificate=certificate,
        rounding=Rounding(0.1, 1e-3, draw.random() / 10, {"bfloat16": 0.01}), device="cpu",
        elapsed_s=draw.random(), read_s=0.0, write_s=0.0,
    )  # fmt: skip


def scan(names: Sequence[str], *, model: str = "org/model") -> ScanResult:
    """A scan with a weight of each of these names, and figures drawn at random."""
    draw = random.Random(0)
    return ScanResult(model, None, "LlamaForCausalLM", (16, 64), tuple(_spectrum(n, draw) for n in names), (), 1.0)


def _spectrum(name: str, draw: random.Random) -> WeightSpectrum:
    low = draw.choice((0.0, 1e-6, 1e-3))
    curve = (*(9.0 / (1 + point) for point in range(CURVE_POINTS - 1)), low)
    figures = tuple(
        RankFigures(rank, draw.random() / 100, 0.5, draw.random(), None, {"bfloat16": 0.1, "float16": None}, 0.5)
        for rank in (16, 64)
    )
    return WeightSpectrum(
        module=name, tensor=f"{name}.weight", row=None, suffix=name.rpartition(".")[2], shape=(4096, 4096),
        dtype="bfloat16", s_max=9.0, s_min=low, condition=9.0 / low if low else None, stable_rank=20.0,
        effective_rank=300.0, ranks=figures, curve=curve, singular_values=None, elapsed_s=0.1,
    )  # fmt: skip
