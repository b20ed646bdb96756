"""Progress bars on a terminal, progress lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import OverflowMethod
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from milora_init.cli.output import count_weights, stderr_console
from milora_init.report import component_error, duration, size
from milora_init.run.progress import Progress as RunProgress

if TYPE_CHECKING:
    from milora_init.plan.output_files import ShardJob
    from milora_init.plan.plan import Plan
    from milora_init.run.progress import ShardResult


class _Words(ProgressColumn):
    """A field of the task, as the string that it is."""

    def __init__(self, field: str, *, style: str = "", overflow: OverflowMethod = "fold") -> None:
        super().__init__(Column(no_wrap=True, overflow=overflow, style=style))
        self._field = field

    def render(self, task: Task) -> str:
        return str(task.fields[self._field])


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = stderr_console(quiet)
    if console.is_terminal:
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        with console.status(console.render_str(what), spinner=spinner):
            yield
    else:
        yield


@contextmanager
def by_files(what: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar by bytes on a terminal, a line a file elsewhere. Yields whom to tell: file, bytes done, all bytes."""
    console = stderr_console(quiet)
    columns = (_Words("what"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None, what=what)

        def tell(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{what} {name}: {size(done)} of {size(total)}")

        yield tell


class Bar(RunProgress):
    """Progress on stderr: one bar by bytes on a terminal, one line a shard elsewhere.

    Either tells how many modules are done and how long the rest will take at this run's rate, by the arithmetic that
    is left as well as by the bytes; the bar also which module each device is at.
    """

    FLOPS_PER_BYTE = 200  # about what a machine multiplies in the time that it copies a byte

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.began = False
        self._at: dict[str, str] = {}  # device -> module
        self._lock = threading.Lock()  # tensors are reported from the workers' threads
        self._console = stderr_console(quiet)
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
                    f"{record.module}  {certificate.path}  error {component_error(record):.0e}"
                    f"  leak {record.rounding.leak:.1e}  {duration(record.elapsed_s)}"
                )
        if self._verbose or not self._console.is_terminal:
            left = f", {self._time_left()}" if finished < of else ""
            line = (
                f"[{finished}/{of}] {result.shard}: {count_weights(result.records)} split, {duration(elapsed_s)}{left}"
            )
            self._console.print(line)
