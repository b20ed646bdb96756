"""The tokenizer of a merged model: that of the pair, or the one that was saved with a resized vocabulary."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_init.checkpoint.files import source_file
from milora_init.errors import MiloraError, PlanError, UsageError
from milora_init.options import local_path
from milora_init.untrusted import read_text

# The files that tokenizers of transformers are saved in, chat templates among them.
TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "tekken.json", "chat_template.jinja", "chat_template.json",
})  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_PADDING = 8  # resize_token_embeddings(pad_to_multiple_of=N) is used with multiples of it


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer in a folder.

    Attributes:
        folder: The folder.
        files: Its files, relative to the folder.
    """

    folder: Path
    files: tuple[str, ...]

    def highest_id(self) -> int | None:
        """The highest id of a token; None if that cannot be read from tokenizer.json."""
        vocabulary = self._vocabulary()
        return max(vocabulary.values(), default=None) if vocabulary else None

    def padding_id(self) -> int | None:
        """The id of the padding token; None if there is none, or it cannot be read."""
        try:
            token: Any = json.loads(read_text(self.folder / "tokenizer_config.json")).get("pad_token")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        if isinstance(token, dict):
            token = token.get("content")
        return (self._vocabulary() or {}).get(token) if isinstance(token, str) else None

    def _vocabulary(self) -> dict[str, int] | None:
        from tokenizers import Tokenizer as FastTokenizer

        with suppress(Exception):  # the library has no common exception class
            path = source_file(self.folder, "tokenizer.json")
            found: dict[str, int] = FastTokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
            return found
        return None


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None if there is none. Raises CheckpointError for a link that leads out of it."""
    names = sorted(name for name in TOKENIZER_FILES if (folder / name).is_file())
    if not {"tokenizer_config.json", "tokenizer.json", "tokenizer.model"} & set(names):
        return None
    if (folder / _TEMPLATES).is_dir():
        names += sorted(f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).iterdir() if path.is_file())
    for name in names:
        source_file(folder, name)
    return Tokenizer(folder, tuple(names))


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model belongs to its tokenizer, by its path relative to the model."""
    return name in TOKENIZER_FILES or name.startswith(f"{_TEMPLATES}/")


def choose_tokenizer(
    given: str | None, adapter: Path, base: Path, vocabulary: tuple[int, int] | None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer to write instead of the base's; None to keep that one. And what the user should know about it.

    Args:
        given: The folder of `--tokenizer`; None if it was not given.
        adapter: The folder of the trained adapter, where trainers save the tokenizer too.
        base: The folder of the base.
        vocabulary: The number of rows of the embeddings before and after; None if it did not change.

    Raises:
        UsageError: `given` is no folder, or holds no tokenizer.
        PlanError: The tokenizer has tokens that the embeddings do not have; or the vocabulary grew, and the tokenizer
            knows none of the new rows, which are not padding either.
    """
    chosen = None
    if given is not None:
        folder = local_path(given)
        chosen = find_tokenizer(folder) if folder.is_dir() else None
        if chosen is None:
            raise UsageError(f"--tokenizer {given}: no tokenizer there", hint="name the folder that the trainer saved")
    elif vocabulary:
        chosen = find_tokenizer(adapter)
    if not vocabulary:
        return chosen, []
    before, after = vocabulary
    own = None
    with suppress(MiloraError):
        own = find_tokenizer(base)
    tokenizer = chosen or own
    highest = tokenizer.highest_id() if tokenizer else None
    where = "of the model" if chosen is None else "in the adapter's folder" if given is None else "of --tokenizer"
    if highest is None:
        return chosen, [f"the vocabulary has {after} rows, formerly {before}; the tokenizer {where} was not checked"]
    if highest >= after:
        raise PlanError(
            f"the tokenizer {where} has the token {highest}, and the embeddings have {after} rows",
            hint="name the tokenizer of the training: --tokenizer DIR",
        )
    if after > before and highest < before:
        problem = (
            f"the embeddings have {after} rows, formerly {before}, and the tokenizer {where} knows none of the new"
        )
        if after % _PADDING:
            raise PlanError(problem, hint="name the tokenizer of the training: --tokenizer DIR")
        return chosen, [f"{problem}: they are padding, or name the tokenizer of the training with --tokenizer"]
    return chosen, []
