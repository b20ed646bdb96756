"""Train one method with TRL's SFTTrainer, by the authors' settings.

    python scripts/train.py METHOD BASE SAVE_ROOT [options]

BASE is an output of milora-init for milora and its other methods, and an original model for lora and full. Writes

    SAVE_ROOT/training.json    settings, and the losses before and after
    SAVE_ROOT/adapter          the trained adapter (SAVE_ROOT/model with full)
    SAVE_ROOT/checkpoints      for --resume
    SAVE_ROOT/tensorboard      one event a step

The data has prompts and responses; the loss is on the response only. Under torchrun every GPU takes its part of the
batch. Exit status 2: METHOD, BASE and the options do not fit together, or a package is missing; nothing was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training_methods import METHODS, MismatchError, Start, find_start, require_packages

# Alpaca's prompt without an input. The response follows the colon at once, then the end-of-text token.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
RECORD = "training.json"


def parser() -> argparse.ArgumentParser:
    """The options; the defaults are the authors'."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("method", choices=METHODS)
    options.add_argument("base", help="output of milora-init, or original model")
    options.add_argument("save_root", type=Path)
    options.add_argument("--data", default="meta-math/MetaMathQA", help="Hub data set, or file of JSON lines")
    options.add_argument("--prompt-field", default="query")
    options.add_argument("--response-field", default="response")
    options.add_argument("--rows", type=int, help="use the first ROWS rows only")
    options.add_argument(
        "--eval-data", action="append", default=[], metavar="NAME=FILE",
        help="measure the loss on this file before and after; rows have the same fields, or `text` alone; repeatable",
    )  # fmt: skip
    options.add_argument("--epochs", type=float, default=3)
    options.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, whatever --epochs says")
    options.add_argument("--total-batch", type=int, default=16, help="sequences a step, over all GPUs")
    options.add_argument("--device-batch", type=int, default=4, help="sequences at a time on one GPU")
    options.add_argument("--learning-rate", type=float, default=3e-4)
    options.add_argument("--warmup-steps", type=int, default=100)
    options.add_argument("--max-length", type=int, default=2048, help="tokens of a sequence; longer ones are cut")
    options.add_argument("--rank", type=int, help="of a fresh LoRA (default: 64)")
    options.add_argument("--alpha", type=int, help="of a fresh LoRA (default: 2 * rank, as the authors')")
    options.add_argument("--dropout", type=float, help="(default: the initial adapter's; 0.05 for a fresh LoRA)")
    options.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the frozen weights; full always trains float32 weights",
    )  # fmt: skip
    options.add_argument(
        "--eval-on-start", action=argparse.BooleanOptionalAction, default=True,
        help="measure the loss on --eval-data before the training too",
    )  # fmt: skip
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--save-steps", type=int, help="steps between checkpoints (default: one an epoch)")
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--resume", action="store_true", help="go on with what SAVE_ROOT holds")
    return options


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit status."""
    try:
        train(parser().parse_args(argv))
    except MismatchError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def train(args: argparse.Namespace) -> None:
    """Check, load, train, save. Raises MismatchError before anything is recorded or trained."""
    require_packages("peft", "accelerate", "trl", "datasets", "tensorboard")
    first = os.environ.get("RANK", "0") == "0"
    start = find_start(args.method, args.base, rank=args.rank, alpha=args.alpha, dropout=args.dropout)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"start": asdict(start), "finished": False}
    _require_files([args.data, *(entry.partition("=")[2] for entry in args.eval_data)])
    finished = first and _finished(args, settings)
    if first:
        print(_describe(start, args), flush=True)
    if finished:
        print(f"{args.save_root} holds this training, finished.")
        return
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    trainer = make_trainer(args, start)
    if first:
        args.save_root.mkdir(parents=True, exist_ok=True)
        _write(args.save_root / RECORD, settings)
    before = _losses(trainer) if args.eval_on_start else {}
    checkpoints = list((args.save_root / "checkpoints").glob("checkpoint-*"))
    result = trainer.train(resume_from_checkpoint=bool(args.resume and checkpoints))
    after = _losses(trainer)
    trainer.save_model(str(args.save_root / ("model" if start.method.starts_from == "full" else "adapter")))
    if first:
        figures = {
            "steps": trainer.state.global_step,
            "train_loss": result.training_loss,
            "seconds": result.metrics["train_runtime"],
        }
        _write(args.save_root / RECORD, settings | {"finished": True, **figures, "before": before, "after": after})
        for name, loss in after.items():
            was = f"{before[name]:.4f} before, " if name in before else ""
            print(f"loss on {name}: {was}{loss:.4f} after")


def make_trainer(args: argparse.Namespace, start: Start) -> Any:
    """The SFTTrainer of this run: model loaded, data read, nothing trained.

    Raises:
        MismatchError: The batch cannot be divided, or a row lacks a field.
        RuntimeError: PEFT did not load every tensor of the initial adapter.
    """
    import torch
    from transformers import AutoTokenizer, set_seed
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    at_once = min(args.device_batch, args.total_batch) * int(os.environ.get("WORLD_SIZE", "1"))
    if args.total_batch % at_once:
        raise MismatchError(f"--total-batch {args.total_batch} is no multiple of {at_once}, the sequences at one time")
    gpu = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.save_root / "tensorboard")
    # TRL's own defaults differ from the authors' in most of these: all are set.
    config = SFTConfig(
        output_dir=str(args.save_root / "checkpoints"),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=min(args.device_batch, args.total_batch),
        per_device_eval_batch_size=args.device_batch,
        gradient_accumulation_steps=args.total_batch // at_once,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        weight_decay=0.0,
        optim="adamw_torch",
        max_length=args.max_length,
        packing=False,
        completion_only_loss=True,
        bf16=gpu,
        tf32=True if gpu else None,
        use_cpu=not gpu,
        gradient_checkpointing=args.gradient_checkpointing,
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        save_total_limit=1,
        seed=args.seed,
        data_seed=args.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    set_seed(args.seed)
    return SFTTrainer(
        load_model(start, args.dtype),
        config,
        train_dataset=read_rows(args.data, args),
        eval_dataset={name: read_rows(file, args) for name, _, file in (e.partition("=") for e in args.eval_data)},
        processing_class=AutoTokenizer.from_pretrained(start.model, revision=start.revision),
    )


def load_model(start: Start, dtype: str = "auto") -> Any:
    """The model with its trainable adapter; with `full` the model in float32.

    Raises:
        RuntimeError: PEFT did not load every tensor of the initial adapter.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    full = start.method.starts_from == "full"
    base = AutoModelForCausalLM.from_pretrained(
        start.model, revision=start.revision, dtype="float32" if full else dtype
    )
    if full:
        return base
    if start.adapter is None:
        return get_peft_model(
            base,
            LoraConfig(
                r=start.rank, lora_alpha=start.alpha, lora_dropout=start.dropout,
                target_modules=list(start.targets), task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    from peft import get_peft_model_state_dict, load_peft_weights

    config = PeftConfig.from_pretrained(start.adapter)
    config.lora_dropout = start.dropout
    # Without `low_cpu_mem_usage` PEFT computes its own factors for mica first, by a full SVD of every weight.
    no_svd = config.init_lora_weights is not True
    model = PeftModel.from_pretrained(base, start.adapter, is_trainable=True, config=config, low_cpu_mem_usage=no_svd)
    # PEFT only warns about tensors that found no module.
    left = load_peft_weights(start.adapter, device="cpu").keys() ^ get_peft_model_state_dict(model).keys()
    if left:
        raise RuntimeError(f"{len(left)} adapter tensors do not fit {type(base).__name__}, the first is {min(left)}")
    return model


def read_rows(source: str, args: argparse.Namespace) -> Any:
    """Rows of `prompt` and `completion`, from a Hub data set or a file of JSON lines. Raises MismatchError."""
    from datasets import load_dataset

    try:
        if Path(source).suffix in (".json", ".jsonl"):
            rows = load_dataset("json", data_files=source, split="train")
        else:
            rows = load_dataset(source, split="train")
    except OSError as error:
        raise MismatchError(f"the data {source} cannot be read: {error}; name a file: --data FILE") from None
    if args.rows:
        rows = rows.select(range(min(args.rows, len(rows))))
    if rows.column_names == ["text"]:
        return rows.map(lambda row: {"prompt": "", "completion": row["text"]}, remove_columns=rows.column_names)
    for field in (args.prompt_field, args.response_field):
        if field not in rows.column_names:
            raise MismatchError(f"{source} has no field {field!r}; it has {', '.join(rows.column_names)}")
    return rows.map(
        lambda row: {
            "prompt": PROMPT.format(instruction=row[args.prompt_field]),
            "completion": row[args.response_field],
        },
        remove_columns=rows.column_names,
    )


def _require_files(sources: list[str]) -> None:
    """Raise MismatchError for a file of data that is not there. Data sets on the Hub are not looked for."""
    for source in sources:
        if Path(source).suffix in (".json", ".jsonl") and not Path(source).is_file():
            raise MismatchError(f"{source}: no such file of data")


def _describe(start: Start, args: argparse.Namespace) -> str:
    """One line: what is trained, with which scale and learning rate."""
    rate = f"learning rate {args.learning_rate:g}"
    if start.rank is None:
        return f"{args.method}: all weights of {start.model}; {rate}"
    what = f"{start.adapter} on {start.model}" if start.adapter else f"a fresh LoRA on {start.model}"
    return (
        f"{args.method}: {what}; rank {start.rank}, alpha {start.alpha}, scale {start.scale:g}, "
        f"dropout {start.dropout:g}, {rate}"
    )


def _finished(args: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Whether SAVE_ROOT holds this training, finished. Raises MismatchError for another one, or without --resume."""
    record = args.save_root / RECORD
    if not record.exists():
        return False
    if not args.resume:
        raise MismatchError(f"{args.save_root} holds a training: go on with --resume, or name another folder")
    earlier = json.loads(record.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(settings))
    changed = [key for key in asked if key not in ("resume", "finished") and earlier.get(key) != asked[key]]
    if changed:
        raise MismatchError(f"{args.save_root} was started with another {', '.join(changed)}: name another folder")
    return bool(earlier["finished"])


def _losses(trainer: Any) -> dict[str, float]:
    """The mean loss on each held-out file."""
    if not trainer.eval_dataset:
        return {}
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_loss"] for name in trainer.eval_dataset}


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
