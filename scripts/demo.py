"""The whole way on a real language model, each step timed and checked.

SmolLM2-135M-Instruct is split by the default recipe. The pair must answer a question as the source does, with the same
perplexity, and the base alone must not. The pair is trained for a few steps; the trained pair, the merged model and the
converted adapter on the source must be one function. Writes to demo/. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")

import smollm2
from word_problems import split, write_lines

HERE = Path(__file__).parent
DEMO = Path("demo")
SOURCE = DEMO / "SmolLM2-135M-Instruct"
PAIR, RUN, MERGED, PLAIN = DEMO / "svd_init", DEMO / "run", DEMO / "merged", DEMO / "plain"
QUESTION = "What is the capital of France?"
PROSE = (
    "The river rises in the mountains and flows south through a wide valley. In spring, when the snow melts, it "
    "carries more water than at any other time of the year, and the farmers along its banks open the small gates "
    "that lead the water to their fields. Most of them grow wheat and vegetables, which they sell in the market of "
    "the nearest town. An old stone bridge connects the two parts of the town. It was built more than three hundred "
    "years ago, and only people on foot may use it today."
)
SAME = 0.01  # relative difference of two perplexities of one function; the base is stored in bfloat16
STEPS = 5


def main() -> int:
    """Run every step; print the figures and the checks."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    DEMO.mkdir(exist_ok=True)
    for folder in (PAIR, RUN, MERGED, PLAIN):
        shutil.rmtree(folder, ignore_errors=True)
    with timed(f"convert the GGUF file to {SOURCE}"):
        smollm2.convert(SOURCE)
    milora_init("--model", SOURCE, "--out", PAIR)

    with timed("answer a question, measure perplexity"):
        from peft import PeftModel

        source = load(SOURCE)
        truth = measure(source)
        paired = PeftModel.from_pretrained(load(PAIR), str(PAIR), subfolder="lora").eval()
        pair = measure(paired)
        with paired.disable_adapter():
            alone = measure(paired)
    print(f"    {QUESTION}")
    for name, (answer, perplexity) in (("source", truth), ("pair", pair), ("base alone", alone)):
        print(f"    {name:12} perplexity {perplexity:<10.5g} {answer!r}")
    check("the pair answers as the source does", pair[0] == truth[0])
    check("the pair has the perplexity of the source", close(pair[1], truth[1]))
    check("the base alone does neither", alone[0] != truth[0] and not close(alone[1], truth[1]))

    training, _ = split(64, 0, seed=0)
    data = write_lines(DEMO / "problems.jsonl", [problem.training_row() for problem in training])
    # bfloat16 is many times slower than float32 on most CPUs.
    options = f"--data {data} --max-steps {STEPS} --warmup-steps 0 --total-batch 8 --device-batch 8 --dtype float32"
    python("train.py", "milora", PAIR, RUN, *options.split())
    milora_init("verify", PAIR, "--adapter", RUN / "adapter")
    milora_init("merge", PAIR, "--adapter", RUN / "adapter", "--out", MERGED)
    milora_init("convert", PAIR, "--adapter", RUN / "adapter", "--out", PLAIN)

    with timed("measure the trained pair, the merged model and the converted adapter on the source"):
        trained = perplexity_of(PeftModel.from_pretrained(load(PAIR), str(RUN / "adapter")).eval())
        merged = perplexity_of(load(MERGED))
        plain = perplexity_of(PeftModel.from_pretrained(source, str(PLAIN)).eval())
    print(f"    perplexity: trained pair {trained:.5g}, merged {merged:.5g}, converted {plain:.5g}")
    check("the merged model is the trained pair", close(merged, trained))
    check("the converted adapter on the source is the trained pair", close(plain, trained))
    print(f"\nAll checks passed in {time.monotonic() - began:.0f} s.")
    return 0


def load(folder: Path) -> Any:
    """The model of a folder, computing in float32, so that only what is stored differs."""
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def measure(model: Any) -> tuple[str, float]:
    """The greedy answer to QUESTION, and the perplexity on PROSE."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE)
    messages = [{"role": "user", "content": QUESTION}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True), perplexity_of(model)


def perplexity_of(model: Any) -> float:
    """exp of the mean loss on PROSE."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return math.exp(model(input_ids=ids, labels=ids).loss.item())


def close(a: float, b: float) -> bool:
    """Whether two perplexities are those of one function."""
    return abs(a - b) <= SAME * b


def check(what: str, ok: bool) -> None:
    """Print the check; end the demo if it failed."""
    print(f"    {'ok' if ok else 'FAILED'}: {what}", flush=True)
    if not ok:
        sys.exit(1)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what is done, and how long it took."""
    print(f"\n== {what}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.1f} s", flush=True)


def milora_init(*arguments: object) -> None:
    """Run the command line; end the demo if it fails."""
    run("milora-init", [sys.executable, "-m", "milora_init"], arguments)


def python(script: str, *arguments: object) -> None:
    """Run a script of this folder; end the demo if it fails."""
    run(f"python scripts/{script}", [sys.executable, str(HERE / script)], arguments)


def run(name: str, command: list[str], arguments: tuple[object, ...]) -> None:
    """Print a command as a person would type it, run it, time it."""
    given = [str(argument) for argument in arguments]
    with timed(f"$ {' '.join([name, *given])}"):
        status = subprocess.run([*command, *given], check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
