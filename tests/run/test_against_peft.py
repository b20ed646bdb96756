"""Our factors against PEFT's own initialisation of the same methods, both measured against a float64 SVD.

PEFT decomposes in float32. At the minor end its error is relative to the largest singular value, so the spectrum
matters: here the singular values span five orders of magnitude, as in a trained language model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import reference
from support.training import TOKENS
from torch import Tensor

from milora_init.manifest import Manifest

Built = Callable[..., Path]
Start = Callable[..., Manifest]
RANK = 4


@pytest.fixture
def source(own: Built) -> Path:
    """A tiny llama whose q and up projections have singular values from 1e2 to 1e-3."""
    folder = own("llama")
    generator = torch.Generator().manual_seed(0)
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name, W in weights.items():
            if "q_proj" in name or "up_proj" in name:
                m, n = W.shape
                k = min(m, n)
                U, V = (
                    torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n)
                )
                weights[name] = ((U * torch.logspace(2, -3, k, dtype=torch.float64)) @ V.T).float().contiguous()
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def sine(X: Tensor, truth: Tensor) -> float:
    """The sine of the largest angle between the column space of X and that of the orthonormal truth, both (k, r)."""
    Q = torch.linalg.qr(X.double()).Q
    return float(torch.linalg.matrix_norm(Q - truth @ (truth.T @ Q), 2))


def peft_factors(source: Path, init: str) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by module, as PEFT initialises them."""
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=init, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(base, config)
    return {
        name.removeprefix("base_model.model."): (module.lora_B["default"].weight, module.lora_A["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }


@pytest.mark.parametrize(
    ("method", "init", "end"),
    [("mica", "mica", "min"), ("olora-tail", "mica", "min"), ("milora", "mica", "min"), ("pissa", "pissa", "max")],
)
def test_our_directions_are_at_least_as_near_to_float64_as_those_of_peft(
    method: str, init: str, end: str, source: Path, start: Start, tmp_path: Path
) -> None:
    """PEFT has no olora-tail and no MiLoRA: the left directions of both are those of its mica."""
    manifest = start(source, method=method, target=("q_proj", "up_proj"))
    folder = tmp_path / "out" / ("lora" if manifest.method.writes_base else "")
    ours, theirs = load_file(folder / "adapter_model.safetensors"), peft_factors(source, init)
    original = {name: W for path in source.glob("*.safetensors") for name, W in load_file(path).items()}
    assert len(theirs) == len(manifest.weights) == 4
    worst = 0.0
    for record in manifest.weights:
        truth = reference.spectrum(original[record.tensor])
        U = truth.U[:, reference.wanted(len(truth.s), RANK, end)]
        B = ours[f"base_model.model.{record.module}.lora_B.weight"]
        other = sine(theirs[record.module][0].detach(), U)
        # Each entry is stored in float32; balanced factors differ in length by the root of the spectrum's span.
        assert sine(B, U) <= max(other, 64 * reference.EPS32), record.module
        assert sine(B, U) <= 64 * reference.EPS32
        worst = max(worst, other)
    if end == "min":
        assert worst > 1e-4, "the float32 SVD has no error here: the spectrum is too easy for this test"


def test_mica_loads_without_an_svd_and_with_b_frozen(
    source: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(source, method="mica", target=("q_proj", "up_proj"))
    out = tmp_path / "out"
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = base(input_ids=TOKENS).logits

    real = torch.linalg.svd
    calls: list[str] = []

    def svd(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(matrix.device.type)
        return real(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    model = PeftModel.from_pretrained(base, str(out), is_trainable=True, low_cpu_mem_usage=True)
    assert not calls
    weights = load_file(out / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, weights[name.replace(".default", "")])
            assert parameter.requires_grad == (".lora_A." in name)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
