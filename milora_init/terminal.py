"""What is printed: the bar, the tables, the errors, the JSON. The only file that knows rich; nothing here decides.

Names out of somebody's files are in much of it. So a string is one line of plain text for the console here, whatever
stands in it: see `_Console`. No other file prints.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, OverflowMethod
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from milora_init.report import component_error, duration, kinds, loading_lines, share, size, warnings
from milora_init.untrusted import printable

if TYPE_CHECKING:
    from milora_init.convert import ConvertedModule
    from milora_init.manifest import Manifest
    from milora_init.merge import Merged
    from milora_init.plan import Plan, ShardJob
    from milora_init.progress import ShardResult
    from milora_init.verify import Verdict

_DIFFERENCES = 20  # of a verdict, before the rest is only counted


class _Console(Console):
    """A console for which a string is one line of plain text: no markup, nothing that steers a terminal or a CI runner.

    Style and further lines are this file's own: a `Text`, another `print`.
    """

    def render_str(self, text: str, **_: Any) -> Text:
        return Text(printable(text))


class _Words(ProgressColumn):
    """A field of the task, as the string that it is."""

    def __init__(self, field: str, *, style: str = "", overflow: OverflowMethod = "fold") -> None:
        super().__init__(Column(no_wrap=True, overflow=overflow, style=style))
        self._field = field

    def render(self, task: Task) -> str:
        return str(task.fields[self._field])


def print_error(message: str, hint: str) -> None:
    """An error and its repair, on stderr, never wrapped: paths and commands must survive a copy."""
    console = _stderr()
    console.print(Text("error:", "bold red"), message)
    if hint:
        console.print()
        console.print(Text("hint:", "bold cyan"), hint)


def print_traceback(error: BaseException) -> None:
    """Where an error happened, on stderr."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        _stderr().print(line)


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


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = _stderr(quiet)
    if console.is_terminal:
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        with console.status(console.render_str(what), spinner=spinner):
            yield
    else:
        yield


@contextmanager
def by_files(what: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar by bytes on a terminal, a line a file elsewhere. Yields whom to tell: file, bytes done, all bytes."""
    console = _stderr(quiet)
    columns = (_Words("what"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None, what=what)

        def tell(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{what} {name}: {size(done)} of {size(total)}")

        yield tell


class Bar:
    """Progress on stderr: one bar by bytes on a terminal, one line a shard elsewhere. A `progress.Progress`.

    Either tells how many modules are done and how long the rest will take at this run's rate, by the arithmetic that
    is left as well as by the bytes; the bar also which module each device is at.
    """

    FLOPS_PER_BYTE = 200  # about what a machine multiplies in the time that it copies a byte

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.began = False
        self._at: dict[str, str] = {}  # device -> module
        self._lock = threading.Lock()  # tensors are reported from the workers' threads
        self._console = _stderr(quiet)
        self._verbose = verbose
        wide: tuple[ProgressColumn, ...] = (
            _Words("what"),
            BarColumn(),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
        )
        module = _Words("current", style="dim", overflow="ellipsis")
        self._bar = Progress(
            *(wide if self._console.width >= 90 else wide[2:3]),
            _Words("left"),
            _Words("modules"),
            *([module] if self._console.width >= 70 else []),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, what="splitting", left="", modules="", current="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        self.began = True
        self._bar.start()
        self._started = time.monotonic()
        self._flops = {w.weight.tensor: plan.flops(w) for w in plan.weights}  # of one weight in that tensor
        total_bytes = plan.source_bytes
        done_bytes = sum(plan.checkpoint.headers[job.source.name].data_bytes for job in done)
        self._total = self._work(total_bytes, plan.solve_flops)
        self._earlier = self._done = self._work(done_bytes, sum(plan.flops(w) for job in done for w in job.splits))
        self._modules, self._split = len(plan.weights), sum(len(job.splits) for job in done)
        self._bar.update(self._task, total=total_bytes, completed=done_bytes, modules=self._count())
        if done:
            self._console.print(f"resuming: {size(done_bytes)} of {size(total_bytes)} were done before")

    def remaking(self, name: str) -> None:
        self._console.print(f"{name} has other bytes than were recorded, or no record: it is made again", markup=False)

    def fetching(self, name: str, size_bytes: int) -> None:
        if not self._console.is_terminal:
            self._console.print(f"fetching {name}, {size(size_bytes)}")
        elif not self._at:
            self._bar.update(self._task, current=f"fetching {name}")

    def solving(self, module: str, device: str) -> None:
        self._at[device] = module
        self._bar.update(self._task, current=self.current)

    @property
    def current(self) -> str:
        """The module in work; with several devices, each device's."""
        if len(self._at) == 1:
            return next(iter(self._at.values()))
        return "  ".join(f"{device} {module}" for device, module in sorted(self._at.items()))

    def tensor(self, name: str, size_bytes: int) -> None:
        with self._lock:
            self._done += self._work(size_bytes, self._flops.get(name, 0))
            self._split += name in self._flops
        self._bar.update(self._task, advance=size_bytes, modules=self._count(), left=self._time_left())

    def pushing(self, repo: str) -> None:
        self._bar.start()
        self._bar.update(self._task, what=f"pushing to {repo}", total=None, left="", current="")

    def _count(self) -> str:
        return f"{self._split}/{self._modules} modules"

    def _work(self, size_bytes: int, flops: int) -> int:
        return self.FLOPS_PER_BYTE * size_bytes + flops

    def _time_left(self) -> str:
        done, elapsed_s = self._done - self._earlier, time.monotonic() - self._started
        return f"about {duration(elapsed_s * (self._total - self._done) / done)} left" if done else ""

    def shard(self, result: ShardResult, finished: int, of: int, elapsed_s: float) -> None:
        if self._verbose:
            for record in result.records:
                certificate = record.certificate
                self._console.print(
                    f"{record.module}  {certificate['path']}  error {component_error(record):.0e}"
                    f"  leak {record.rounding['leak']:.1e}  {duration(record.elapsed_s)}"
                )
        if self._verbose or not self._console.is_terminal:
            left = f", {self._time_left()}" if finished < of else ""
            line = f"[{finished}/{of}] {result.shard}: {_weights(result.records)} split, {duration(elapsed_s)}{left}"
            self._console.print(line)


def _weights(some: Sequence[object]) -> str:
    return f"{len(some)} weight{'s' if len(some) != 1 else ''}"


def print_plan(plan: Plan, estimate_s: float, memory_bytes: int) -> None:
    """What `--dry-run` shows."""
    from milora_init.safetensors_format import torch_name  # torch is there: somebody has planned

    console = _stdout()
    options = plan.options
    rows = [
        (suffix, f"{m} x {n}", torch_name(dtype), str(count), str(rank))
        for (suffix, (m, n), dtype, rank), count in plan.kinds().items()
    ]
    _print_table(console, ("module", "shape", "dtype", "weights", "rank"), rows, spare=("dtype", "rank"))
    download = sum(header.file_bytes for header in plan.absent.values())
    console.print(
        f"{plan.naming.architecture}, mode {options.mode}: {len(plan.weights)} weights in {len(plan.jobs)} files"
    )
    console.print(f"base     {size(plan.base_bytes)} (source {size(plan.source_bytes)})")
    console.print(f"adapter  {size(plan.adapter_bytes)}")
    console.print(f"memory   about {size(memory_bytes)}")
    if download:
        console.print(f"download {size(download)}")
    console.print(f"time     about {duration(estimate_s)} of solving here, and the copying")
    for job in plan.jobs:
        becomes = "" if job.target == job.source.name else f" -> {job.target}"
        console.print(f"  {job.source.name}{becomes}  ({_weights(job.splits)})")
    _print_warnings(plan.notices)
    console.print("nothing was written")


def print_merged(merged: Merged) -> None:
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
        for kind in kinds(manifest.weights)
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
    console.print(f"{verdict.folder}: {verdict.kind}")
    if verdict.ok:
        console.print(f"compared: {_checked(verdict.checked)}")
    console = _stderr()
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
    console = _stderr()
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


def _stderr(quiet: bool = False) -> Console:
    return _Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)


def print_published(url: str, *, unchanged: bool = False) -> None:
    """Where the output went."""
    _stdout().print(f"{url} {'holds it already' if unchanged else 'holds the pair'}")
