"""Evaluate a trained or untrained model with lm-evaluation-harness, always together with its adapter.

    python scripts/evaluate.py MODEL [--adapter ADAPTER] [--tasks gsm8k MATH ...]

MODEL is a SAVE_ROOT of train.py, an output of milora-init, or a plain (original or merged) model. The base of a pair
alone is never evaluated: without --adapter the pair has its initial one. gsm8k and MATH are the two task files in
scripts/evaluation; all other names are lm-evaluation-harness's own. Writes OUT/TASK/NAME.json with every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_methods import MismatchError, find_start, manifest_of, merge_pair, require_packages

from milora_init import verify
from milora_init.hub.source import is_hub_id, is_repository
from milora_init.manifest import MANIFEST, Manifest

RECORD = "training.json"  # of train.py
TASK_FILES = Path(__file__).parent / "evaluation"
FIELDS = {"gsm8k": ("question", "answer"), "MATH": ("problem", "solution")}  # of the data of our tasks


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: a model, or a base with its adapter.

    Attributes:
        model: Folder or Hub id of the weights.
        adapter: Folder of the adapter; None for a plain model.
        is_residual: Whether the weights are a residual base, which must not be evaluated without the adapter.
        name: Of the result files.
        revision: Commit of a model on the Hub; None for the newest, and for a folder.
    """

    model: str
    adapter: str | None
    is_residual: bool
    name: str
    revision: str | None = None


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="SAVE_ROOT of train.py, output of milora-init, or plain model")
    options.add_argument("--adapter", help="trained adapter of MODEL (default: the one that belongs to MODEL)")
    options.add_argument("--tasks", nargs="+", default=list(FIELDS))
    options.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE",
        help="problems of gsm8k or MATH from a file of JSON lines instead of the Hub; repeatable",
    )  # fmt: skip
    options.add_argument("--include", help="folder with more task files of lm-evaluation-harness")
    options.add_argument("--out", type=Path, help="(default: MODEL/results, or ./results for a plain model or Hub id)")
    options.add_argument("--name", help="of the result files (default: the method, or the folder's name)")
    options.add_argument("--limit", type=int, help="only the first LIMIT problems of each task")
    options.add_argument("--batch-size", default="8")
    options.add_argument("--max-new-tokens", type=int, help="(default: the task's: 1024 for gsm8k, 2048 for MATH)")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", help="(default: the GPU, or the CPU without one)")
    options.add_argument(
        "--backend", choices=("hf", "vllm"), default="hf", help="vllm merges a pair first, into OUT/merged"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    """Evaluate; return the exit status."""
    try:
        evaluate(parser().parse_args(argv))
    except MismatchError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate and write the results. Raises MismatchError before anything is evaluated."""
    require_packages("lm_eval", "math_verify")
    for task, _, file in (pair.partition("=") for pair in args.data):
        _require_data(task, Path(file))
    subject = find_subject(args.model, args.adapter)
    is_ours = any((Path(args.model) / name).is_file() for name in (RECORD, MANIFEST))
    out = args.out or (Path(args.model) if is_ours else Path()) / "results"
    name = args.name or subject.name
    for task in args.tasks:
        _require_own(out / task / f"{name}.json", subject)
    adapter = f" with {subject.adapter}" if subject.adapter else ""
    print(f"evaluating {subject.model}{adapter}: {', '.join(args.tasks)}", flush=True)
    results = run(subject, args, out)
    # Under `accelerate launch` the harness gives the results to the first process only.
    for task, metrics in (results or {"results": {}})["results"].items():
        path = out / task / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "task": task,
            "model": subject.model,
            "adapter": subject.adapter,
            "metrics": {key: value for key, value in metrics.items() if isinstance(value, int | float)},
            "config": results["configs"].get(task),
            "samples": results.get("samples", {}).get(task, []),
        }
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        figures = ", ".join(f"{key.partition(',')[0]} {value:.4f}" for key, value in content["metrics"].items())
        print(f"{task}: {figures} -> {path}")


def _require_own(path: Path, subject: Subject) -> None:
    """Raise MismatchError if a file has the results of another model or adapter."""
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if (earlier["model"], earlier["adapter"]) != (subject.model, subject.adapter):
            of = earlier["adapter"] or earlier["model"]
            raise MismatchError(f"{path} has the results of {of}: give these another name, with --name NAME")


def _require_data(task: str, file: Path) -> None:
    """Raise MismatchError for a task that is not ours, or a file that is not JSON lines with its fields."""
    if task not in FIELDS or not file.is_file():
        raise MismatchError(f"--data {task}={file}: name {' or '.join(FIELDS)}, and a file that exists")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise MismatchError(f"--data {task}={file}: line {number} is not JSON") from None
        missing = [field for field in FIELDS[task] if not isinstance(row, dict) or field not in row]
        if missing:
            raise MismatchError(f"--data {task}={file}: line {number} has no field {' and no '.join(missing)}")


def find_subject(model: str, adapter: str | None = None) -> Subject:
    """The model and the adapter that belong together.

    Args:
        model: As on the command line.
        adapter: A trained adapter; None for the one that belongs to the model.

    Raises:
        MismatchError: No such model or adapter, both do not belong together, or the training is unfinished.
    """
    if adapter and not Path(adapter).is_dir() and not is_repository(adapter):
        raise MismatchError(f"--adapter {adapter}: no such folder")
    record = Path(model) / RECORD
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
    if record.is_file():
        training = json.loads(record.read_text(encoding="utf-8"))
        if not training["finished"]:
            raise MismatchError(f"the training in {model} is not finished: run train.py with --resume")
        name, start = training["method"], training["start"]
        if start["method"]["starts_from"] == "full":
            return Subject(str(Path(model) / "model"), None, False, name)
        pair = start["method"]["starts_from"] == "pair"
        if adapter:
            _require_match(start["model"], manifest_of(start["model"]), adapter)
        return Subject(start["model"], adapter or str(Path(model) / "adapter"), pair, name, start.get("revision"))
    manifest = manifest_of(model)
    if manifest is None:
        _require_model(model)
    if adapter:
        _require_match(model, manifest, adapter)
    if manifest is None:
        return Subject(model, adapter, False, name)
    output = find_start(manifest.method.name, model)
    pair = output.method.starts_from == "pair"
    return Subject(output.model, adapter or output.adapter, pair, name, output.revision)


def _require_match(model: str, manifest: Manifest | None, adapter: str) -> None:
    """Raise MismatchError if an adapter was not trained on this model, as far as its config and its factors tell."""
    if manifest is not None:
        verdict = verify(model, adapter=adapter)
        if not verdict.ok:
            first = verdict.differences[0]
            raise MismatchError(f"{model} and {adapter} do not belong together: {first.what}; {first.hint}")
        return
    config = Path(adapter) / "adapter_config.json"
    trained_on = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"] if config.is_file() else ""
    if trained_on and trained_on != model and (other := manifest_of(trained_on)) and other.method.writes_base:
        raise MismatchError(
            f"{adapter} was trained on {trained_on}, a residual base: evaluate {trained_on}, not {model}"
        )


def _require_model(model: str) -> None:
    """Raise MismatchError for what is neither a folder nor a model on the Hub."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            adapter = (Path(model) / "adapter_config.json").is_file()
            what = f"is an adapter: name its pair, and --adapter {model}" if adapter else "is no model: no config.json"
            raise MismatchError(f"{model} {what}")
        return
    if not is_hub_id(model):
        raise MismatchError(f"{model}: no such folder")
    from transformers.utils.hub import cached_file

    try:
        cached_file(model, "config.json")
    except OSError as error:
        raise MismatchError(f"{model} is no folder, and not found on the Hub: {str(error).splitlines()[0]}") from None


def run(subject: Subject, args: argparse.Namespace, out: Path) -> Any:
    """lm-evaluation-harness's results. Raises MismatchError for a task that is not there, or whose data is not."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as changed:
        for task, _, file in (pair.partition("=") for pair in args.data):
            (Path(changed) / f"{task}.yaml").write_text(_from_file(task, file), encoding="utf-8")
        # Of two files for one task the later folder's counts. The index of the harness's own tasks takes seconds.
        folders = [str(TASK_FILES), *([args.include] if args.include else []), changed]
        known = TaskManager(include_path=folders, include_defaults=False)
        if not set(args.tasks) <= set(known.all_tasks):
            known = TaskManager(include_path=folders)
        if unknown := sorted(set(args.tasks) - set(known.all_tasks)):
            raise MismatchError(f"no task {', '.join(unknown)}: `lm_eval ls tasks` lists those of the harness")
        try:
            tasks = list(known.load(args.tasks)["tasks"].values())
        except OSError as error:
            raise MismatchError(
                f"the data of {', '.join(args.tasks)} cannot be read: {error}; "
                "for gsm8k and MATH name a file: --data TASK=FILE"
            ) from None
        of_backend = _vllm_arguments(subject, args, out) if args.backend == "vllm" else _hf_arguments(subject, args)
        try:
            return simple_evaluate(
                model=args.backend,
                model_args=of_backend,
                tasks=tasks,
                task_manager=known,
                batch_size=int(args.batch_size) if args.batch_size.isdigit() else args.batch_size,
                device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
                limit=args.limit,
                gen_kwargs={"max_gen_toks": args.max_new_tokens} if args.max_new_tokens else None,
                log_samples=True,
                bootstrap_iters=0,
            )
        except AssertionError as error:
            if "max tokens to generate" not in str(error):
                raise
            raise MismatchError(
                f"the context of {subject.model} is too short for the answers: give --max-new-tokens ({error})"
            ) from None


def _from_file(task: str, file: str) -> str:
    """A task file that reads the test problems of one of our tasks from JSON lines."""
    changes = {
        "include": str((TASK_FILES / f"{task}.yaml").resolve()),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "custom_dataset": None,
    }
    return json.dumps(changes)  # JSON is YAML


def _hf_arguments(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = {"pretrained": subject.model, "dtype": args.dtype}
    if subject.revision:
        arguments["revision"] = subject.revision
    if subject.adapter:
        arguments["peft"] = subject.adapter
    return arguments


def _vllm_arguments(subject: Subject, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"pretrained": subject.model, "dtype": args.dtype}
    if subject.revision:
        arguments["revision"] = subject.revision
    if subject.is_residual:
        merge_pair(subject.model, subject.adapter, out / "merged")
        arguments["pretrained"] = str(out / "merged")
    elif subject.adapter:
        config = json.loads((Path(subject.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        arguments |= {"lora_local_path": subject.adapter, "max_lora_rank": config["r"]}
    return arguments


if __name__ == "__main__":
    # Some of the harness's tasks import a package with the name of this file.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
