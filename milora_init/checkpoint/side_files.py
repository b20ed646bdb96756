"""Choose the files that belong to a model beside its weights: tokenizer, chat template, licence, code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from milora_init.checkpoint.files import read_json, source_file
from milora_init.errors import CheckpointError
from milora_init.untrusted import relative_name


def side_files(folder: Path) -> list[str]:
    """The files that are copied into an output, by the path relative to the folder.

    Not copied are other forms of the weights, hidden files, the README (a card of the original model), and an
    adapter_config.json, which would make transformers load an adapter over the output. Of the subfolders, those that
    modules.json names (sentence-transformers) and the additional chat templates are copied.

    Raises:
        CheckpointError: See `source_file`; or modules.json names a folder that cannot be copied.
    """
    paths = (path for path in folder.iterdir() if travels(path.name))
    names = sorted(path.name for path in paths if not os.path.isdir(path))  # noqa: PTH112 (as in `source_file`)
    for subfolder in ("additional_chat_templates", *_module_folders(folder)):
        names += sorted(_files_below(folder, subfolder))
    for name in names:
        source_file(folder, name)
    return list(dict.fromkeys(names))


def _module_folders(folder: Path) -> list[str]:
    """The subfolders that modules.json names. Raises CheckpointError."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = read_json(source_file(folder, path.name))
    if not isinstance(modules, list):
        raise CheckpointError(f"{path}: not a list of modules")
    names = [module.get("path", "") for module in modules if isinstance(module, dict)]
    for name in (name for name in names if name != ""):
        try:
            parts = Path(relative_name(name)).parts
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}", hint="correct that path, or remove modules.json") from error
        if not travels(parts[0]) or any(part.startswith(".") for part in parts):
            raise CheckpointError(
                f"{path}: the folder {name!r} cannot go into the output: it is hidden, or has a name of the output's",
                hint="rename that folder, or remove modules.json",
            )
    return [name for name in names if name != ""]


def _files_below(folder: Path, subfolder: str) -> Iterator[str]:
    """Every file below a subfolder that is not hidden, relative to the folder. The subfolder need not exist."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error

    def require_no_link(path: Path) -> None:
        # A link to a folder could lead out of this one, or back into itself.
        if Path(os.path.realpath(path)) != path:
            where = folder / path.relative_to(home)
            raise CheckpointError(f"{where} is a link to a folder", hint="put the folder itself in its place")

    home = Path(os.path.realpath(folder))
    require_no_link(home / subfolder)
    for parent, folders, files in os.walk(home / subfolder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            require_no_link(Path(parent, name))
        yield from (str(Path(parent, name).relative_to(home)) for name in files if not name.startswith("."))


WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".tflite", ".ot", ".mlmodel", ".npz", ".nemo", ".llamafile", ".partial",
})  # fmt: skip
# Of configs, tokenizers, chat templates, processors and code.
_SIDE_FILE_SUFFIXES = frozenset({".json", ".model", ".tiktoken", ".jinja", ".py"})
_VOCABULARIES = frozenset({"vocab.txt", "merges.txt"})
# The output has its own files of these names, and its adapter in `lora`.
_OWN_NAMES = frozenset({"config.json", "adapter_config.json", "milora_init.json", "milora_merge.json", "lora"})


def brings_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or makes transformers or PEFT load others than those of the output."""
    is_weights = Path(name).suffix.lower() in WEIGHT_SUFFIXES
    return is_weights or name.endswith(".index.json") or name == "adapter_config.json"


def would_be_loaded(name: str) -> bool:
    """Whether transformers or PEFT could load a file of this name, beside the weights, as a part of the model."""
    suffix = Path(name).suffix.lower()
    return suffix in WEIGHT_SUFFIXES | _SIDE_FILE_SUFFIXES or name in _VOCABULARIES


def travels(name: str) -> bool:
    """Whether a file or folder beside the weights may be copied into the output, by its name."""
    return not (
        name.startswith((".", "README"))
        or name.endswith(".index.json")
        or name.casefold() in _OWN_NAMES
        or Path(name).suffix.lower() in WEIGHT_SUFFIXES
    )
