"""The public functions. Each takes the words of the command line and does all that the command does.

Every heavy import is inside a function, so that `import milora_init` and `milora-init --help` start at once.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from milora_init.errors import UsageError
from milora_init.options import InitOptions, require_ranks, split_names
from milora_init.result import InitResult, PartResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from milora_init.hub.upload import Published
    from milora_init.records import ConvertResult, MergeResult
    from milora_init.run.progress import Progress
    from milora_init.spectra import ScanResult
    from milora_init.verification.verdict import Verdict

StrPath = str | os.PathLike[str]


def initialize(
    model: StrPath | InitOptions,
    out: StrPath | None = None,
    *,
    recipe: str | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> InitResult:
    """Split a model into a residual base and a PEFT adapter of r singular triplets of each targeted weight.

    For each targeted weight W = U diag(s) V^T (m, n) and the r chosen triplets, the adapter gets
    B = U_r sqrt(S_r / scale) (m, r) and A = sqrt(S_r / scale) V_r^T (r, n) in float32, and the base W - scale * B @ A
    (MiLoRA, arXiv 2406.09044, section 3; PiSSA, arXiv 2404.02948). The model is read shard by shard.

    Other methods make other factors; `methods` has the table. With `rlmo`, `rlpo` and `mica` no base is written, only
    the weights that are adapted are read, and `out` is the PEFT folder of an adapter of the original model.

    Args:
        model: The original model: a folder or a Hub id. Or all options as one `InitOptions`.
        out: The folder to write. If the same request was finished there before, nothing is done.
        recipe: A recipe by its name, or the path of a YAML file. None is the default recipe.
        progress: True for a bar on a terminal or in a notebook, and lines elsewhere; False for none; or a `Progress`.
        options: Fields of `InitOptions`, such as rank=32 or push_to_hub="me/model"; they override the recipe.

    Returns:
        The result, with the manifest. Its `load` is Python that loads the pair.

    Raises:
        UsageError: A wrong option.
        CheckpointError, PlanError, SolveError: The model cannot be read, does not fit the request, or has a weight
            that cannot be solved.
        OutputError: `out` holds something else, or cannot be written. An interrupted run is resumed by the same call.
        HubError: The Hub refused, or cannot be reached.
    """
    request = _options(model, out, recipe, options)
    if request.part is not None:
        raise UsageError("`initialize` makes the whole output, not a part", hint="call initialize_part")
    return run(request, progress=progress)


def initialize_part(
    model: StrPath | InitOptions,
    out: StrPath | None = None,
    part: str | None = None,
    *,
    recipe: str | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> PartResult:
    """Make one part of the files that `initialize` would make, and stop.

    Any number of processes, on machines that see the same folders, can make different parts at the same time. When all
    have ended, `initialize` with the same options makes what is missing and finishes the output.

    Args:
        model, out, recipe, progress, options: See `initialize`.
        part: `I/N`, from `1/N` to `N/N`, or `auto`; see `InitOptions`.

    Raises:
        UsageError: A wrong option, or no part.
        OutputError: A process makes this part, or the whole output, or the folder holds something else.
        MiloraError: As `initialize`.
    """
    request = _options(model, out, recipe, {**options, "part": part} if part is not None else options)
    if request.part is None:
        raise UsageError("no part is given", hint="for the first of four parts: part='1/4'")
    return run_part(request, progress=progress)


def run_part(
    options: InitOptions, *, progress: bool | Progress = True, overwrite_repository: bool = False
) -> PartResult:
    """Do what `initialize_part` does, for checked options; see `run`."""
    from milora_init.hub.source import locate_model
    from milora_init.plan.plan import make_plan
    from milora_init.run.initialize import carry_out_part
    from milora_init.run.scan import measured_targets

    folder, remote = locate_model(options)
    with _receiver(progress) as receiver:
        measured = measured_targets(options, folder, remote, progress=receiver)
        plan = make_plan(options, folder, remote, measured=measured)
        return carry_out_part(plan, progress=receiver, overwrite_repository=overwrite_repository)


def _options(model: StrPath | InitOptions, out: StrPath | None, recipe: str | None, options: Any) -> InitOptions:
    """The options of a call. Raises UsageError."""
    if not isinstance(model, InitOptions):
        return InitOptions.from_recipe(recipe, model=os.fspath(model), out=out, **options)
    if out is not None or recipe is not None or options:
        raise UsageError("InitOptions and further options are given", hint="use dataclasses.replace(options, ...)")
    return model


def run(
    options: InitOptions, *, progress: bool | Progress = True, overwrite_repository: bool | None = None
) -> InitResult:
    """Do what `initialize` does, for checked options.

    Args:
        options: The request.
        progress: See `initialize`.
        overwrite_repository: Push also to a repository that holds something else. None means `options.overwrite`.
    """
    from milora_init.hub.source import locate_model
    from milora_init.plan.finished import finished_output

    folder, remote = locate_model(options)
    if finished := finished_output(options, folder, remote):
        return InitResult(options.out, "unchanged", replace(finished, out=options.out))  # it may have been moved
    from milora_init.plan.plan import make_plan
    from milora_init.run.initialize import carry_out
    from milora_init.run.scan import measured_targets

    if overwrite_repository is None:
        overwrite_repository = options.overwrite
    with _receiver(progress) as receiver:
        measured = measured_targets(options, folder, remote, progress=receiver)
        plan = make_plan(options, folder, remote, measured=measured)
        manifest, status, pushed = carry_out(plan, progress=receiver, overwrite_repository=overwrite_repository)
    out = manifest.out if manifest.out == options.push_to_hub else options.out  # nothing may be kept here
    return InitResult(out, status, replace(manifest, out=out), pushed)


def scan(  # noqa: PLR0913  the options of the command
    model: StrPath,
    *,
    target: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    rank: Sequence[int] | int | None = None,
    spectrum: bool = False,
    html: StrPath | None = None,
    plot: StrPath | None = None,
    device: Sequence[str] | str = ("auto",),
    text_only: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: StrPath | None = None,
    token: str | None = None,
    progress: bool | Progress = True,
) -> ScanResult:
    """Find the singular values of a model's weights, and what they say about rank, targets and dtype.

    The model is read file by file, each weight once; nothing is written but the files that are asked for. Every
    singular value of every weight is found in float64, to a relative error of 1e-8 as far as float64 resolves it.

    Args:
        model: The model: a folder or a Hub id.
        target, exclude: Which weights, as in `initialize`: None is what it would adapt; `all-linear` are all others
            too.
        rank: The ranks to give figures for. None is 8, 16, 32, 64 and 128.
        spectrum: Keep all singular values in the result.
        html: Write one self-contained HTML page to this file.
        plot: Write a picture (PNG) to this file. Needs matplotlib.
        device, text_only, trust_remote_code: As in `initialize`.
        revision, cache_dir, token: As in huggingface_hub.
        progress: See `initialize`.

    Returns:
        The result. `weights` has the figures of each weight; `to_json()` and `to_csv()` give them all.

    Raises:
        UsageError: A wrong option, or matplotlib is needed and not installed.
        CheckpointError, PlanError, SolveError: The model cannot be read, does not fit the targets, or has a weight with
            NaN or Inf entries.
        OutputError: A file cannot be written, or would replace one that milora-init did not write.
        HubError: The Hub refused, or cannot be reached.
    """
    from milora_init.pictures.files import prepared
    from milora_init.spectra import DEFAULT_RANKS

    options = InitOptions(
        model=os.fspath(model), out="scan", rank=1, target=None if target is None else _names(target),
        exclude=_names(exclude), device=_names(device), text_only=text_only, revision=revision,
        trust_remote_code=trust_remote_code, cache_dir=_text(cache_dir), token=token,
    )  # fmt: skip
    ranks = require_ranks(DEFAULT_RANKS if rank is None else (rank,) if isinstance(rank, int) else tuple(rank))
    write_html, write_plot = prepared(html, "--html"), prepared(plot, "--plot")
    from milora_init.hub.source import locate_model
    from milora_init.run.scan import scan as scan_model

    with _receiver(progress) as receiver:
        result = scan_model(options, *locate_model(options), ranks=ranks, spectrum=spectrum, progress=receiver)
    if write_html:
        from milora_init.pictures.page import scan_page

        write_html(scan_page(result).encode())
    if write_plot:
        from milora_init.pictures.plots import scan_plot

        write_plot(scan_plot(result))
    return result


def verify(  # noqa: PLR0913  the options of the command
    pair: StrPath,
    *,
    model: StrPath | None = None,
    adapter: StrPath | None = None,
    all_components: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: StrPath | None = None,
    token: str | None = None,
) -> Verdict:
    """Check what milora-init wrote: do its files belong together, and are they unchanged?

    Args:
        pair: A folder that milora-init wrote, or its Hub id.
        model: The original model, to compare every tensor with.
        adapter: A trained adapter, to check against the base.
        all_components: With `model`: compute every component again, not a sample of three.
        revision: Branch, tag or commit of `model`. None is the recorded commit if `model` is the recorded name.
        trust_remote_code: Run the code in the folder if its config.json names it.
        cache_dir, token: As in huggingface_hub.

    Returns:
        The verdict. `ok` is the answer, `code` says what the folder is, `findings` what differs.

    Raises:
        UsageError: A folder that is not there, or `all_components` without `model`.
        CheckpointError, OutputError: A model or a manifest that cannot be read.
        HubError: The Hub refused, or cannot be reached.
    """
    from milora_init.verification.verify import verify as verify_pair

    return verify_pair(
        os.fspath(pair), model=_text(model), adapter=_text(adapter), all_components=all_components,
        revision=revision, trust_remote_code=trust_remote_code, cache_dir=_text(cache_dir), token=token,
    )  # fmt: skip


def merge(  # noqa: PLR0913
    pair: StrPath,
    out: StrPath,
    *,
    adapter: StrPath | None = None,
    model: StrPath | None = None,
    dtype: str = "auto",
    shard_size: str | None = None,
    tokenizer: StrPath | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: StrPath | None = None,
    token: str | None = None,
    progress: bool = True,
) -> MergeResult:
    """Write one plain model that computes what the residual base and an adapter compute together.

    Args:
        pair: The folder that `initialize` wrote, or its Hub id.
        out: The folder to write. If the same merge was finished there before, nothing is done.
        adapter: The trained adapter; None for the initial one of the pair, which gives the original model again.
        model: The original model: count the merged entries that have its bits.
        dtype: Of the merged model: `auto` for that of the original, `float32`, `bfloat16` or `float16`.
        shard_size: The most bytes of a file, such as `5GB`; None for the files of the base.
        tokenizer: The folder of the tokenizer to write. None is that of the base; if the vocabulary was resized, the
            one in the adapter's folder, if there is one.
        overwrite: Replace an earlier merge in `out`.
        revision: Branch, tag or commit of `model`.
        cache_dir, token: As in huggingface_hub.
        progress: Show a bar on a terminal or in a notebook, and lines elsewhere.

    Raises:
        UsageError: A folder that is not there.
        CheckpointError: A base or an adapter that cannot be read.
        PlanError: An adapter that does not belong to this base, or holds more than A and B.
        OutputError: The pair is not finished; `out` holds something else, or cannot be written.
        SolveError: A merged weight that does not fit the model's dtype.
        HubError: The Hub refused, or cannot be reached.
    """
    from milora_init.cli.progress_bar import by_files
    from milora_init.export.merge import merge as merge_pair

    with by_files("merging", quiet=not progress) as receiver:
        return merge_pair(
            os.fspath(pair), os.fspath(out), adapter=_text(adapter), model=_text(model), dtype=dtype,
            shard_size=shard_size, tokenizer=_text(tokenizer), overwrite=overwrite,
            revision=revision, cache_dir=_text(cache_dir), token=token, progress=receiver,
        )  # fmt: skip


def convert(  # noqa: PLR0913
    pair: StrPath,
    adapter: StrPath,
    out: StrPath,
    *,
    model: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    for_: str = "peft",
    text_only: bool | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    cache_dir: StrPath | None = None,
    token: str | None = None,
) -> ConvertResult:
    """Write a trained adapter as a plain LoRA of the original model, which needs no residual base.

    Args:
        pair: The folder that `initialize` wrote, or its Hub id; also the folder of the initial adapter alone.
        adapter: The trained adapter.
        out: The folder to write. If the same conversion was finished there before, nothing is done.
        model: The original model, as adapter_config.json shall name it. None is the name in the manifest. A folder
            must have the recorded weights; a Hub id is not fetched.
        rank: Keep the best `rank` directions of each module. None is twice the trained rank, which is exact.
        energy: Instead of `rank`: as many directions of each module as this share of its update's squared norm needs.
        for_: What reads the adapter: `peft`, `vllm` or `sglang`. They differ for models with experts.
        text_only: For a model with towers: True for the names of the class that AutoModelForCausalLM builds, False for
            those of the class in config.json. None keeps those of the training.
        dry_run: Write nothing; the result says what would be kept and lost.
        overwrite: Replace an earlier conversion in `out`.
        cache_dir, token: As in huggingface_hub.

    Raises:
        UsageError: A folder that is not there, a `rank` below 1, an `energy` outside 0 to 1, both of them, or a `for_`
            that is not known.
        CheckpointError: An adapter that cannot be read, or another model than the original.
        PlanError: Adapters that do not belong together, a rank that no module has, or a module that the server would
            not read.
        OutputError: `out` holds something else, or cannot be written.
        HubError: The Hub refused, or cannot be reached.
    """
    from milora_init.export.convert import convert as convert_adapter

    return convert_adapter(
        os.fspath(pair), os.fspath(adapter), os.fspath(out), model=model, rank=rank, energy=energy,
        for_=for_, text_only=text_only, dry_run=dry_run, overwrite=overwrite, cache_dir=_text(cache_dir), token=token,
    )  # fmt: skip


def push(
    folder: StrPath,
    repo: str,
    *,
    private: bool = True,
    branch: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> Published:
    """Push a finished output to the Hub, with a model card, in one commit.

    Args:
        folder: A folder that milora-init wrote.
        repo: The repository: `org/name`. It is created if it is not there.
        private: Whether it is private, if it is created now.
        branch: The branch to write to; None is `main`.
        token: As in huggingface_hub.
        overwrite: Push also to a repository that holds something else.

    Raises:
        UsageError: A folder that is not there, or a name that is not `org/name`.
        OutputError: The folder is not a finished output, or a file of it was changed.
        PlanError: The repository holds something else.
        HubError: The Hub refused, or cannot be reached.
    """
    from milora_init.hub.upload import push as push_folder

    return push_folder(os.fspath(folder), repo, private=private, branch=branch, token=token, overwrite=overwrite)


def _receiver(progress: bool | Progress) -> AbstractContextManager[Progress | None]:
    """The object that receives the events of a run."""
    if progress is True:
        from milora_init.cli.progress_bar import Bar

        return Bar(quiet=False, verbose=False)
    return nullcontext(progress or None)


def _names(given: Sequence[str] | str) -> tuple[str, ...]:
    return tuple(split_names(given) if isinstance(given, str) else given)


def _text(path: StrPath | None) -> str | None:
    return None if path is None else os.fspath(path)
