"""Convert a trained adapter of a residual base into a plain LoRA of the original model.

    residual + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

An adapter of the original model (`rlmo`, `mica`) is a plain LoRA already: it is copied, or cut.

The rank doubles, or each module is cut to the best `rank`: QR of both factors, then the SVD of the small core in
float64.

Where modules differ in rank or scale, or are cut, the scales are multiplied into the factors and every module's alpha
is its rank. Servers such as vLLM read one r and one lora_alpha for the whole adapter, and ignore patterns without a
warning.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor

from milora_init import __version__
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import plan_header
from milora_init.checkpoint.writer import SafetensorsWriter, extended, sync_folder, writing
from milora_init.errors import OutputError, PlanError, UsageError
from milora_init.hub.pair import is_hub_id, locate_adapter, locate_pair
from milora_init.lora.compatibility import (
    require_initial_adapter,
    require_same_modules,
    require_trained_from,
    require_trained_on,
)
from milora_init.lora.config import rank_and_alpha_patterns, stacked_alpha
from milora_init.lora.folder import (
    CONFIG_FILE,
    LORA_CONFIG,
    LORA_FOLDER,
    WEIGHTS_FILE,
    LoraAdapter,
    adapter_folder,
    read_lora,
)
from milora_init.lora.tensor_layout import lora_key, stack_factors, stacked_shapes, unstack_factors
from milora_init.manifest import (
    MANIFEST,
    WORK_FOLDER,
    Manifest,
    fingerprint,
    read_manifest,
)
from milora_init.plan.finished import another_request, require_intact
from milora_init.records import (
    CONVERTED,
    ORIGINAL_MODEL,
    RECORDS,
    ConvertedModule,
    ConvertResult,
    read_converted,
    require_pair,
)
from milora_init.run.output_folder import (
    require_no_file,
    require_no_other_output,
    require_outside,
    require_writable,
)


def convert(  # noqa: PLR0913  the options of the command
    pair: str,
    adapter: str,
    out: str,
    *,
    model: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> ConvertResult:
    """Write to `out` a LoRA for the original model that computes what `adapter` computes on its residual base.

    See `api.convert`. The folder is written under another name and renamed when it is complete.
    """
    started = time.monotonic()
    for name, value in (("PAIR", pair), ("--adapter", adapter), ("--out", out)):
        if not value:  # an unset variable of a shell, for example
            raise UsageError(f"{name} is empty", hint="name a folder")
    located = locate_pair(pair, only="adapter", cache_dir=cache_dir, token=token)
    initial, manifest = _initial_adapter(located, pair)
    trained = locate_adapter(adapter, cache_dir=cache_dir, token=token)
    before, after = _read_adapters(initial, trained, manifest, pair)
    if model is None and manifest is None:
        raise UsageError(f"no {MANIFEST} beside {initial} names the original model", hint="add --model MODEL")
    source = manifest.source if manifest else {"model": None, "revision": None}
    revision = source["revision"] if model in (None, source["model"]) else None
    from_hub = revision is not None or (model not in (None, source["model"]) and is_hub_id(str(model)))
    model = model or str(source["model"])
    times = 2 if manifest is None or manifest.method.writes_base else 1  # an adapter of the original is plain already
    ranks = _ranks(before, rank, times)
    target = Path(out).expanduser()
    for folder in (initial, after.path):
        require_outside(target, folder, "./plain")
    scaled = rank is not None or bool(before.config.get("rank_pattern") or before.config.get("alpha_pattern"))
    config = {**_plain_config(before.config, model), **_ranks_and_alphas(before, ranks, times, scaled=scaled)}
    inputs = {
        "convert": __version__,
        "initial": before.digest,
        "adapter": after.digest,
        "rank": rank,
        "scales": {module: factors.scale for module, factors in after.modules.items()},
        "config": config,
        **({"base": ORIGINAL_MODEL} if times == 1 else {}),
    }
    if finished := _finished(target, inputs, overwrite=overwrite):
        return finished

    def write(folder: Path) -> ConvertResult:
        start = before if times == 2 else None
        modules = _write_weights(start, after, ranks, folder / WEIGHTS_FILE, compress=rank is not None, scaled=scaled)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        result = ConvertResult(
            out=out,
            pair=pair,
            adapter=adapter,
            model=model,
            revision=revision,
            from_hub=from_hub,
            modules=tuple(modules),
            cut=rank is not None,
            source_files=manifest.inputs["source"] if manifest else {},
            fingerprint=fingerprint(inputs),
            inputs=inputs,
            files={path.name: path.stat().st_size for path in files},
            hashes={path.name: sha256(path) for path in files},
            elapsed_s=round(time.monotonic() - started, 3),
        )
        (folder / CONVERTED).write_text(json.dumps(result.content(), indent=1) + "\n")
        return result

    return _write_folder(target.resolve(), write)  # a link to a folder stays a link


def _initial_adapter(folder: Path, pair: str) -> tuple[Path, Manifest | None]:
    """The folder of the initial adapter, in a pair or the folder itself, and the manifest of its pair if there is one.

    Raises:
        OutputError: The folder is neither a pair nor an adapter.
    """
    has_record = any((folder / name).exists() for name in RECORDS)
    is_adapter = (folder / CONFIG_FILE).exists() or (folder / LORA_CONFIG).exists()
    if has_record or (folder / WORK_FOLDER).is_dir() or not is_adapter:
        manifest = require_pair(folder, pair)
        return adapter_folder(folder, manifest.method), manifest
    if (folder / LORA_FOLDER).is_dir():
        return folder / LORA_FOLDER, manifest
    return folder, read_manifest(folder.absolute().parent)


def _read_adapters(
    initial: Path, adapter: Path, manifest: Manifest | None, pair: str
) -> tuple[LoraAdapter, LoraAdapter]:
    """The initial and the trained adapter.

    Raises:
        CheckpointError: An adapter that cannot be read.
        PlanError: The two do not belong together, or the trained one is not trained.
    """
    records = manifest.weights if manifest else ()
    before, after = read_lora(initial, records), read_lora(adapter, records)
    if manifest:
        require_initial_adapter(before, manifest)
    require_same_modules(before, after, manifest)
    if after.digest == before.digest:
        hint = "name the folder that the trainer saved"
        raise PlanError(f"{adapter} holds the initial factors of {pair}: it was not trained", hint=hint)
    if manifest:
        require_trained_on(after, manifest, before.weights)
    else:
        require_trained_from(before.weights, after.weights)
    return before, after


def _finished(out: Path, inputs: Mapping[str, Any], *, overwrite: bool) -> ConvertResult | None:
    """The record in `out` if the same conversion was finished there; None if `out` is to be written.

    Raises:
        OutputError: `out` holds something else.
    """
    require_no_file(out)
    require_no_other_output(out, CONVERTED)
    if not out.exists():
        require_writable(out)
        return None
    record = read_converted(out)
    if record is None:
        if any(out.iterdir()):
            raise OutputError(f"--out {out} holds something else", hint="choose another --out, or move it away")
        return None
    if overwrite:
        if others := sorted({path.name for path in out.iterdir()} - {*record.files, CONVERTED}):
            hint = "move it away, or choose another --out"
            raise OutputError(f"--out {out} holds {others[0]}, which --overwrite does not replace", hint=hint)
        return None
    if record.fingerprint != fingerprint(inputs):
        raise another_request(out, record.inputs, inputs)
    require_intact(out, record.files)
    return replace(record, unchanged=True)


def _write_folder(out: Path, write: Callable[[Path], ConvertResult]) -> ConvertResult:
    """Write a folder under another name, then rename it to `out`. An earlier folder is removed only after that.

    The names are random, so that a second run or other files cannot end up in the output.
    """
    unique = f".{out.name}.{uuid4().hex[:8]}"
    partial, former = out.with_name(extended(unique, ".partial")), out.with_name(extended(unique, ".former"))
    try:
        with writing(out):
            partial.mkdir(parents=True)
            result = write(partial)
            sync_folder(partial)
            if out.exists():
                out.replace(former)
            try:
                partial.replace(out)
            except BaseException:
                if former.exists():
                    former.replace(out)
                raise
            sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)
    return result


def _ranks(before: LoraAdapter, rank: int | None, times: int) -> dict[str, int]:
    """The rank of each module of the plain adapter, without a cut `times` the trained one.

    Raises PlanError for a `rank` that no module has.
    """
    whole = {module: times * factors.rank for module, factors in before.modules.items()}
    if rank is None:
        return whole
    limits = {module: min(whole[module], *factors.shape) for module, factors in before.modules.items()}
    highest = max(limits.values())
    if not 1 <= rank <= highest:
        raise PlanError(f"rank {rank} is not between 1 and {highest}, the most of any module", hint=f"--rank {highest}")
    return {module: min(rank, limit) for module, limit in limits.items()}


def _write_weights(
    before: LoraAdapter | None,
    after: LoraAdapter,
    ranks: Mapping[str, int],
    path: Path,
    *,
    compress: bool,
    scaled: bool,
) -> list[ConvertedModule]:
    """Write the plain adapter's factors; with `scaled`, each module's scale is multiplied into its B.

    `before` is None where the initial adapter adds nothing to its model: the trained factors are the plain ones.
    """
    header = plan_header(
        (
            (lora_key(module, factor), "F32", shape)
            for module, factors in after.modules.items()
            for factor, shape in zip("AB", stacked_shapes(ranks[module], factors.shape, factors.experts), strict=True)
        ),
        metadata={"format": "pt"},
    )
    results = []
    with ExitStack() as files:
        trained = files.enter_context(safe_open(after.weights, framework="pt"))
        initial = files.enter_context(safe_open(before.weights, framework="pt")) if before else None
        writer = files.enter_context(SafetensorsWriter(path, header))
        for module, factors in after.modules.items():
            start, lost = before.modules[module] if before else factors, 0.0
            A, B = difference(
                (trained.get_tensor(factors.A), trained.get_tensor(factors.B)),
                (initial.get_tensor(start.A), initial.get_tensor(start.B)) if initial else None,
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


def difference(
    trained: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor] | None, experts: int
) -> tuple[Tensor, Tensor]:
    """Factors of B @ A - B0 @ A0 in float64, by expert: A (experts, 2r, n) and B (experts, m, 2r).

    Args:
        trained, initial: A (experts * r, n) and B (m, r * experts), as in the adapter's file. Without `initial`, the
            result has the factors of B @ A.
        experts: How many are stacked; 1 for a plain module.
    """
    A, B = unstack_factors(trained[0].double(), trained[1].double(), experts)
    if initial is None:
        return A, B
    A0, B0 = unstack_factors(initial[0].double(), initial[1].double(), experts)
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


def _ranks_and_alphas(before: LoraAdapter, ranks: Mapping[str, int], times: int, *, scaled: bool) -> dict[str, Any]:
    """The keys of adapter_config.json for ranks and scales; with `scaled`, each module's alpha is its rank."""
    if not scaled:
        rslora = bool(before.config.get("use_rslora"))
        alpha = stacked_alpha(before.config["lora_alpha"], times, rslora=rslora)
        return {"r": times * before.config["r"], "lora_alpha": alpha, "use_rslora": rslora,
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
