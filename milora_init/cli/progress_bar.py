"""Progress bars on a terminal, progress lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console, OverflowMethod
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from milora_init.cli.output import stderr_console
from milora_init.report import component_error, counted, duration, percent, rough, size
from milora_init.run.progress import Progress as RunProgress

if TYPE_CHECKING:
    from milora_init.manifest import WeightRecord
    from milora_init.plan.output_files import ShardJob
    from milora_init.plan.plan import Plan
    from milora_init.run.progress import ShardResult


_MOST_SILENCE_S = 60  # of a run without a terminal: a reader of the log should see that it goes on


class _Text(ProgressColumn):
    """A text field of the task."""

    def __init__(self, field: str, *, style: str = "", overflow: OverflowMethod = "fold") -> None:
        super().__init__(Column(no_wrap=True, overflow=overflow, style=style))
        self._field = field

    def render(self, task: Task) -> str:
        return str(task.fields[self._field])


class _Bytes(DownloadColumn):
    """The bytes that are done and those of all, once these are known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def _is_interactive(console: Console) -> bool:
    """Whether a bar can be redrawn: on a terminal, and in a notebook that has ipywidgets, which rich draws it with.

    FORCE_COLOR makes no terminal of a file.
    """
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    return console.is_terminal and console.file.isatty()


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Show a spinner on a terminal, and a line elsewhere."""
    console = stderr_console(quiet)
    if _is_interactive(console):
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        with console.status(console.render_str(what), spinner=spinner):
            yield
    else:
        console.print(what)
        yield


@contextmanager
def by_files(what: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar by bytes on a terminal, and a line for each file elsewhere.

    Yields a function to call after each file: its name, the bytes of all finished files, the bytes of all files.
    """
    console = stderr_console(quiet)
    columns = (_Text("what"), BarColumn(), _Bytes(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not _is_interactive(console)) as bar:
        task = bar.add_task("", total=None, what=what)

        def file_done(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not _is_interactive(console):
                console.print(f"{what} {name}: {size(done)} of {size(total)}")

        yield file_done


@contextmanager
def by_weights(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar by weights on a terminal, and a line a minute elsewhere.

    Yields a function to call after each weight: the number of finished weights, and of all.
    """
    console = stderr_console(quiet)
    interactive = _is_interactive(console)
    columns = (_Text("what"), BarColumn(), MofNCompleteColumn(), _Text("unit"), TimeRemainingColumn())
    if not interactive:
        console.print(what)
    with Progress(*columns, console=console, transient=True, disable=quiet or not interactive) as bar:
        task, printed = bar.add_task("", total=None, what=what, unit="weights"), time.monotonic()

        def weight_done(done: int, total: int) -> None:
            nonlocal printed
            bar.update(task, completed=done, total=total)
            if not interactive and time.monotonic() - printed >= _MOST_SILENCE_S:
                printed = time.monotonic()
                console.print(f"{what}: {done}/{total} weights")

        yield weight_done


class Bar(RunProgress):
    """Progress on stderr: one bar by bytes on a terminal; elsewhere one line for each shard, and a line a minute.

    Both show how many weights are done and how long the rest will take at the rate of this run, counted in arithmetic
    and bytes. The bar also shows which weight each device works on.
    """

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._planning = ExitStack()  # the spinner that is shown until the run starts
        self._at: dict[str, str] = {}  # device -> module
        self._lock = threading.Lock()  # tensors are reported from the workers' threads
        self._console = stderr_console(quiet)
        self._verbose = verbose
        wide: tuple[ProgressColumn, ...] = (
            _Text("what"),
            BarColumn(),
            _Bytes(table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
        )
        module = _Text("current", style="dim", overflow="ellipsis")
        self._bar = Progress(
            *(wide if self._console.width >= 90 else wide[2:3]),
            _Text("left"),
            _Text("weights"),
            *([module] if self._console.width >= 70 else []),
            console=self._console,
            transient=True,
            disable=quiet or not _is_interactive(self._console),
        )
        self._task = self._bar.add_task("", total=None, what="splitting", left="", weights="", current="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._planning.close()
        self._bar.stop()

    def planning(self, model: str) -> None:
        """The headers and module names of a model are being read."""
        self._planning.enter_context(waiting(f"reading headers and module names of {model}", quiet=self._console.quiet))

    def begin(self, plan: Plan, done: Sequence[ShardJob]) -> None:
        from milora_init.plan.plan import FLOPS_PER_BYTE

        self._planning.close()
        self._flops_per_byte = FLOPS_PER_BYTE
        self._bar.start()
        self._started = self._printed = time.monotonic()
        self._flops = {w.weight.tensor: plan.flops(w) for w in plan.weights}  # of one weight in that tensor
        own_weights = [w for job in plan.own_jobs for w in job.splits]
        total_bytes = sum(map(plan.read_bytes, plan.own_jobs))
        done_bytes = sum(map(plan.read_bytes, done))
        self._total = sum(map(plan.cost, plan.own_jobs))
        self._earlier = self._done = sum(map(plan.cost, done))
        self._weights, self._split = len(own_weights), sum(len(job.splits) for job in done)
        what, count = "splitting", self._count()
        self._bar.update(self._task, total=total_bytes, completed=done_bytes, what=what, weights=count, left="")
        if done:
            self._console.print(f"resuming: {size(done_bytes)} of {size(total_bytes)} were done before")

    def remaking(self, name: str) -> None:
        self._console.print(f"{name} has other bytes than recorded, or no record: it is written again", markup=False)

    def fetching(self, name: str, size_bytes: int) -> None:
        if not _is_interactive(self._console):
            self._console.print(f"fetching {name}, {size(size_bytes)}")
        elif not self._at:
            self._bar.update(self._task, current=f"fetching {name}")

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}")

    def solving(self, module: str, device: str) -> None:
        self._at[device] = module
        self._bar.update(self._task, current=self.current)

    @property
    def current(self) -> str:
        """The module that is being solved; with several devices, one for each."""
        if len(self._at) == 1:
            return next(iter(self._at.values()))
        return "  ".join(f"{device} {module}" for device, module in sorted(self._at.items()))

    def tensor(self, name: str, size_bytes: int) -> None:
        with self._lock:
            self._done += self._flops_per_byte * size_bytes + self._flops.get(name, 0)
            self._split += name in self._flops
            now = time.monotonic()
            silent = now - self._printed >= _MOST_SILENCE_S and not _is_interactive(self._console)
            self._printed = now if silent else self._printed
        self._bar.update(self._task, advance=size_bytes, weights=self._count(), left=self._time_left())
        if silent:
            self._console.print(f"{self._count()}, {self._time_left()}")

    def scanning(self) -> None:
        self._bar.update(self._task, what="scanning")

    def scanned(self, name: str, weights: int, finished: int, of: int, elapsed_s: float) -> None:
        if self._verbose or not _is_interactive(self._console):
            left = f", {self._time_left()}" if finished < of else ""
            self._console.print(
                f"[{finished}/{of}] {name}: {counted(weights, 'weight')} scanned, {duration(elapsed_s)}{left}"
            )

    def pushing(self, repo: str) -> None:
        self._bar.start()
        self._bar.update(self._task, what=f"pushing to {repo}", total=None, left="", current="")

    def _count(self) -> str:
        return f"{self._split}/{self._weights} weights"

    def _time_left(self) -> str:
        done, elapsed_s = self._done - self._earlier, time.monotonic() - self._started
        if not done:
            return ""
        left_s = elapsed_s * (self._total - self._done) / done
        return f"{rough(left_s)} left"

    def shard(self, result: ShardResult[WeightRecord], finished: int, of: int, elapsed_s: float) -> None:
        if self._verbose:
            for record in result.records:
                certificate = record.certificate
                self._console.print(
                    f"{record.module}  {certificate.path}  error {component_error(record):.0e}"
                    f"  leak {percent(record.rounding.leak)}  {duration(record.elapsed_s)}"
                )
        if self._verbose or not _is_interactive(self._console):
            left = f", {self._time_left()}" if finished < of else ""
            count = counted(len(result.records), "weight")
            self._console.print(f"[{finished}/{of}] {result.shard}: {count} done, {duration(elapsed_s)}{left}")
