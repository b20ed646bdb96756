"""Learning against forgetting, for the methods of COMPARED, on a tiny model: offline, on a CPU.

A tiny Llama is pre-trained on docstrings (cached in compare/base). Every method then trains it on generated word
problems by train.py and evaluate.py, at several learning rates and seeds. Measured are the loss on other word problems
(what it learned), the loss on held-out docstrings (what it forgot), and the share of right answers by the GSM8K task
file.
LoRA is trained twice: with the authors' alpha = 2r, and with alpha = r, which gives the scale of all others. Dropout is
the same for all. Writes compare/results.json, results.md, and a plot as PNG and SVG. Asserts nothing about which is
better.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tiny_language_model import pretrain
from training_methods import METHODS, make_start
from word_problems import split, write_lines

HERE = Path(__file__).resolve().parent
RANK = 8
DROPOUT = 0  # lora_dropout of every adapter
BATCH, WARMUP = 16, 10
COMPARED = ("lora", "milora", "pissa", "olora-tail", "rlmo", "mica", "full")
# Imported once, in a process from which that of every training is forked: the imports would take half of its time.
LIBRARIES = ("trl.trainer.sft_trainer", "peft", "datasets", "lm_eval.evaluator", "lm_eval.models.huggingface")


@dataclass(frozen=True, slots=True)
class Variant:
    """A method and its alpha; None with `full`."""

    method: str
    alpha: int | None

    @property
    def label(self) -> str:
        if self.alpha is None:
            return self.method
        return f"{self.method}, alpha r" if self.alpha == RANK else f"{self.method}, alpha {self.alpha // RANK}r"


@dataclass(frozen=True, slots=True)
class Result:
    """One training.

    Attributes:
        variant: What was trained.
        rate, seed: Its learning rate and seed.
        new, old: Loss per token, mean over batches, on held-out word problems and docstrings after it.
        right: Share of held-out word problems with the right answer after "The answer is: ".
        seconds: Duration of the training, without the evaluation.
    """

    variant: Variant
    rate: float
    seed: int
    new: float
    old: float
    right: float
    seconds: float


def main() -> int:
    """Pre-train, initialise, train all, report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("compare"))
    options.add_argument("--tokens", type=int, default=1_500_000, help="of the pre-training")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of the adapters")
    options.add_argument("--full-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="of full")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--resume", action="store_true", help="keep the trainings that an interrupted run finished")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time, one thread each")
    args = options.parse_args()
    began = time.monotonic()
    print("pre-training", flush=True)
    base = pretrain(args.out / "base", tokens=args.tokens)

    runs, data = args.out / "runs", args.out / "data"
    settings = {"tokens": args.tokens, "steps": args.steps, "rank": RANK, "dropout": DROPOUT, "batch": BATCH}
    settings_file = args.out / "settings.json"
    if not args.resume:
        shutil.rmtree(runs, ignore_errors=True)
    elif settings_file.is_file() and json.loads(settings_file.read_text()) != settings:
        raise SystemExit(f"{args.out} has trainings with other settings; run it again without --resume")
    settings_file.write_text(json.dumps(settings) + "\n")
    for folder in (runs, data):
        folder.mkdir(parents=True, exist_ok=True)
    training, held = split(2000, 100, seed=0)
    write_lines(data / "train.jsonl", [problem.training_row() for problem in training])
    write_lines(data / "new.jsonl", [problem.training_row() for problem in held])
    write_lines(data / "gsm8k.jsonl", [problem.gsm8k_row() for problem in held])

    starts = initialise(base, args.out)
    jobs = [
        (variant, rate, seed)
        for variant in variants()
        for rate in (args.full_rates if variant.method == "full" else args.rates)
        for seed in args.seeds
    ]
    print(f"{len(jobs)} trainings, {args.jobs} at a time", flush=True)
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(list(LIBRARIES))
    with warm.Pool(args.jobs, maxtasksperchild=1) as pool:
        run = partial(train, starts=starts, out=args.out, steps=args.steps)
        try:
            results = pool.starmap(run, jobs, chunksize=1)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None

    before = json.loads((folder_of(*jobs[0], args.out) / "training.json").read_text())["before"]
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    content = {
        "settings": arguments | settings | {"warmup": WARMUP},
        "pretraining": json.loads((base / "pretraining.json").read_text()),
        "seconds": time.monotonic() - began,
        "before": before,
        "results": [asdict(result) for result in results],
    }
    (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(results, before)
    (args.out / "results.md").write_text(text + "\n")
    plot(results, before, args.out)
    print(f"\n{text}\n\n{time.monotonic() - began:.0f} s; {args.out}/results.json, .md, .png, .svg")
    return 0


def variants() -> list[Variant]:
    """What is compared: LoRA at both scales, all others at alpha = r."""
    chosen = [METHODS[name] for name in COMPARED]
    return [
        Variant(method.name, None if method.starts_from == "full" else factor * RANK)
        for method in chosen
        for factor in sorted({1, method.alpha_per_rank}, reverse=True)  # alpha = r; for LoRA the authors' 2r too
    ]


def initialise(base: Path, out: Path) -> dict[str, Path]:
    """What each method starts from: the base, or an output of milora-init of it."""
    starts = {}
    for variant in variants():
        method = METHODS[variant.method]
        starts[method.name] = base
        if method.is_initial:
            starts[method.name] = out / "starts" / method.name
            shutil.rmtree(starts[method.name], ignore_errors=True)
            make_start(method, str(base), starts[method.name], rank=RANK)
    return starts


def folder_of(variant: Variant, rate: float, seed: int, out: Path) -> Path:
    """Where a training is written."""
    return out / "runs" / f"{variant.method}-{variant.alpha}-{rate:g}-{seed}"


def train(variant: Variant, rate: float, seed: int, *, starts: dict[str, Path], out: Path, steps: int) -> Result:
    """Train and evaluate, in this process and on one thread.

    All start from the function of the base, so its loss before the training is measured with the first variant alone.

    Raises:
        RuntimeError: A script failed.
    """
    run = folder_of(variant, rate, seed, out)
    adapter = {} if variant.alpha is None else {"rank": RANK, "alpha": variant.alpha, "dropout": DROPOUT}
    training: dict[str, object] = {
        **adapter, "data": out / "data" / "train.jsonl", "learning-rate": rate, "seed": seed, "max-steps": steps,
        "warmup-steps": WARMUP, "total-batch": BATCH, "device-batch": BATCH, "max-length": 256,
    }  # fmt: skip
    held = ["--eval-data", f"new={out}/data/new.jsonl", "--eval-data", f"old={out}/base/held-out.jsonl"]
    if variant != variants()[0]:
        held.append("--no-eval-on-start")
    evaluation: dict[str, object] = {
        "tasks": "gsm8k", "data": f"gsm8k={out}/data/gsm8k.jsonl", "max-new-tokens": 24, "batch-size": 100,
        "device": "cpu",
    }  # fmt: skip
    score_file = run / "results" / "gsm8k" / f"{variant.method}.json"
    if not score_file.is_file():  # an unfinished training is removed and started again
        shutil.rmtree(run, ignore_errors=True)
        _script("train", variant.method, starts[variant.method], run, *_words(training), *held)
        _script("evaluate", run, *_words(evaluation))
        shutil.rmtree(run / "checkpoints")
    record = json.loads((run / "training.json").read_text())
    right = json.loads(score_file.read_text())["metrics"]["exact_match,none"]
    result = Result(variant, rate, seed, record["after"]["new"], record["after"]["old"], right, record["seconds"])
    print(f"    {variant.label}, {rate:g}, seed {seed}: {result.new:.3f} new, {result.old:.3f} old", flush=True)
    return result


def _script(name: str, *words: object) -> None:
    """Run a script of this folder, as on a command line. Raises RuntimeError, with what it printed, if it fails."""
    import torch

    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *map(str, words)]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}:\n{printed.getvalue()}") from None
    except Exception as error:
        raise RuntimeError(f"{' '.join(sys.argv)} failed:\n{printed.getvalue()}") from error


def _words(options: Mapping[str, object]) -> list[str]:
    """The words of a command line for these options."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def grouped(results: Iterable[Result]) -> dict[Variant, dict[float, list[Result]]]:
    """The results of all seeds, by variant and learning rate."""
    groups: dict[Variant, dict[float, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.variant, {}).setdefault(result.rate, []).append(result)
    return groups


def table(results: Sequence[Result], before: Mapping[str, float]) -> str:
    """The results in Markdown, a line for each variant and learning rate, every seed's value shown."""
    lines = [
        f"Before training: {before['new']:.3f} on word problems (new), {before['old']:.3f} on docstrings (old).",
        "",
        "| method | learning rate | loss, new | loss, old | right answers |",
        "|---|---|---|---|---|",
    ]
    for variant, rates in grouped(results).items():
        for rate, seeds in rates.items():
            figures = (
                " / ".join(f"{getattr(result, name):{form}}" for result in seeds)
                for name, form in (("new", ".3f"), ("old", ".3f"), ("right", ".0%"))
            )
            lines.append(f"| {variant.label} | {rate:g} | {' | '.join(figures)} |")
    return "\n".join(lines)


def plot(results: Sequence[Result], before: Mapping[str, float], out: Path) -> None:
    """One curve for each variant over its learning rates: the mean of the seeds, and every seed as a small point."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "milora-init"  # the same results give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for number, (variant, rates) in enumerate(grouped(results).items()):
        color = f"C{number}"
        new = [statistics.mean(result.new for result in seeds) for seeds in rates.values()]
        old = [statistics.mean(result.old for result in seeds) for seeds in rates.values()]
        axes.plot(new, old, marker="o", color=color, label=variant.label)
        every = [result for seeds in rates.values() for result in seeds]
        axes.scatter([result.new for result in every], [result.old for result in every], s=10, color=color, alpha=0.5)
    axes.axhline(before["old"], color="grey", linewidth=0.8, linestyle="--", label="before training")
    axes.set_xlabel("loss on new word problems (further left: learned more)")
    axes.set_ylabel("loss on held-out docstrings (lower: forgot less)")
    axes.set_title("Learning against forgetting; each point of a curve is a learning rate")
    axes.legend()
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"results.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
