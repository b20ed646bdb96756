"""Print results, warnings and errors. Only this file and progress_bar.py use rich."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from milora_init.errors import MiloraError, UsageError
from milora_init.methods import DROPOUT, method_of_inputs
from milora_init.options import local_path
from milora_init.report import counted, duration, loading_lines, notes, percent, rough, size, warnings, weight_groups
from milora_init.untrusted import printable

if TYPE_CHECKING:
    from milora_init.export.movement import MovedGroup
    from milora_init.hub.upload import Published
    from milora_init.manifest import Manifest
    from milora_init.plan.plan import Plan
    from milora_init.records import ConvertResult, MergeResult
    from milora_init.result import PartResult
    from milora_init.spectra import ScanResult
    from milora_init.verification.verdict import Verdict

_SCAN_LEGEND = {
    "condition": "largest singular value over the smallest, of the worst weight",
    "stable": "mean of ||W||_F^2 / s_max^2",
    "effective": "mean effective rank, exp of the entropy of the singular values",
    "min": "mean share of the {} smallest triplets in the squared norm",
    "max": "that of the {} largest",
    "leak": "estimate of the part of the {} smallest that rounding would leave in the base, of the worst weight",
    "init": "estimate of init's time",
    "spectrum": "singular values from the largest to the smallest, mean of the weights, logarithmic",
}
_COLUMNS_OF_WORDS = ("module", "shape", "recipe", "target")
_SPARE_OF_RECIPES = ("dropout", "alpha", "method")
_LEAST_WRAPPED = 26  # characters of a column whose cells have several lines
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_DIFFERENCES = 20  # of a verdict; the rest is counted
_LEGEND = {  # what the columns of the summary mean
    "energy": "the component's share of the weight's squared norm",
    "leak": "the part of the component that rounding leaves in the base",
    "NF4 leak": "the same if QLoRA quantises the base",
    "step-0 error": "distance of base and component from the weight, relative to the weight",
    "certified": "proven bound of the component's relative error",
}


class _Console(Console):
    """A console for which a string is one line of plain text: no markup, no control characters, no CI commands.

    Styles and line breaks come from this file only: a `Text`, or another `print`.
    """

    def render_str(self, text: str, **_: Any) -> Text:
        return Text(printable(text))


def print_error(message: str, hint: str) -> None:
    """Print an error and its hint on stderr."""
    _print_sentence(Text("error:", "bold red"), message)
    if hint:
        stderr_console().print()
        _print_sentence(Text("hint:", "bold cyan"), hint)


class Notes(logging.Handler):
    """Prints what the package logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_sentence(Text("note:", "bold"), record.getMessage())


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an error on stderr."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        stderr_console().print(line)


def annotate(message: str, hint: str) -> None:
    """Under GitHub Actions, print an error that is shown on the job's page."""
    _annotate("error", f"{message}. Hint: {hint}" if hint else message)


def _annotate(level: str, text: str) -> None:
    if os.environ.get("GITHUB_ACTIONS") == "true":
        encoded = "%0A".join(printable(line).replace("%", "%25") for line in text.splitlines())
        print(f"::{level} title=milora-init::{encoded}", file=sys.stderr)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII. No line of it is a command for a CI runner."""
    print(json.dumps(content, indent=2).replace("##", "#\\u0023"))


def print_markdown(text: str) -> None:
    """Print Markdown on stdout. hub/model_card.py has escaped all names in it."""
    print(text, end="")


def print_version(version: str) -> None:
    """Print the version on stdout."""
    print(f"milora-init {version}")


def print_text(text: str) -> None:
    """Print a file of the package on stdout, unchanged."""
    print(text, end="" if text.endswith("\n") else "\n")


def require_one_of_quiet_and_verbose(quiet: bool, verbose: bool) -> None:
    """Raise UsageError if both are given."""
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other", hint="drop one of them")


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """The limits of `--fail-on`. Raises UsageError for anything but leak=NUMBER and error=NUMBER."""
    limits = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in ("leak", "error") or not limit >= 0:
            raise UsageError(f"--fail-on {word} is not a limit", hint="for example --fail-on leak=0.1 or error=0.005")
        limits[name] = limit
    return limits


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A limit of `--fail-on` and the weight that exceeds it most."""

    name: str
    limit: float
    value: float
    module: str

    @property
    def text(self) -> str:
        """What exceeds the limit, in one sentence."""
        return f"the {self.name} of {self.module} is {self.value:.2g}, above --fail-on {self.name}={self.limit:g}"


def exceeded_limits(limits: Mapping[str, float], manifest: Manifest) -> list[Exceeded]:
    """The limits that a weight exceeds."""
    found = []
    for name, limit in limits.items():
        worst = max(manifest.weights, key=lambda weight: getattr(weight.rounding, name))
        if (value := getattr(worst.rounding, name)) > limit:
            found.append(Exceeded(name, limit, value, worst.module))
    return found


def print_exceeded(exceeded: Exceeded) -> None:
    """Print the error for a limit that is exceeded."""
    hint = "choose another --dtype, or a higher limit; the output itself is complete"
    print_error(exceeded.text, hint)
    annotate(exceeded.text, hint)


def print_plan(
    plan: Plan, estimate_s: float, memory_bytes: int, measured: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> None:
    """Print what `--dry-run` shows; `measured` are the modules that each target chose by a figure."""
    from milora_init.checkpoint.header import torch_name
    from milora_init.lora.config import lora_scale

    console = _stdout()
    method = plan.options.effective_method
    rows = [
        (suffix, f"{m} x {n}", torch_name(dtype), str(count), str(rank))
        for (suffix, (m, n), dtype, rank), count in plan.weight_counts().items()
    ]
    _print_table(console, ("module", "shape", "dtype", "weights", "rank"), rows, spare=("dtype", "rank"))
    download = sum(plan.downloads.values())
    console.print(
        f"{plan.structure.architecture}, method {method.name}: {counted(len(plan.weights), 'weight')} in "
        f"{counted(len(plan.jobs), 'file')}"
    )
    alpha = plan.options.lora_alpha
    strength = f"alpha {alpha:g}, scale {lora_scale(plan.options.rank, alpha, rslora=plan.options.rslora):g}"
    written = size(plan.base_bytes) if plan.writes_base else "none: the adapter is for the original model"
    fields = [
        ("method", f"{method.formulas}; trained: {method.trained} ({method.source})"),
        ("for", method.use),
        ("reported", f"by others: {method.reported}"),
        *(("stored", f"{count} tensors as {name}") for name, count in plan.formats.items()),
        ("base", f"{written} (model {size(plan.source_bytes)})"),
        *(("", f"{size(n)} with --base {base}") for base, n in plan.base_sizes.items() if base != plan.options.base),
        ("adapter", f"{size(plan.adapter_bytes)}; {strength}, dropout {plan.adapter_config['lora_dropout']:g}"),
        *((target, _by_layer(names)) for target, names in measured.items()),
        ("memory", f"about {size(memory_bytes)}"),
        *([("download", size(download))] if download else []),
        ("time", f"{rough(estimate_s)} for solving, on this machine; copying comes on top"),
    ]
    for name, text in fields:
        _print_field(console, name, text)
    if plan.options.part is not None:
        console.print(f"part {plan.options.part}: {len(plan.own_jobs)} of {counted(len(plan.jobs), 'file')}")
    for job in plan.jobs if plan.options.part is None else plan.own_jobs:
        target = "" if job.target == job.source.name or not job.header else f" -> {job.target}"
        console.print(f"  {job.source.name}{target}  ({counted(len(job.splits), 'weight')})")
    print_warnings(plan.notices)


def _by_layer(modules: Sequence[str]) -> str:
    """The names of modules on one line: `self_attn.q_proj of layers 0, 3 and 5`, each kind once."""
    kinds: dict[str, list[int]] = {}
    others = []
    for module in modules:
        if found := re.fullmatch(r"(?:[^.]+\.)*?(\d+)\.(.+)", module, re.ASCII):
            kinds.setdefault(found[2], []).append(int(found[1]))
        else:
            others.append(module)
    of_layers = (
        f"{suffix} of layer{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"
        for suffix, numbers in sorted(kinds.items())
    )
    return "; ".join([*of_layers, *others])


def print_out_state(out: str, state: str, refusal: MiloraError | None) -> None:
    """Print the last lines of `--dry-run`: what the run would do with the output folder."""
    would = {
        "unfinished": f"; the run would resume the unfinished output in {out}",
        "replaced": f"; the run would replace the earlier output in {out}",
        "finished": f"; {out} is already done, the run would do nothing",
    }
    console = _stdout()
    if refusal is None:
        console.print(f"nothing was written{would.get(state, '')}")
    else:
        console.print(f"nothing was written; the run would be refused: {refusal.message}")
        console.print(f"hint: {refusal.hint}")


def print_part(result: PartResult, *, elapsed_s: float) -> None:
    """Print what a part has made, and what is left to do."""
    console = _stdout()
    if result.status == "unchanged":
        console.print(f"{result.out}: already done, nothing to do")
        return
    console.print(
        f"part {result.part}: {counted(len(result.made), 'file')} made in {duration(elapsed_s)}; "
        f"{result.out} has {result.finished} of {result.of}"
    )
    console.print("when all parts have ended, run the same command without --part: it finishes the output")


def print_merged(merged: MergeResult, *, verbose: bool = False) -> None:
    """Print the result of a merge; with `verbose`, every file."""
    console = _stdout()
    for name, size_bytes in merged.files.items() if verbose else ():
        console.print(f"{name}  {size(size_bytes)}")
    total = size(sum(merged.files.values()))
    end = "already done, nothing to do" if merged.unchanged else f"done in {duration(merged.elapsed_s)}"
    beside = f" and {counted(len(merged.retrained), 'retrained tensor')}" if merged.retrained else ""
    which = " with the initial adapter" if merged.initial else ""
    _print_words(console, f"{merged.out}: {counted(merged.modules, 'module')}{beside} merged{which}, {total}, {end}")
    if merged.initial:
        _print_words(console, "this is the original model again, up to rounding; --adapter merges a trained adapter")
    print_warnings(merged.notices)
    if merged.bit_equal is not None:
        part = f"{merged.bit_equal / merged.entries:.4%} of the {merged.entries:,} entries of the merged weights"
        _print_words(console, f"{part} are equal to the original's, bit for bit")
    console.print(f'load it as any model: from_pretrained({json.dumps(merged.out)}, dtype="auto")')


def print_converted(converted: ConvertResult, *, verbose: bool = False) -> None:
    """Print the result of a conversion; with `verbose`, every module."""
    from milora_init.records import ORIGINAL_MODEL

    console = _stdout()
    modules = converted.modules
    for module in modules if verbose else ():
        console.print(f"{module.module}  rank {module.rank}  energy lost {percent(module.lost**2)}")
    ranks = sorted({module.rank for module in modules})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = max(module.lost for module in modules) ** 2
    lost = f", at most {percent(worst)} of the energy of a module's update lost" if converted.cut else ""
    _print_words(console, f"{converted.out}: {counted(len(modules), 'module')} at {rank}{lost}")
    print_warnings(converted.notices)
    if converted.dry_run:
        total = size(sum(converted.files.values()))
        would = "is already done, the run would do nothing" if converted.unchanged else f"would have {total}"
        _print_words(console, f"{converted.out} {would}; nothing was written")
        return
    if converted.unchanged:
        console.print("already done, nothing to do")
    base = "" if converted.inputs.get("base") == ORIGINAL_MODEL else ", not on the residual base"
    is_here = converted.from_hub or local_path(converted.model).exists()
    model = converted.model if is_here else f"the original model, which was a local folder named {converted.model}"
    line = "" if converted.serve else f": PeftModel.from_pretrained(model, {json.dumps(converted.out)})"
    _print_words(console, f"load it on {model}{base}{line}")
    if converted.serve:
        console.print(f"serve it with: {converted.serve}")


def print_movement(groups: Sequence[MovedGroup], *, pair: str, adapter: str) -> None:
    """Print what a training did to the weights: a row for each kind of module."""
    console = _stdout()
    columns = ("module", "weights", "moved", "minor", "middle", "principal", "intruders")
    rows = [
        (
            group.suffix,
            str(group.count),
            percent(group.relative),
            *(percent(share) for share in (group.minor, group.middle, group.principal)),
            f"{group.intruders} of {group.vectors}",
        )
        for group in groups
    ]
    _print_table(console, columns, rows, spare=("weights", "middle"))
    legend = (
        "moved: norm of the update, relative to the weight. minor, middle, principal: share of the update's squared "
        "norm in the smallest, the other and the largest singular directions of the original weight; as many at "
        "either end as the rank. intruders: largest directions of the trained weight that are similar to none of the "
        "original."
    )
    console.print(Text(legend, "dim"), soft_wrap=not console.is_terminal)
    _print_words(console, f"{adapter}: trained from {pair}")


def print_summary(manifest: Manifest, *, elapsed_s: float | None, verbose: bool = False) -> None:
    """Print a finished run: table, size, time, warnings, and the lines that load the pair.

    Args:
        manifest: Of the run.
        elapsed_s: How long it took; None if it was finished before.
        verbose: Print a line for each weight first.
    """
    console = _stdout()
    for weight in manifest.weights if verbose else ():
        console.print(
            f"{weight.module}  rank {weight.rank}  {weight.certificate.path}  leak {percent(weight.rounding.leak)}"
            f"  step-0 error {percent(weight.rounding.error)}  {duration(weight.elapsed_s)}"
        )
    columns = [
        "module",
        "shape",
        "weights",
        "rank",
        "energy",
        "leak",
        "NF4 leak",
        "step-0 error",
        "certified",
        "solving",
    ]
    rows = [
        [
            group.suffix,
            "{} x {}".format(*group.shape),
            str(group.count),
            str(group.rank),
            percent(group.energy),
            percent(group.leak),
            "" if group.leak_in_nf4 is None else percent(group.leak_in_nf4),
            percent(group.rounding_error),
            f"{group.certificate:.0e}" if math.isfinite(group.certificate) else "not unique",
            duration(group.elapsed_s),
        ]
        for group in weight_groups(manifest.weights)
    ]
    if not manifest.method.writes_base:  # nothing was rounded
        columns, rows = columns[:5] + columns[8:], [row[:5] + row[8:] for row in rows]
    spare = ("solving", "NF4 leak", "certified", "energy", "rank", "weights")
    shown = _print_table(console, columns, rows, spare=spare)
    legend = " ".join(f"{name}: {meaning}." for name, meaning in _LEGEND.items() if name in shown)
    console.print(Text(legend, "dim"), soft_wrap=not console.is_terminal)
    total = size(sum(manifest.files.values()))
    end = "already done, nothing to do" if elapsed_s is None else f"done in {duration(elapsed_s)}"
    _print_words(console, f"{manifest.out}: {counted(len(manifest.weights), 'weight')}, {total}, {end}")
    print_warnings(warnings(manifest))
    for note in notes(manifest):
        _print_sentence(Text("note:", "bold"), note)
    what = "pair" if manifest.method.writes_base else "adapter on the original model"
    for line in ("", f"Load the {what}, for training or inference:", "", *loading_lines(manifest).splitlines()):
        console.print(line)


def print_scan(result: ScanResult, *, verbose: bool = False) -> None:
    """Print the spectra of a model: a row for each group of weights; with `verbose`, a line for each weight first."""
    console, rank = _stdout(), result.rank
    for weight in result.weights if verbose else ():
        figures = weight.at(rank)
        energies = (figures.energy_min, figures.energy_max) if figures else (None, None)
        leak = figures.leak.get(weight.dtype) if figures else None
        console.print(
            f"{weight.module}  s {weight.s_max:.3g} to {weight.s_min:.3g}  condition {_condition(weight.condition)}"
            f"  stable rank {weight.stable_rank:.3g}  effective rank {weight.effective_rank:.3g}"
            f"  min {_share(energies[0])}  max {_share(energies[1])}  leak {_share(leak)}"
        )
    columns = [
        "module", "shape", "weights", "s_max", "condition", "stable", "effective", "min", "max", "leak", "init",
    ]  # fmt: skip
    rows, groups = [], result.groups()
    drawn = console.is_terminal and console.encoding.startswith("utf")
    lines = sparklines([group.curve for group in groups])
    for group, line in zip(groups, lines, strict=True):
        rows.append(
            [
                group.suffix, "{} x {}".format(*group.shape), str(group.count), f"{group.s_max:.3g}",
                _condition(group.condition), f"{group.stable_rank:.3g}", f"{group.effective_rank:.3g}",
                _share(group.energy_min), _share(group.energy_max), _share(group.leak),
                "-" if group.init_s is None else duration(group.init_s), *([line] * drawn),
            ]
        )  # fmt: skip
    spare = ("init", "s_max", "effective", "stable", "weights", "shape")
    shown = _print_table(console, [*columns, *(["spectrum"] * drawn)], rows, spare=(*spare, *(["spectrum"] * drawn)))
    legend = " ".join(f"{name}: {meaning.format(rank)}." for name, meaning in _SCAN_LEGEND.items() if name in shown)
    console.print(Text(legend, "dim"), soft_wrap=not console.is_terminal)
    _print_words(
        console,
        f"{result.model}: {counted(len(result.weights), 'weight')} scanned in {duration(result.elapsed_s)}; "
        f"init at rank {rank} would take {rough(result.init_s)} of one core or GPU",
    )
    for note in result.notes:
        _print_sentence(Text("note:", "bold"), note)


def _condition(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def sparklines(curves: Sequence[Sequence[float]], width: int = 12) -> list[str]:
    """Spectra as rows of blocks, by the logarithm of s / s_max; all have one scale, of eight decades at most."""
    lengths = [[math.log10(s / max(curve)) if s > 0 else -math.inf for s in curve] for curve in curves]
    decades = min(8.0, max((-low for low in map(min, lengths) if math.isfinite(low)), default=1.0)) or 1.0
    found = []
    for logarithms in lengths:
        picked = [logarithms[round(place * (len(logarithms) - 1) / (width - 1))] for place in range(width)]
        found.append("".join(_BLOCKS[min(7, int(8 * max(0.0, 1 + value / decades)))] for value in picked))
    return found


def print_written(*paths: str | None) -> None:
    """Print the files that were written."""
    for path in filter(None, paths):
        _stdout().print(f"wrote {path}")


def print_verdict(verdict: Verdict, *, verbose: bool = False) -> None:
    """Print a verdict: what the folder is, on stdout; the differences and their hints, on stderr."""
    console = _stdout()
    _print_words(console, f"{verdict.folder}: {verdict.text}")
    if verdict.ok:
        _print_words(console, f"compared: {verdict.compared}")
    console = stderr_console()
    shown = verdict.differences if verbose else verdict.differences[:_MOST_DIFFERENCES]
    for hint, of_hint in groupby(shown, lambda difference: difference.hint):
        for difference in of_hint:
            _print_sentence(Text("differs:", "bold red"), f"{difference.where}: {difference.what}")
        if hint:
            _print_sentence(Text("   hint:", "bold cyan"), hint)
    if more := len(verdict.differences) - len(shown):
        console.print(f"and {more} more: --verbose or --json lists them all")
    for note in verdict.notes:
        _print_sentence(Text("note:", "bold"), note)


def print_recipes(recipes: Mapping[str, Mapping[str, Any]], *, default: str) -> None:
    """Print the table of the recipes."""
    console = _stdout(100)
    rows = [
        (
            f"{name} (default)" if name == default else name,
            ", ".join(recipe["target"]),
            str(recipe.get("rank", "")),
            str(recipe.get("alpha", recipe.get("rank", ""))),
            method.name,
            str(recipe.get("dropout", DROPOUT)),
        )
        for name, recipe in recipes.items()
        for method in [method_of_inputs(recipe)]
    ]
    _print_table(console, ("recipe", "target", "rank", "alpha", "method", "dropout"), rows, _SPARE_OF_RECIPES, "target")


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one line each."""
    width = max(map(len, facts))
    for name, value in facts.items():
        _stdout().print(f"{name:{width}}  {value}")


def print_warnings(lines: Sequence[str]) -> None:
    """Print warnings on stderr; under GitHub Actions, annotate the job with them too."""
    for line in lines:
        _print_sentence(Text("warning:", "bold yellow"), line)
        _annotate("warning", line)


def _print_sentence(label: Text, text: str) -> None:
    """Print a sentence on stderr; see `_print_words`."""
    _print_words(stderr_console(), text, label)


def _print_words(console: Console, text: str, label: Text | None = None) -> None:
    """Print a sentence, with line breaks between words if it goes to a terminal.

    A word that is longer than a line, such as a path, stays in one piece, so that it can be copied.
    """
    labels = [] if label is None else [label]
    if not console.is_terminal:
        console.print(*labels, text)
        return
    indent = "" if label is None else " " * (len(label) + 1)
    first, *others = textwrap.wrap(
        printable(text), console.width, initial_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]
    console.print(*labels, first.removeprefix(indent))
    for line in others:
        console.print(line)


def _print_field(console: Console, name: str, text: str) -> None:
    """Print a name and its text on a line; on a terminal that is narrower the text gets more lines in its column."""
    if not console.is_terminal:
        console.print(f"{name:10}{text}")
        return
    grid = Table.grid()
    grid.add_column(width=10)
    grid.add_column(overflow="fold")
    grid.add_row(name, text)
    console.print(grid)


def _print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    spare: Sequence[str] = (),
    wrapped: str = "",
) -> list[str]:
    """Print a table; return the columns that it has.

    If the terminal is too narrow, the column `wrapped` gets more lines, down to _LEAST_WRAPPED characters, and columns
    of `spare` are left out, the first ones first.
    """
    kept = list(columns)
    widest = max(
        (len(cell) for row in rows for name, cell in zip(columns, row, strict=True) if name == wrapped), default=0
    )
    wrappable = max(0, widest - _LEAST_WRAPPED)
    for column in [*spare, None]:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in kept:
            justify: JustifyMethod = "left" if name in _COLUMNS_OF_WORDS else "right"
            table.add_column(name, justify=justify, no_wrap=name != wrapped, overflow="fold")
        for row in rows:
            table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in kept))
        unbounded = console.options.update(max_width=1000)  # in its own width everything fits, cut off
        if column is None or Measurement.get(console, unbounded, table).maximum - wrappable <= console.width:
            break
        kept.remove(column)
    console.print(table)
    return kept


def _stdout(width: int = 200) -> Console:
    """A console on stdout; `width` holds where that is no terminal, for a name that is cut off is lost there."""
    return _Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else width)


def stderr_console(quiet: bool = False) -> Console:
    return _Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


def print_pushed(pushed: Published, *, verbose: bool = False) -> None:
    """Print where an output was pushed to; with `verbose`, the commit."""
    console = _stdout()
    has = "has this output already" if pushed.unchanged else "has the output"
    replaced = "; an earlier one is in the repository's history" if pushed.replaced else ""
    _print_words(console, f"{pushed.url} {has}{replaced}")
    if verbose:
        console.print(f"commit {pushed.commit}, {counted(pushed.files, 'file')}")


class JsonOutput:
    """Prints at most one JSON object for a command. A signal that comes after it adds no second one."""

    def __init__(self) -> None:
        self._printed = False

    def reset(self) -> None:
        """A new command starts."""
        self._printed = False

    def give(self, content: Mapping[str, Any]) -> None:
        """Print the object, unless one was printed."""
        if not self._printed:
            self._printed = True
            print_json(content)


json_output = JsonOutput()


def hide_bars_of_the_hub() -> None:
    """Let huggingface_hub draw no progress bars."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if "huggingface_hub" in sys.modules:
        from milora_init.hub.source import hide_bars

        hide_bars()
