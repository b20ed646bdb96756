"""Convert a trained adapter of a residual base into a plain LoRA of the original model.

    residual + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

An adapter of the original model (rlmo, rlpo, mica) is a plain LoRA already: it is copied, or cut.

The rank doubles, or each module is cut to its best directions; see `linalg.low_rank`.

Where modules differ in rank or scale, or are cut, or a server is to read them, the scales are multiplied into the
factors and every module's alpha is its rank. So a server that reads one r and one lora_alpha for the whole adapter, and
no patterns, computes the same.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor

from milora_init import __version__
from milora_init.checkpoint.folder import Checkpoint, open_checkpoint, open_model
from milora_init.checkpoint.hashing import sha256
from milora_init.checkpoint.header import Header, TensorInfo, plan_header
from milora_init.checkpoint.writer import SafetensorsWriter, extended, sync_folder, writing
from milora_init.errors import MiloraError, OutputError, PlanError, UsageError
from milora_init.export.other_class import OtherNames, names_in_other_class
from milora_init.export.plain_layout import MERGE_INSTEAD, PlainModule, cut, padded, plain_modules
from milora_init.export.trained_parameters import trained_parameters, unchanged_copies
from milora_init.hub.pair import locate_adapter, locate_pair
from milora_init.hub.source import is_hub_id, is_repository
from milora_init.linalg.low_rank import product_svd
from milora_init.lora.compatibility import (
    UNTRAINED,
    have_equal_factors,
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
from milora_init.options import local_path, require_ranks
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
from milora_init.serving import FORMS, Form, serving_notices
from milora_init.verification.tensors import require_original


def convert(  # noqa: PLR0913  the options of the command
    pair: str,
    adapter: str,
    out: str,
    *,
    model: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    for_: str = "peft",
    text_only: bool | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> ConvertResult:
    """Write to `out` a LoRA for the original model that computes what `adapter` computes on its residual base.

    See `api.convert`. The folder is written under another name and renamed when it is complete.
    """
    started = time.monotonic()
    for name, value in (("PAIR", pair), ("--adapter", adapter), ("--out", out), ("--model", model)):
        if value == "":  # an unset variable of a shell, for example
            raise UsageError(f"{name} is empty", hint="name a folder")
    form = _form(for_)
    _check_cut(rank, energy)
    located = locate_pair(
        pair, only="adapter" if text_only is None else "adapter and config", cache_dir=cache_dir, token=token
    )
    initial, manifest = _initial_adapter(located, pair)
    trained = locate_adapter(adapter, cache_dir=cache_dir, token=token)
    before, after = _read_adapters(initial, trained, manifest, pair=pair, adapter=adapter)
    if model is None and manifest is None:
        raise UsageError(f"no {MANIFEST} beside {initial} names the original model", hint="add --model MODEL")
    not_compared = [] if model is None else _check_model(model, manifest)
    source = manifest.source if manifest else {"model": None, "revision": None, "architecture": ""}
    revision = source["revision"] if model in (None, source["model"]) else None
    from_hub = revision is not None or (
        model not in (None, source["model"]) and is_hub_id(str(model)) and not local_path(str(model)).exists()
    )
    model = model or str(source["model"])
    times = 2 if manifest is None or manifest.method.writes_base else 1  # an adapter of the original is plain already
    base_folder = initial.parent if manifest and manifest.method.writes_base else None
    copied, beside_notices = _beside_factors(after, base_folder, manifest, form)
    modules = plain_modules(before.modules, manifest.weights if manifest else (), form, times)
    names = _other_names(base_folder, manifest, copied, text_only)
    if names:
        modules = [_renamed(module, names) for module in modules]
    _require_rank(modules, rank)
    compress = rank is not None or energy is not None
    target = local_path(out)
    for folder in (initial, after.path):
        require_outside(target, folder, "./plain")
    patterns = before.config.get("rank_pattern") or before.config.get("alpha_pattern")
    scaled = compress or form != "peft" or bool(patterns)
    with Updates(before if times == 2 else None, after, scaled=scaled) as updates:
        if compress:
            modules = cut(modules, updates.ranks(modules, rank, energy))
        if form == "sglang":
            modules = padded(modules)
        config = {
            **_plain_config(before.config, model),
            **_beside_config(after.config, copied),
            **_targets(before.config, modules, form, names),
            **_ranks_and_alphas(before, modules, times, scaled=scaled),
        }
        inputs = {
            "convert": __version__,
            "initial": before.digest,
            "adapter": after.digest,
            "rank": rank,
            "energy": energy,
            "for": form,
            **({} if text_only is None else {"text_only": text_only}),
            "scales": {module: factors.scale for module, factors in after.modules.items()},
            "config": config,
            **({"base": ORIGINAL_MODEL} if times == 1 else {}),
        }
        result = ConvertResult(
            out=out,
            pair=pair,
            adapter=adapter,
            model=model,
            revision=revision,
            from_hub=from_hub,
            modules=(),
            cut=compress,
            source_files=manifest.inputs["source"] if manifest else {},
            fingerprint=fingerprint(inputs),
            inputs=inputs,
            files={},
            hashes={},
            elapsed_s=0.0,
            form=form,
            notices=(*not_compared, *beside_notices, *_serving_notices(modules, form, str(source["architecture"]))),
        )
        if dry_run:
            is_finished, refused = _look(target, inputs, overwrite=overwrite)
            return replace(result, modules=tuple(_module_result(updates, module, compress) for module in modules),
                           files=_planned_sizes(modules, copied, config), notices=(*result.notices, *refused),
                           unchanged=is_finished, dry_run=True)  # fmt: skip
        if finished := _finished(target, inputs, overwrite=overwrite):
            return replace(finished, out=out)  # the folder may have been moved

        def write(folder: Path) -> ConvertResult:
            written = _write_weights(updates, modules, copied, folder / WEIGHTS_FILE, compress=compress)
            (folder / CONFIG_FILE).write_bytes(_config_bytes(config))
            files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
            complete = replace(
                result,
                modules=tuple(written),
                files={path.name: path.stat().st_size for path in files},
                hashes={path.name: sha256(path) for path in files},
                elapsed_s=round(time.monotonic() - started, 3),
            )
            (folder / CONVERTED).write_text(json.dumps(complete.content(), indent=1) + "\n")
            return complete

        return _write_folder(target.resolve(), write)  # a link to a folder stays a link


def _serving_notices(modules: Sequence[PlainModule], form: Form, architecture: str) -> list[str]:
    highest = max(module.width for module in modules)
    return serving_notices([module.name for module in modules], highest, form, architecture)


def _form(given: str) -> Form:
    """What reads the plain adapter. Raises UsageError."""
    for form in FORMS:
        if given == form:
            return form
    raise UsageError(f"--for {given!r} is not known", hint=f"choose one of {', '.join(FORMS)}")


def _check_model(given: str, manifest: Manifest | None) -> list[str]:
    """Check that a model is the original one; return a sentence on what was not compared, if there is something.

    The weights in a folder are compared. A repository on the Hub is not fetched.

    Raises:
        UsageError: A folder that is not there.
        CheckpointError: A folder that holds another model, or cannot be read.
    """
    folder = local_path(given)
    source = manifest.source if manifest else {"model": None, "revision": None}
    is_recorded = given == source["model"]
    # The record tells what the recorded model was. Another Hub id without an organisation looks like a folder.
    is_id = source["revision"] is not None if is_recorded else is_repository(given)
    if not folder.is_dir() and (folder.exists() or not is_id):
        raise UsageError.no_folder(given, folder, hint="name the original model: a folder, or a Hub id org/name")
    if manifest and folder.is_dir():
        require_original(open_model(folder), manifest, given)
        return []
    if manifest is None or is_recorded:
        return []
    return [f"{given} was not compared with the recorded original, {source['model']}: it must have the same weights"]


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _beside_factors(
    adapter: LoraAdapter, pair: Path | None, manifest: Manifest | None, form: Form
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors beside the factors that are copied into the plain adapter, and what the user should know about them.

    Copies of embeddings that were not trained are left out.

    Raises:
        PlanError: They do not fit the model, or the server does not read them.
    """
    factors = {name for module in adapter.modules.values() for name in (module.A, module.B)}
    copied = {name: info for name, info in adapter.header.tensors.items() if name not in factors}
    base = _base(pair) if pair and adapter.others else None
    notices = []
    if base and manifest:  # without the base nothing is checked, and copies are kept, which is right for PEFT
        trained = trained_parameters(adapter, base, base.config, manifest)
        if trained.new_class and trained.config:
            notices.append(
                f"the adapter has a new head: load the original model with {trained.new_class}.from_pretrained(..., "
                f"num_labels={len(trained.config['id2label'])}) first"
            )
        for name in unchanged_copies(adapter, base, manifest):
            del copied[name]
    if form != "peft" and adapter.config.get("use_dora"):
        raise PlanError(
            f"{form} has no DoRA, and DoRA cannot be written as factors: it gives each row of the weight a new length",
            hint=MERGE_INSTEAD,
        )
    if form != "peft" and copied:
        raise PlanError(
            f"{form} reads factors only, and {adapter.path} has {len(copied)} more tensors, {min(copied)} first",
            hint=MERGE_INSTEAD,
        )
    rows = {other.shape[0] for other in adapter.others if other.kind == "copy" and other.key in copied}
    notices += [
        f"embeddings and head are in the adapter, with {row} rows: call "
        f"model.resize_token_embeddings({row}) before it is loaded, if the model has another number"
        for row in sorted(rows)
    ]
    return copied, notices


def _base(pair: Path) -> Checkpoint | None:
    """The base in the folder of a pair; None if it is not there, as when only the adapter was fetched from the Hub."""
    with suppress(MiloraError):
        return open_checkpoint(pair)
    return None


def _beside_config(config: Mapping[str, Any], copied: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The keys of adapter_config.json that name what is in the file beside the factors."""
    keys = ("task_type", "modules_to_save", "trainable_token_indices", "use_dora", "ensure_weight_tying", "bias")
    return {key: config[key] for key in keys if copied and config.get(key)}


def _planned_sizes(
    modules: Sequence[PlainModule], copied: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> dict[str, int]:
    """The size in bytes of the files that would be written."""
    return {CONFIG_FILE: len(_config_bytes(config)), WEIGHTS_FILE: _header(modules, copied).file_bytes}


def _module_result(updates: Updates, module: PlainModule, compress: bool) -> ConvertedModule:
    """The record of a module in a dry run, which writes no factors."""
    lost = 0.0
    if compress:
        A, B = updates.of(module)
        lost = max(product_svd(B_e, A_e).lost(module.rank) for A_e, B_e in zip(A, B, strict=True))
    return ConvertedModule(module.key, module.rank, lost)


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
        return folder / LORA_FOLDER, None
    return folder, read_manifest(folder.absolute().parent)


def _read_adapters(
    initial: Path, trained: Path, manifest: Manifest | None, *, pair: str, adapter: str
) -> tuple[LoraAdapter, LoraAdapter]:
    """The initial and the trained adapter; `pair` and `adapter` are what the user named them.

    Raises:
        CheckpointError: An adapter that cannot be read.
        PlanError: The two do not belong together, or the trained one is not trained.
    """
    records = manifest.weights if manifest else ()
    before, after = read_lora(initial, records), read_lora(trained, records)
    if manifest:
        require_initial_adapter(before, manifest, pair)
    require_same_modules(before, after, manifest)
    if have_equal_factors(before.weights, after.weights):
        raise PlanError(f"{adapter} {UNTRAINED}", hint="name the folder that the trainer saved")
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


def _look(out: Path, inputs: Mapping[str, Any], *, overwrite: bool) -> tuple[bool, list[str]]:
    """Whether `out` has this conversion already, and why a run would be refused, if it would."""
    try:
        return _finished(out, inputs, overwrite=overwrite) is not None, []
    except OutputError as error:
        return False, [f"the run would be refused: {error.message}; {error.hint}"]


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


def _check_cut(rank: int | None, energy: float | None) -> None:
    """Raise UsageError for a `rank` that is no whole number above 0, an `energy` that is no share, and for both."""
    if rank is not None and energy is not None:
        why = "each says how far a module is cut"
        raise UsageError(f"--rank and --energy exclude each other: {why}", hint="drop one of them")
    if rank is not None:
        require_ranks([rank])
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy:g} is not between 0 and 1", hint="for example --energy 0.99")


def _require_rank(modules: Sequence[PlainModule], rank: int | None) -> None:
    """Raise PlanError for a `rank` that no module has."""
    highest = max(min(module.rank, *module.shape) for module in modules)
    if rank is not None and rank > highest:
        raise PlanError(f"rank {rank} is not between 1 and {highest}, the most of any module", hint=f"--rank {highest}")


class Updates:
    """The updates s (B A - B0 A0) of a trained adapter, read from both files.

    Args:
        before: The initial adapter; None where it adds nothing to its model, so that s B A is the update.
        after: The trained adapter.
        scaled: Whether each module's scale s is multiplied into B.
    """

    def __init__(self, before: LoraAdapter | None, after: LoraAdapter, *, scaled: bool) -> None:
        self._before, self._after, self._scaled = before, after, scaled
        self._source = ""
        self._factors: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Updates:
        with ExitStack() as files:
            start = self._before
            self._initial = files.enter_context(safe_open(start.weights, framework="pt")) if start else None
            self._trained = files.enter_context(safe_open(self._after.weights, framework="pt"))
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def of(self, module: PlainModule) -> tuple[Tensor, Tensor]:
        """A (experts, q, n) and B (experts, m, q) of a module's update in float64; zeros where nothing was trained."""
        if module.source is None:
            m, n = module.shape
            return torch.zeros(1, module.rank, n), torch.zeros(1, m, module.rank)
        if self._factors is None or self._source != module.source:  # the experts of a layer share one source
            end = self._after.modules[module.source]
            start = self._before.modules[module.source] if self._before else end
            A, B = difference(
                (self._trained.get_tensor(end.A), self._trained.get_tensor(end.B)),
                (self._initial.get_tensor(start.A), self._initial.get_tensor(start.B)) if self._initial else None,
                end.experts,
            )
            self._source, self._factors = module.source, (A, end.scale * B if self._scaled else B)
        A, B = self._factors
        if module.expert is None:
            return A, B
        rows = slice(module.first_row, module.first_row + module.shape[0])
        return A[module.expert, None], B[module.expert, None, rows]

    def trained(self, name: str) -> Tensor:
        """A tensor of the trained adapter's file."""
        found: Tensor = self._trained.get_tensor(name)
        return found

    def ranks(self, modules: Iterable[PlainModule], rank: int | None, energy: float | None) -> dict[str, int]:
        """The rank that each module is cut to, by key: at most `rank`, or enough for this share of its energy."""
        found = {}
        for module in modules:
            limit = module.rank if rank is None else min(rank, module.rank, *module.shape)
            if energy is not None:
                A, B = self.of(module)
                found_rank = max(product_svd(B_e, A_e).rank_for(energy) for A_e, B_e in zip(A, B, strict=True))
                limit = min(limit, found_rank)
            found[module.key] = limit
        return found


def _write_weights(
    updates: Updates, modules: Sequence[PlainModule], copied: Mapping[str, TensorInfo], path: Path, *, compress: bool
) -> list[ConvertedModule]:
    """Write the plain adapter's factors, and the trained tensors beside them."""
    results = []
    with SafetensorsWriter(path, _header(modules, copied)) as writer:
        for module in modules:
            A, B, lost = _cut_factors(updates, module, compress=compress)
            for factor, tensor in zip("AB", stack_factors(A, B), strict=True):
                writer.write(lora_key(module.key, factor), tensor.float().contiguous())
            results.append(ConvertedModule(module.key, module.rank, lost))
        for name in copied:
            writer.write(name, updates.trained(name))
        writer.finish()
    return results


def _header(modules: Sequence[PlainModule], copied: Mapping[str, TensorInfo]) -> Header:
    """The header of the plain adapter's file."""
    factors = [
        (lora_key(module.key, factor), "F32", shape)
        for module in modules
        for factor, shape in zip("AB", stacked_shapes(module.width, module.shape, module.experts), strict=True)
    ]
    others = [(name, info.dtype, info.shape) for name, info in copied.items()]
    return plan_header([*factors, *others], metadata={"format": "pt"})


def _cut_factors(updates: Updates, module: PlainModule, *, compress: bool) -> tuple[Tensor, Tensor, float]:
    """A (experts, width, n) and B (experts, m, width) of a module, and the largest relative loss of an expert."""
    A, B = updates.of(module)
    lost = 0.0
    if compress:
        products = [product_svd(B_e, A_e) for A_e, B_e in zip(A, B, strict=True)]
        best = [product.factors(module.rank) for product in products]
        B, A = (torch.stack(tensors) for tensors in zip(*best, strict=True))
        lost = max(product.lost(module.rank) for product in products)
    more = module.width - A.shape[1]
    return torch.nn.functional.pad(A, (0, 0, 0, more)), torch.nn.functional.pad(B, (0, more)), lost


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


def _ranks_and_alphas(
    before: LoraAdapter, modules: Sequence[PlainModule], times: int, *, scaled: bool
) -> dict[str, Any]:
    """The keys of adapter_config.json for ranks and scales; with `scaled`, each module's alpha is its rank."""
    if not scaled:
        rslora = bool(before.config.get("use_rslora"))
        alpha = stacked_alpha(before.config["lora_alpha"], times, rslora=rslora)
        return {"r": times * before.config["r"], "lora_alpha": alpha, "use_rslora": rslora,
                "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    highest = max(module.width for module in modules)
    # A server takes the rank of an expert from its tensors. alpha / r is 1 everywhere: the scales are in the factors.
    by_name = {module.name: module.width for module in modules if module.source is not None and module.expert is None}
    rank_pattern, alpha_pattern = rank_and_alpha_patterns(by_name, by_name, rank=highest, alpha=highest)
    return {"r": highest, "lora_alpha": highest, "use_rslora": False,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}  # fmt: skip


def _other_names(
    folder: Path | None, manifest: Manifest | None, copied: Mapping[str, TensorInfo], text_only: bool | None
) -> OtherNames | None:
    """The names in the class that was asked for; None if nothing was asked for, or the names are those already.

    Raises:
        UsageError: There is no pair.
        PlanError: The adapter has more than factors; or as `names_in_other_class`.
    """
    if text_only is None:
        return None
    option = "--text-only" if text_only else "--no-text-only"
    if manifest is None or folder is None:
        raise UsageError(
            f"{option} needs a residual base: {MANIFEST} and its config.json say which names there are",
            hint=f"drop {option}" if manifest else f"name the pair, or drop {option}",
        )
    names = names_in_other_class(folder, manifest, text_only=text_only)
    if names and copied:
        raise PlanError(
            f"{option} renames factors only, and the adapter has {len(copied)} more tensors, {min(copied)} first",
            hint=MERGE_INSTEAD,
        )
    return names


def _renamed(module: PlainModule, names: OtherNames) -> PlainModule:
    """A module under its names in another class. A single expert has its name on disk, which is the same in both."""
    if module.source is None or module.expert is not None:
        return module
    key, name = names.keys[module.source]
    return replace(module, key=key, name=name)


def _targets(
    config: Mapping[str, Any], modules: Sequence[PlainModule], form: Form, names: OtherNames | None
) -> dict[str, Any]:
    """The keys of adapter_config.json that name the modules. A server reads the names of the tensors."""
    if form != "peft":
        return {"target_modules": sorted({module.key.rpartition(".")[2] for module in modules})}
    parameters = names.targets.parameters if names else config.get("target_parameters")
    return {
        "target_modules": names.targets.modules if names else config.get("target_modules"),
        **({"target_parameters": parameters} if parameters else {}),
    }


def _plain_config(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The other keys of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": model,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }
