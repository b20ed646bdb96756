"""What was asked for: InitOptions, and the recipes that fill it.

A recipe is a YAML file whose keys are the long options of the command line (`rank`, `target`, `task-type`, ...).
The named ones live in configs/ and travel inside the wheel. Precedence: argument > recipe > default.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from milora_init.errors import UsageError
from milora_init.modes import MODES, Mode

DEFAULT_RECIPE = "llm-adapters"
DTYPES = ("auto", "float32", "bfloat16", "float16")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_LIMIT = 2**63  # of every whole number


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """One request, checked when it is made.

    Args:
        model: A local folder or a Hub id.
        out: The output folder. It is written into adapter_config.json as given, so it should be the path from
            which training will load it.
        rank: Number of singular triplets per weight.
        mode: Which ones: `min` (MiLoRA), `max` (PiSSA), `mid` or `random`.
        target: What to adapt, with PEFT's meaning: module suffixes, full module names, `all-linear`; and
            `re:PATTERN`, a regular expression that a module's full name must match from end to end.
        exclude: What to leave out of it, in the same language.
        alpha: `lora_alpha`; None means rank, which makes the scale 1. B and A are divided by the square root of
            the scale, so that scale * B @ A is the component whatever alpha is.
        rslora: Use the rank-stabilised scale alpha / sqrt(rank) (arXiv 2312.03732).
        dropout: `lora_dropout` for training.
        task_type: PEFT's task type; None derives it from the architecture.
        text_only: Make the adapter for the class that AutoModelForCausalLM builds of a model with towers, its language
            model alone, and not for the class that config.json names. For models of which it builds one.
        dtype: Of the residual weights; `auto` keeps the source's.
        device: `auto` (every visible GPU, else the CPU), `cpu`, `cuda` or `cuda:N`; several share the work.
        seed: For `random`, and for the solver's start vectors.
        rank_pattern, alpha_pattern: Ranks and alphas of their own for what a target names, in the language of
            `target`; of several that name a module the last one counts. Where no alpha is given at all, a rank of its
            own is its own alpha too.
        trust_remote_code: Run the code in the model's repository, if config.json names it.
        revision, cache_dir, token: As in huggingface_hub. The token is never written or printed.
        low_disk: Keep only a few of the source's shards at a time, where they come from the Hub; and of the output's,
            where it goes there.
        push_to_hub: The repository that the output goes to; `private` if it is made now.
        overwrite: Replace an earlier output of this program, finished or not.

    Raises:
        UsageError: A value out of its range.
    """

    model: str
    out: str
    rank: int = 64
    mode: Mode = "min"
    target: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    exclude: tuple[str, ...] = ()
    alpha: int | None = None
    rslora: bool = False
    dropout: float = 0.05
    task_type: str | None = None
    text_only: bool = False
    dtype: str = "auto"
    device: tuple[str, ...] = ("auto",)
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    trust_remote_code: bool = False
    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    low_disk: bool = False
    push_to_hub: str | None = None
    private: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("target", "exclude", "device"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UsageError(f"{name} is the string {value!r}", hint=f"give a list: {name}: [{value}]")
            _require(isinstance(value, (list, tuple)), f"{name} is {value!r}, expected a list")
            object.__setattr__(self, name, tuple(value))
        for name in ("model", "out", "revision", "cache_dir", "token", "push_to_hub"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
            _require(isinstance(getattr(self, name), str | None), f"{name} is not text", "quote it in the recipe")
            _require("\0" not in (getattr(self, name) or ""), f"{name} holds a NUL character", "write it without")
        object.__setattr__(self, "token", clean_token(self.token))
        if self.push_to_hub is not None:
            require_repository(self.push_to_hub)
        _require(bool(self.model), "--model is empty", "name a local folder or a Hub id")
        _require(bool(self.out), "--out is empty", "name the folder to write")
        _require(
            _is_int(self.rank) and 1 <= self.rank < _LIMIT,
            f"rank is {_short(self.rank)}, expected a whole number of at least 1 and below 2^63",
        )
        _require(self.mode in MODES, f"mode is {self.mode!r}", f"choose one of: {', '.join(MODES)}")
        _require(bool(self.target), "no target is named", "name at least one, e.g. --target q_proj")
        for name in (*self.target, *self.exclude):
            _require(isinstance(name, str) and bool(name), f"target {name!r} is not a module name")
        _require(
            self.alpha is None or (_is_int(self.alpha) and 1 <= self.alpha < _LIMIT),
            f"alpha is {_short(self.alpha)}, expected a whole number of at least 1 and below 2^63",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            ok = isinstance(pattern, Mapping) and all(
                isinstance(key, str) and bool(key) and _is_int(value) and 1 <= value < _LIMIT
                for key, value in pattern.items()
            )
            _require(ok, f"{name} is {_short(pattern)}", "map targets to whole numbers of at least 1: {down_proj: 128}")
        for name in ("rslora", "text_only", "trust_remote_code", "low_disk", "private"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {value!r}, expected true or false")
        _require(
            isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1,
            f"dropout is {_short(self.dropout)}, expected 0 <= dropout < 1",
        )
        _require(
            self.task_type is None or self.task_type in TASK_TYPES,
            f"task type is {self.task_type!r}",
            f"choose one of: {', '.join(TASK_TYPES)}",
        )
        _require(self.dtype in DTYPES, f"dtype is {self.dtype!r}", f"choose one of: {', '.join(DTYPES)}")
        _require(
            _is_int(self.seed) and 0 <= self.seed < _LIMIT, f"seed is {_short(self.seed)}, expected 0 <= seed < 2^63"
        )

    @property
    def lora_alpha(self) -> int:
        return self.rank if self.alpha is None else self.alpha

    @classmethod
    def from_recipe(cls, recipe: str = DEFAULT_RECIPE, /, **overrides: Any) -> InitOptions:
        """Options from a recipe, with keyword arguments laid over it.

        Args:
            recipe: A name in configs/ or the path of a YAML file.
            overrides: Fields of InitOptions; None means "as the recipe has it".

        Raises:
            UsageError: No such recipe, not a mapping, an unknown key, or a value out of its range.
        """
        values = read_recipe(recipe)
        values |= {key: value for key, value in overrides.items() if value is not None}
        missing = [name for name in ("model", "out") if name not in values]
        _require(not missing, f"no --{' and no --'.join(missing)} given", "milora-init --model MODEL --out FOLDER")
        return cls(**values)


def clean_token(token: str | None) -> str | None:
    """A Hub token without the line end that comes with a pasted secret. Raises UsageError, which does not name it."""
    token = token.strip() if token else None
    ok = token is None or (token.isascii() and token.isprintable() and " " not in token)
    _require(ok, "the Hub token has characters that no token has", "look at HF_TOKEN or --token, or `hf auth login`")
    return token


def require_repository(repo: str) -> None:
    """Raise UsageError for what is no full name of a repository to write to."""
    owner, _, name = repo.partition("/")
    _require(bool(owner and name) and "/" not in name, f"{repo!r} is no name of a repository", "name it org/name")


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in _configs().glob("*.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read a recipe into keyword arguments of InitOptions; see `InitOptions.from_recipe` for what it raises."""
    _require("\0" not in recipe, f"the recipe {recipe!r} holds a NUL character", "name another path")
    named = _configs() / f"{recipe}.yaml"
    path = named if named.parent == _configs() and named.is_file() else Path(recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"no recipe {recipe!r}",
            hint=f"name one of {', '.join(recipe_names())}, or the path of a YAML file",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"recipe {recipe} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"recipe {recipe} is not a mapping of options", hint="write lines like `rank: 64`")
    known = {f.name for f in dataclasses.fields(InitOptions)} - {"token", "overwrite"}
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0].replace('_', '-')}`?" if close else f"known keys: {_spelled(known)}"
            raise UsageError(f"recipe {recipe} has an unknown key `{key}`", hint=hint)
        if name in ("target", "exclude", "device") and isinstance(value, str):
            value = [value]
        options[name] = value
    return options


def _configs() -> Path:
    # In the wheel the recipes lie inside the package; in a checkout at the top level, where people look for them.
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def _spelled(names: set[str]) -> str:
    return ", ".join(sorted(name.replace("_", "-") for name in names))


def _short(value: object) -> str:
    """A value for a message, cut where it is long; some numbers are too long to be written out at all."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool, message: str, hint: str = "") -> None:
    if not ok:
        raise UsageError(message, hint=hint)
