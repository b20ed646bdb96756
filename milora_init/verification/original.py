"""Verify an adapter of an original model: its files, its config, and its directions against the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_init.checkpoint.dequantise import locate
from milora_init.checkpoint.folder import Checkpoint, open_model
from milora_init.hub.source import fetch_original
from milora_init.linalg.svd import singular_triplets
from milora_init.lora.folder import open_factors
from milora_init.lora.tensor_layout import initial_block
from milora_init.manifest import Manifest, WeightRecord
from milora_init.options import InitOptions
from milora_init.plan.weights import weight_seed
from milora_init.verification.adapter import (
    check_adapter_config,
    check_adapter_header,
    check_initial_factors,
    check_trained_adapter,
)
from milora_init.verification.files import MAKE_AGAIN, Pair, check_files, check_stray_files
from milora_init.verification.tensors import EPS32, model_hint, read_row, spread
from milora_init.verification.verdict import Finding, Verdict, verdict_code


def verify_adapter(
    output: Pair, original: InitOptions | None, trained: Path | None, *, given_adapter: str | None, all_components: bool
) -> Verdict:
    """The verdict on an output without a base.

    Args:
        output: The folder.
        original: Names the original model; None to compare files only.
        trained: A trained adapter to check too.
        given_adapter: The same as the user wrote it.
        all_components: Compute the directions of all weights again, not of a sample of three.

    Raises:
        CheckpointError: A file that cannot be read.
        HubError: The original model cannot be fetched.
    """
    manifest = output.manifest
    modules = {record.expert.parameter if record.expert else record.module for record in manifest.weights}
    checked: dict[str, Any] = {"files": len(manifest.files), "modules": len(manifest.weights)}
    findings = [*check_files(output), *check_stray_files(output.folder, manifest.files, "adapter")]
    is_initial = not any(finding.where == output.adapter_files[1] for finding in findings)
    readable = False
    if all((output.folder / name).is_file() for name in output.adapter_files):
        header_findings = check_adapter_header(output.weights, manifest.weights)
        readable = not header_findings
        findings += [*header_findings, *check_adapter_config(output, modules)]
        if readable and not is_initial:
            findings += check_initial_factors(output)
    is_trained = False
    if trained is not None:
        of_adapter, is_trained = check_trained_adapter(
            output, trained, modules, compare_values=readable, initial=is_initial
        )
        findings += of_adapter
        checked["adapter"] = given_adapter
    if original is not None and readable:
        model = open_model(fetch_original(manifest.source["model"], manifest.source["revision"], original))
        findings += compare_directions(
            output.weights, model, manifest, given=original.model, all_components=all_components
        )
        checked |= {"model": original.model, "components": "all" if all_components else "sample"}
    code = verdict_code(findings, trained=is_trained, has_base=False)
    return Verdict(output.given, code, tuple(dict.fromkeys(findings)), checked, manifest.fingerprint, manifest.source)


def compare_directions(
    adapter: Path, model: Checkpoint, manifest: Manifest, *, given: str, all_components: bool
) -> list[Finding]:
    """The directions in an initial adapter must be those of the original model's weights, computed again.

    Args:
        adapter: The file of the initial adapter's weights.
        model: The original model.
        manifest: Of the output.
        given: The original model as the user named it.
        all_components: Compare all weights, not a sample of three.

    Raises:
        CheckpointError: A file that cannot be read.
    """
    if not model.has_weights(manifest.inputs["source"]):
        what = "not the files that the adapter was made from: another model, or another commit"
        return [Finding(given, what, model_hint(manifest.source["model"]), "other_model")]
    return list(_compare(adapter, model, manifest, all_components=all_components))


def _compare(adapter: Path, model: Checkpoint, manifest: Manifest, *, all_components: bool) -> Iterator[Finding]:
    modules = [record.module for record in manifest.weights]
    chosen = set(modules if all_components else spread(modules))
    left = manifest.method.factors == "left"
    with open_factors(adapter) as factors:
        for record in (record for record in manifest.weights if record.module in chosen):
            if record.tensor not in model.tensors:
                yield Finding(record.module, f"the original model has no tensor {record.tensor}", MAKE_AGAIN)
                continue
            W = read_row(locate(model, record.tensor), record.row)
            W = W.mT if record.transposed else W
            if tuple(W.shape) != record.shape:
                what = f"is {list(record.shape)} by the manifest, {list(W.shape)} in the model"
                yield Finding(record.module, what, MAKE_AGAIN)
                continue
            B, A = initial_block(*factors.read(record), record.rank, record.expert)
            kept, zero = (B, A) if left else (A.mT, B)
            if bool(zero.any()):
                yield Finding(
                    record.module, f"its {'A' if left else 'B'} must be zero before training, and is not", MAKE_AGAIN
                )
                continue
            error, allowed = direction_error(W.mT if left else W, kept.double(), record, manifest)
            if not error <= allowed:
                mode = manifest.inputs["mode"]
                what = f"its directions are off the `{mode}` singular directions of the weight by {error:.1e}"
                yield Finding(record.module, what, f"the adapter is not of this model: {MAKE_AGAIN}")


def direction_error(W: Tensor, kept: Tensor, record: WeightRecord, manifest: Manifest) -> tuple[float, float]:
    """Distance of orthonormal columns `kept` (n, r) from right singular vectors of W (m, n), and the most allowed.

    It is the sine of the largest angle between both spaces. Where the cut falls in a cluster of singular values, the
    space is not unique. Then the columns must be singular directions of W, with the right singular values; that error
    is relative to the square of W's largest singular value. Both errors include how far `kept` is from orthonormal.
    """
    mode, seed = manifest.inputs["mode"], weight_seed(manifest.inputs["seed"], record.tensor, record.row)
    truth = singular_triplets(W, record.rank, mode=mode, seed=seed)
    r = len(truth.s)
    skew = float((kept.mT @ kept - torch.eye(r, dtype=torch.float64)).norm())
    certificate, s_last = truth.certificate, max(float(truth.s.min()), 1e-300)
    turned = float("inf")
    if certificate.component_error is not None:  # a triplet that turned by an angle changed U S V^T by s times it
        turned = certificate.component_error * float(truth.s.norm()) / s_last
    if turned < 1e-3:
        outside = kept - truth.V @ (truth.V.mT @ kept)
        return float(torch.linalg.matrix_norm(outside, ord=2)) + skew, 8 * EPS32 * r**0.5 + 1e-6 + 4 * turned
    image = W.double() @ kept
    squares = image.square().sum(dim=0)
    back = W.double().mT @ image - kept * squares
    values = squares.sort(descending=True).values - truth.s.square()
    scale = max(truth.s_max, 1e-300) ** 2
    return (float(back.norm()) + float(values.norm())) / scale + skew, 8 * EPS32 * r**0.5
