"""Print results, warnings and errors. The only place, with progress_bar.py, that knows rich."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from milora_init.report import duration, loading_lines, share, size, warnings, weight_groups
from milora_init.untrusted import printable

if TYPE_CHECKING:
    from milora_init.export.convert import ConvertedModule
    from milora_init.export.merge import MergeResult
    from milora_init.manifest import Manifest
    from milora_init.plan.plan import Plan
    from milora_init.verify.verdict import Verdict
_DIFFERENCES = 20  # of a verdict, before the rest is only counted


class _Console(Console):
    """A console for which a string is one line of plain text: no markup, nothing that steers a terminal or a CI runner.

    Style and further lines are this file's own: a `Text`, another `print`.
    """

    def render_str(self, text: str, **_: Any) -> Text:
        return Text(printable(text))


def print_error(message: str, hint: str) -> None:
    """An error and its repair, on stderr, never wrapped: paths and commands must survive a copy."""
    console = stderr_console()
    console.print(Text("error:", "bold red"), message)
    if hint:
        console.print()
        console.print(Text("hint:", "bold cyan"), hint)


def print_traceback(error: BaseException) -> None:
    """Where an error happened, on stderr."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        stderr_console().print(line)


def annotate(message: str, hint: str) -> None:
    """Under GitHub Actions, an error that is shown at the job."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = f"{message}. Hint: {hint}" if hint else message
        encoded = "%0A".join(printable(line).replace("%", "%25") for line in text.splitlines())
        print(f"::error title=milora-init::{encoded}", file=sys.stderr)


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in ASCII; no line of it is a command for a CI runner."""
    print(json.dumps(content, indent=2).replace("##", "#\\u0023"))


def print_markdown(text: str) -> None:
    """Markdown on stdout, in which `card` has tamed all names."""
    print(text, end="")


def print_version(version: str) -> None:
    """The version, on stdout."""
    print(f"milora-init {version}")


def count_weights(some: Sequence[object]) -> str:
    return f"{len(some)} weight{'s' if len(some) != 1 else ''}"


def print_plan(plan: Plan, estimate_s: float, memory_bytes: int) -> None:
    """What `--dry-run` shows."""
    from milora_init.checkpoint.header import torch_name  # torch is there: somebody has planned

    console = _stdout()
    options = plan.options
    rows = [
        (suffix, f"{m} x {n}", torch_name(dtype), str(count), str(rank))
        for (suffix, (m, n), dtype, rank), count in plan.weight_counts().items()
    ]
    _print_table(console, ("module", "shape", "dtype", "weights", "rank"), rows, spare=("dtype", "rank"))
    download = sum(header.file_bytes for header in plan.absent.values())
    console.print(
        f"{plan.structure.architecture}, mode {options.mode}: {len(plan.weights)} weights in {len(plan.jobs)} files"
    )
    console.print(f"base     {size(plan.base_bytes)} (source {size(plan.source_bytes)})")
    console.print(f"adapter  {size(plan.adapter_bytes)}")
    console.print(f"memory   about {size(memory_bytes)}")
    if download:
        console.print(f"download {size(download)}")
    console.print(f"time     about {duration(estimate_s)} of solving here, and the copying")
    for job in plan.jobs:
        becomes = "" if job.target == job.source.name else f" -> {job.target}"
        console.print(f"  {job.source.name}{becomes}  ({count_weights(job.splits)})")
    _print_warnings(plan.notices)
    console.print("nothing was written")


def print_merged(merged: MergeResult) -> None:
    """What stands at the end of a merge."""
    total = size(sum(merged.files.values()))
    ended = "already done, nothing to do" if merged.unchanged else f"done in {duration(merged.elapsed_s)}"
    _stdout().print(f"{merged.out}: {merged.modules} modules merged, {total}, {ended}")
    if merged.bit_equal is not None:
        part = f"{merged.bit_equal / merged.entries:.4%} of the {merged.entries:,} entries of the merged weights"
        _stdout().print(f"{part} are the source's to the bit")


def print_converted(out: str, base: str, modules: Sequence[ConvertedModule], *, compressed: bool) -> None:
    """What stands at the end of a conversion: what each module lost, if it could."""
    console = _stdout()
    for module in modules if compressed else ():
        console.print(f"{module.module}  rank {module.rank}  lost {module.lost:.2e}")
    ranks = sorted({module.rank for module in modules})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = max(module.lost for module in modules)
    lost = f", at most {worst:.2e} of a module's update lost (Frobenius norm)" if compressed else ""
    console.print(f"{out}: {len(modules)} modules at {rank}{lost}; load it on {base}, not on the residual")


def print_summary(manifest: Manifest, *, ended: str = "") -> None:
    """What stands at the end of a run, and how that `ended`; of an earlier one, how long it took."""
    console = _stdout()
    columns = ("module", "shape", "weights", "rank", "energy", "worst leak", "worst error", "solving")
    rows = [
        (
            kind.suffix,
            "{} x {}".format(*kind.shape),
            str(kind.count),
            str(kind.rank),
            share(kind.energy),
            f"{kind.leak:.1e}",
            f"{kind.certificate:.0e}" if math.isfinite(kind.certificate) else "not unique",
            duration(kind.elapsed_s),
        )
        for kind in weight_groups(manifest.weights)
    ]
    _print_table(console, columns, rows, spare=("energy", "solving", "weights", "rank"))
    total = size(sum(manifest.files.values()))
    ended = ended or f"done in {duration(manifest.elapsed_s)}"
    console.print(f"{manifest.out}: {len(manifest.weights)} weights, {total}, {ended}")
    _print_warnings(warnings(manifest))
    for line in ("", "Load the pair, for training or inference:", "", *loading_lines(manifest).splitlines()):
        console.print(line)


def print_verdict(verdict: Verdict) -> None:
    """What `verify` found: the folder in one line on stdout; what differs, and its repair, on stderr."""
    console = _stdout()
    console.print(f"{verdict.folder}: {verdict.text}")
    if verdict.ok:
        console.print(f"compared: {_checked(verdict.checked)}")
    console = stderr_console()
    for difference in verdict.differences[:_DIFFERENCES]:
        console.print(Text("differs:", "bold red"), f"{difference.where}: {difference.what}")
        console.print(Text("   hint:", "bold cyan"), difference.hint)
    if (hidden := len(verdict.differences) - _DIFFERENCES) > 0:
        console.print(f"and {hidden} more: --json lists them all")
    for note in verdict.notes:
        console.print(f"note: {note}")


def _checked(checked: Mapping[str, Any]) -> str:
    """What a verdict rests on."""
    parts = [f"{checked['files']} files and {checked['modules']} modules with the manifest"]
    if "against" in checked:
        which = "all components" if checked["components"] == "all" else "a sample of the components"
        parts.append(f"{checked['tensors']} tensors and {which} with {checked['against']}")
    if "trained" in checked:
        parts.append(f"{checked['trained']} with the initial adapter")
    return ", ".join(parts)


def _print_warnings(lines: tuple[str, ...] | list[str]) -> None:
    console = stderr_console()
    for line in lines:
        console.print(Text("warning:", "bold yellow"), line)


def _print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str]) -> None:
    """Print a table; where the terminal is too narrow, columns of `spare` go, first ones first."""
    kept = list(columns)
    for column in [*spare, None]:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for number, name in enumerate(kept):
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(cell for name, cell in zip(columns, row, strict=True) if name in kept))
        unbounded = console.options.update(max_width=1000)  # in its own width everything fits, cut off
        if column is None or Measurement.get(console, unbounded, table).maximum <= console.width:
            break
        kept.remove(column)
    console.print(table)


def _stdout() -> Console:
    # Where nobody watches there is no width to keep to, and a name that is cut off is lost.
    return _Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def stderr_console(quiet: bool = False) -> Console:
    return _Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


def print_published(url: str, *, unchanged: bool = False) -> None:
    """Where the output went."""
    _stdout().print(f"{url} {'holds it already' if unchanged else 'holds the pair'}")


class JsonOutput:
    """The one JSON object that a command prints. What comes after it, a signal say, adds no second one."""

    def __init__(self) -> None:
        self._given = False

    def expect(self) -> None:
        """A command begins."""
        self._given = False

    def give(self, content: Mapping[str, Any]) -> None:
        """Print the object, if none was."""
        if not self._given:
            self._given = True
            from milora_init.cli.output import print_json

            print_json(content)


json_output = JsonOutput()


def hide_the_hubs_bars() -> None:
    """Draw none of huggingface_hub's progress bars."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if "huggingface_hub" in sys.modules:
        from milora_init.hub.source import hide_bars

        hide_bars()
