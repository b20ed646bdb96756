"""Convert a trained adapter of a residual base into a plain LoRA of the original model.

    residual + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

The rank doubles, or each module is cut to the best `rank`: QR of both factors, then the SVD of the small core in
float64.

Where modules differ in rank or scale, or are cut, the scales are multiplied into the factors and every module's alpha
is its rank. Servers such as vLLM read one r and one lora_alpha for the whole adapter, and ignore patterns without a
warning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor

from milora_init.checkpoint.header import plan_header
from milora_init.checkpoint.writer import SafetensorsWriter, extended, sync_folder, writing
from milora_init.errors import OutputError, PlanError, UsageError
from milora_init.lora.compatibility import (
    require_initial_adapter,
    require_same_modules,
    require_trained_from,
    require_trained_on,
)
from milora_init.lora.config import rank_and_alpha_patterns, stacked_alpha
from milora_init.lora.folder import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter, read_lora
from milora_init.lora.tensor_layout import lora_key, stack_factors, stacked_shapes, unstack_factors
from milora_init.manifest import read_manifest
from milora_init.run.output_folder import require_outside


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """One module of the plain adapter.

    Attributes:
        module: Its name.
        rank: Of its factors.
        lost: The relative Frobenius norm of what compression cut off; 0 without compression.
    """

    module: str
    rank: int
    lost: float


def convert(
    initial: Path, adapter: Path, out: Path, *, model: str | None = None, rank: int | None = None
) -> list[ConvertedModule]:
    """Write to `out` a LoRA for the original model that computes what `adapter` computes on its residual base.

    Args:
        initial: The adapter as milora-init wrote it.
        adapter: The same adapter after training.
        out: Folder to write; it must not exist, or be empty. It is renamed from a partial one when it is complete.
        model: The original model, for the adapter's config. None: the one that the manifest beside `initial` names.
        rank: Compress modules of a higher rank to this one. None keeps everything, at twice the rank.

    Raises:
        CheckpointError: An adapter that cannot be read.
        PlanError: The two do not belong together, or hold more than factors; or `rank` is above that of every module.
        OutputError: `out` holds something or cannot be written.
        UsageError: There is neither `model` nor a manifest that names the original model.
    """
    manifest = read_manifest(initial.absolute().parent)
    records = manifest.weights if manifest else ()
    before, after = read_lora(initial, records), read_lora(adapter, records)
    if manifest:
        require_initial_adapter(before, manifest)
    require_same_modules(before, after, manifest)
    if after.digest == before.digest:
        hint = "name the folder that the trainer saved"
        raise PlanError(f"{adapter} holds the initial factors: it was not trained", hint=hint)
    if manifest:
        require_trained_on(after, manifest, before.weights)
    else:
        require_trained_from(before.weights, after.weights)
    if model is None and manifest is None:
        raise UsageError(f"no milora_init.json beside {initial} names the original model", hint="--base ORIGINAL")
    model = model or str(manifest.source["model"] if manifest else "")
    ranks = _ranks(before, rank)
    for folder in (initial, adapter):
        require_outside(out, folder, "./plain")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out} exists", hint="choose another --out, or move it away")
    out = out.resolve()  # a link to an empty folder stays a link

    # A random name, so that a second run or somebody else's files cannot end up in the output.
    partial = out.with_name(extended(f".{out.name}.{uuid4().hex[:8]}", ".partial"))
    try:
        with writing(out):
            partial.mkdir(parents=True)
        scaled = rank is not None or bool(before.config.get("rank_pattern") or before.config.get("alpha_pattern"))
        config = {**_plain_config(before.config, model), **_ranks_and_alphas(before, ranks, scaled=scaled)}
        results = _write_weights(before, after, ranks, partial / WEIGHTS_FILE, compress=rank is not None, scaled=scaled)
        with writing(out):
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
            sync_folder(partial)
            partial.replace(out)
            sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return results


def _ranks(before: LoraAdapter, rank: int | None) -> dict[str, int]:
    """The rank of each module of the plain adapter. Raises PlanError for a `rank` that no module has."""
    doubled = {module: 2 * factors.rank for module, factors in before.modules.items()}
    if rank is None:
        return doubled
    limits = {module: min(doubled[module], *factors.shape) for module, factors in before.modules.items()}
    highest = max(limits.values())
    if not 1 <= rank <= highest:
        raise PlanError(f"rank {rank} is not between 1 and {highest}, the most of any module", hint=f"--rank {highest}")
    return {module: min(rank, limit) for module, limit in limits.items()}


def _write_weights(
    before: LoraAdapter, after: LoraAdapter, ranks: Mapping[str, int], path: Path, *, compress: bool, scaled: bool
) -> list[ConvertedModule]:
    """Write the plain adapter's factors; with `scaled`, each module's scale is multiplied into its B."""
    header = plan_header(
        (
            (lora_key(module, factor), "F32", shape)
            for module, factors in before.modules.items()
            for factor, shape in zip("AB", stacked_shapes(ranks[module], factors.shape, factors.experts), strict=True)
        ),
        metadata={"format": "pt"},
    )
    results = []
    with (
        safe_open(before.weights, framework="pt") as initial,
        safe_open(after.weights, framework="pt") as trained,
        SafetensorsWriter(path, header) as writer,
    ):
        for module, factors in before.modules.items():
            trained_factors, lost = after.modules[module], 0.0
            A, B = difference(
                (trained.get_tensor(trained_factors.A), trained.get_tensor(trained_factors.B)),
                (initial.get_tensor(factors.A), initial.get_tensor(factors.B)),
                factors.experts,
            )
            if scaled:
                B = factors.scale * B
            if compress:
                A, B, lost = compressed(A, B, ranks[module])
            for factor, tensor in zip("AB", stack_factors(A, B), strict=True):
                writer.write(lora_key(module, factor), tensor.float().contiguous())
            results.append(ConvertedModule(module, ranks[module], lost))
        writer.finish()
    return results


def difference(trained: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor], experts: int) -> tuple[Tensor, Tensor]:
    """Factors of B @ A - B0 @ A0 in float64, by expert: A (experts, 2r, n) and B (experts, m, 2r).

    Args:
        trained, initial: A (experts * r, n) and B (m, r * experts), as in the adapter's file.
        experts: How many are stacked; 1 for a plain module.
    """
    (A, B), (A0, B0) = (unstack_factors(A.double(), B.double(), experts) for A, B in (trained, initial))
    return torch.cat([A, A0], dim=1), torch.cat([B, -B0], dim=2)


def compressed(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Each expert's factors cut to `rank`: A (experts, rank, n), B (experts, m, rank); the largest relative loss."""
    best = [best_rank(B_e, A_e, rank) for B_e, A_e in zip(B, A, strict=True)]
    return (
        torch.stack([A_e for _, A_e, _ in best]),
        torch.stack([B_e for B_e, *_ in best]),
        max(lost for *_, lost in best),
    )


def best_rank(B: Tensor, A: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The factors (m, k) and (k, n) whose product is nearest to B @ A; its relative distance in Frobenius norm."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = s[:k].sqrt()
    # Where the product is below the resolution of float32 factors, the adapter was hardly trained: nothing is lost.
    resolved = torch.finfo(torch.float32).eps * float(R_B.norm() * R_A.norm())
    whole = float(s.norm())
    lost = float(s[k:].norm()) / whole if whole > resolved else 0.0
    return Q_B @ (U[:, :k] * root), (root[:, None] * Vh[:k]) @ Q_A.mT, lost


def _ranks_and_alphas(before: LoraAdapter, ranks: Mapping[str, int], *, scaled: bool) -> dict[str, Any]:
    """The keys of adapter_config.json for ranks and scales; with `scaled`, each module's alpha is its rank."""
    if not scaled:
        rslora = bool(before.config.get("use_rslora"))
        alpha = stacked_alpha(before.config["lora_alpha"], 2, rslora=rslora)
        return {"r": 2 * before.config["r"], "lora_alpha": alpha, "use_rslora": rslora,
                "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    highest = max(ranks.values())
    by_name = {factors.name: ranks[module] for module, factors in before.modules.items()}
    rank_pattern, alpha_pattern = rank_and_alpha_patterns(by_name, by_name, rank=highest, alpha=highest)
    return {"r": highest, "lora_alpha": highest, "use_rslora": False,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}  # fmt: skip


def _plain_config(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The other keys of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": model,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": "none",
        "target_modules": config.get("target_modules"),
        **({"target_parameters": parameters} if (parameters := config.get("target_parameters")) else {}),
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }
