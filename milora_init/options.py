"""The options of a run (`InitOptions`), and the recipes that fill them.

A recipe is a YAML file whose keys are the long options of the command line (`rank`, `target`, `task-type`, ...). The
recipes of the package are in configs/. An argument overrides the recipe, and the recipe overrides the default.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from milora_init.errors import UsageError
from milora_init.methods import DROPOUT, METHODS, MODES, Method, Mode, method_of_mode

DEFAULT_RECIPE = "llm-adapters"
DEFAULT_TARGET = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
OUTPUT_DTYPES = ("auto", "float32", "bfloat16", "float16")
BASES = ("dense", "mixed")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_LIMIT = 2**63  # every whole number must be below it
_AT_LEAST_1 = "expected a whole number of at least 1 and below 2^63"

# Names that PEFT and trainers use for our options. A recipe, the Python functions and the command line accept them.
SYNONYMS: Mapping[str, str] = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "targets": "target", "target_modules": "target", "lora_target": "target", "lora_target_modules": "target",
    "exclude_modules": "exclude", "output_dir": "out", "model_name_or_path": "model", "use_rslora": "rslora",
}  # fmt: skip
DTYPE_FLAGS: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_VALUE_SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "mode": {"milora": "min", "pissa": "max"},
    "dtype": {**DTYPE_FLAGS, "half": "float16", "float": "float32"},
}
_OF_LORA_CONFIG = (  # fields without an option of ours
    "bias", "peft_type", "inference_mode", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "use_dora",
    "layers_to_transform", "layers_pattern", "lora_bias", "base_model_name_or_path", "loftq_config",
)  # fmt: skip
_TARGET_SYNONYMS: Mapping[str, str] = {"all": "all-linear"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """The options of one run. They are checked when the object is made.

    Args:
        model: The original model: a local folder or a Hub id.
        out: The output folder. It is written into adapter_config.json as given, so it should be the path from
            which training will load it.
        rank: Number of singular triplets per weight.
        method: A name of `methods.METHODS`: which triplets, and what is made of them. None is the method of `mode`.
        mode: Which triplets, with MiLoRA's factors: `min` (MiLoRA), `max` (PiSSA), `mid` or `random`. None is the mode
            of `method`; without both, `min`.
        target: What to adapt, as in PEFT: module suffixes, full module names, `all-linear`; also `re:PATTERN`, a
            regular expression that must match a module's full name; and `kappa:0.2` or `energy:0.2`, which choose
            this share of the linear layers by what a scan of the model finds, see `run.scan.measured_targets`. None is
            the five linear layers of the MiLoRA paper, or `all-linear` for a model that lacks one of them.
        exclude: What not to adapt, in the same form.
        alpha: `lora_alpha`. None is the rank, which makes the scale 1. B and A are divided by the square root of
            the scale, so that scale * B @ A is the component for every alpha.
        rslora: Use the rank-stabilised scale alpha / sqrt(rank) (arXiv 2312.03732).
        dropout: `lora_dropout` for training. None is 0: see `methods.DROPOUT`.
        task_type: PEFT's task type. None derives it from the architecture.
        text_only: For a multimodal model: make the adapter for the text model that AutoModelForCausalLM builds, and
            not for the class that config.json names. Only for models of which it builds one.
        dtype: The dtype of the residual weights; `auto` keeps the model's. Not for a method that writes no base.
        nf4: For `pissa` and a base that QLoRA will quantise: make the base of numbers that NF4 has, and let the adapter
            make up for the rounding, in so many rounds (5 is a good choice). 0 for an ordinary base.
        base: What becomes of a quantised model: `dense` dequantises all of its weights, `mixed` only the adapted ones.
        device: `auto` (every visible GPU, else the CPU), `cpu`, `cuda` or `cuda:N`; several share the work.
        seed: For `random`, and for the solver's start vectors.
        rank_pattern, alpha_pattern: Other ranks and alphas for some targets, in the form of `target`. If several match
            a module, the last one counts. Without any alpha, the alpha of a module is its rank.
        trust_remote_code: Run the code in the model's repository, if config.json names it.
        revision, cache_dir, token: As in huggingface_hub. The token is never written or printed.
        low_disk: Keep only a few shards of a model from the Hub on the disk at a time; with `push_to_hub`, also of
            the output.
        push_to_hub: Push the output to this repository (`org/name`); `private` if it is created now.
        overwrite: Replace an earlier output of milora-init, finished or not.
        part: `I/N`: make the I-th of N parts of the output's files (from 1) and stop; the same request without `part`
            finishes. `auto` takes both numbers from torchrun, a Slurm array or SkyPilot.
        ray: Address of a Ray cluster, or `auto`, whose nodes make the files. They must see the model and the output,
            unless the model is on the Hub and `push_to_hub` is given.

    Raises:
        UsageError: A value out of its range.
    """

    model: str
    out: str
    rank: int = 64
    method: str | None = None
    mode: Mode | None = None
    target: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    alpha: int | None = None
    rslora: bool = False
    dropout: float | None = None
    task_type: str | None = None
    text_only: bool = False
    dtype: str = "auto"
    base: str = "dense"
    nf4: int = 0
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
    part: str | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_text()
        self._check_targets()
        self._check_numbers()
        for name in ("rslora", "text_only", "trust_remote_code", "low_disk", "private", "overwrite"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {_short(value)}, expected true or false", "give one of both")
        choices_of: Mapping[str, Iterable[str | None]] = {
            "method": (None, *METHODS), "mode": (None, *MODES), "dtype": OUTPUT_DTYPES, "base": BASES,
            "task_type": (None, *TASK_TYPES),
        }  # fmt: skip
        for name, choices in choices_of.items():
            value = getattr(self, name)
            known = [choice for choice in choices if choice is not None]
            ok = isinstance(value, str | None) and value in choices
            _require(ok, f"{name} is {_short(value)}", f"choose one of: {', '.join(known)}")
        self._check_method()
        self._check_part()

    def _normalise(self) -> None:
        """Convert paths to text and lists to tuples; replace synonyms of values."""
        for name in ("model", "out", "revision", "cache_dir", "token", "push_to_hub"):
            if isinstance(getattr(self, name), os.PathLike):
                self._set(name, os.fspath(getattr(self, name)))
        self._set("dtype", dtype_name(str(self.dtype)))
        self._set("mode", _VALUE_SYNONYMS["mode"].get(str(self.mode), self.mode))
        for name in ("target", "exclude", "device"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UsageError(f"{name} is the string {_short(value)}", hint=f"give a list: {name}: [{value}]")
            if value is not None or name != "target":
                is_list = isinstance(value, list | tuple)
                _require(is_list, f"{name} is {_short(value)}, expected a list", f"give a list: {name}: [...]")
                self._set(name, tuple(_TARGET_SYNONYMS.get(item, item) if name == "target" else item for item in value))
        self._set("token", clean_token(self.token))

    def _check_text(self) -> None:
        for name in ("model", "out", "revision", "cache_dir", "push_to_hub", "ray"):
            value = getattr(self, name)
            _require(isinstance(value, str | None), f"{name} is {_short(value)}, expected text", "quote it")
            _require("\0" not in (value or ""), f"{name} contains a NUL character", "write it without")
        _require(bool(self.model), "MODEL is empty", "name a local folder or a Hub id")
        _require(bool(self.out), "--out is empty", "name the folder to write")
        if self.push_to_hub is not None:
            require_repository(self.push_to_hub)

    def _check_method(self) -> None:
        method = self.effective_method
        agree = self.mode is None or method.mode == self.mode
        _require(agree, f"method {method.name} takes the `{method.mode}` triplets, not `{self.mode}`", "drop --mode")
        why = (
            f"nf4 is {self.nf4}, and the method is {method.name}: the correction puts what NF4 rounds away into the "
            "adapter, where it outweighs all but the largest directions"
        )
        _require(not self.nf4 or method.name == "pissa", why, "use --method pissa, or drop --nf4")
        if method.writes_base:
            return
        why = f"method {method.name} writes no base: the output is an adapter of the original model"
        _require(self.dtype == "auto", f"dtype is {self.dtype}, but {why}", "drop --dtype")
        _require(self.base == "dense", f"base is {self.base}, but {why}", "drop --base")
        _require(not self.low_disk, f"low_disk is set, but {why}", "drop --low-disk")

    def _check_part(self) -> None:
        if self.ray is not None:
            _require(bool(self.ray), "--ray is empty", "name the cluster: --ray auto or HOST:PORT")
            _require(self.part is None, "ray and part exclude each other", "drop one of them")
            why = "low_disk works on one machine, and ray on many"
            _require(not self.low_disk, f"low_disk and ray exclude each other: {why}", "drop one of them")
        if self.part is None:
            return
        hint = "for the first of four parts: --part 1/4"
        _require(isinstance(self.part, str), f"part is {_short(self.part)}, expected text", hint)
        if self.part == "auto":
            self._set("part", _part_of_environment())
        number, _, count = self.part.partition("/")
        digits = all(text.isascii() and text.isdigit() and len(text) <= 6 for text in (number, count))
        _require(
            digits and 1 <= int(number) <= int(count), f"part is {_short(self.part)}, not I/N from 1/N to N/N", hint
        )
        self._set("part", f"{int(number)}/{int(count)}")
        why = "other parts may be writing to the same folder"
        _require(not self.overwrite, f"overwrite and part exclude each other: {why}", "remove the old output first")

    def _check_targets(self) -> None:
        _require(self.target != (), "no target is named", "name at least one, e.g. --target q_proj")
        module_hint = "name a module, e.g. q_proj"
        for name in (*(self.target or ()), *self.exclude):
            _require(isinstance(name, str) and bool(name), f"target {_short(name)} is not a module name", module_hint)
            ok = measured_target(name) is None or name not in self.exclude
            _require(ok, f"exclude {name} is not a module name", module_hint)
        measured = next((name for name in self.target or () if measured_target(name)), None)
        why = f"target {measured} is chosen by a scan of the whole model, which low_disk does not keep"
        _require(not (measured and self.low_disk), why, "drop --low-disk, or name the modules")
        for option in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, option)
            ok = isinstance(pattern, Mapping) and all(
                isinstance(key, str) and bool(key) and _is_int(value) and 1 <= value < _LIMIT
                for key, value in pattern.items()
            )
            hint = "map targets to whole numbers of at least 1: {down_proj: 128}"
            _require(ok, f"{option} is {_short(pattern)}", hint)

    def _check_numbers(self) -> None:
        rank_ok = _is_int(self.rank) and 1 <= self.rank < _LIMIT
        _require(rank_ok, f"rank is {_short(self.rank)}, {_AT_LEAST_1}", "for example rank 64")
        alpha_ok = self.alpha is None or (_is_int(self.alpha) and 1 <= self.alpha < _LIMIT)
        _require(alpha_ok, f"alpha is {_short(self.alpha)}, {_AT_LEAST_1}", "drop it: then it is the rank")
        dropout_ok = self.dropout is None or (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1)
        _require(dropout_ok, f"dropout is {_short(self.dropout)}, expected 0 <= dropout < 1", "for example 0.05")
        nf4_ok = _is_int(self.nf4) and 0 <= self.nf4 <= 100
        _require(nf4_ok, f"nf4 is {_short(self.nf4)}, expected a number of rounds from 0 to 100", "5 is a good choice")
        seed_ok = _is_int(self.seed) and 0 <= self.seed < _LIMIT
        _require(seed_ok, f"seed is {_short(self.seed)}, expected 0 <= seed < 2^63", "for example seed 0")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def part_numbers(self) -> tuple[int, int] | None:
        """Number of the part, from 1, and the number of parts; None without `part`."""
        if self.part is None:
            return None
        number, _, count = self.part.partition("/")
        return int(number), int(count)

    @property
    def lora_alpha(self) -> int:
        return self.rank if self.alpha is None else self.alpha

    @property
    def lora_dropout(self) -> float:
        return DROPOUT if self.dropout is None else self.dropout

    @property
    def effective_method(self) -> Method:
        """The method of `method` or `mode`."""
        return METHODS[self.method] if self.method is not None else method_of_mode(self.mode or "min")

    @classmethod
    def from_recipe(cls, recipe: str | None = None, /, **overrides: Any) -> InitOptions:
        """Options from a recipe and keyword arguments, which override it.

        Args:
            recipe: A name in configs/ or the path of a YAML file. None is the default recipe, whose targets are used
                only for models that have all of them; see `target`.
            overrides: Fields of InitOptions, or their `SYNONYMS`; None means the recipe's value.

        Raises:
            UsageError: No such recipe, not a mapping, an unknown key, or a value out of its range.
        """
        values = read_recipe(DEFAULT_RECIPE if recipe is None else recipe)
        of_recipe = dict(values)
        if recipe is None:
            del values["target"]
        given = {key: value for key, value in overrides.items() if value is not None}
        given = canonical(given, "", known=_OPTIONS)
        if {"method", "mode"} & given.keys():
            if _method_name(given) != _method_name(values) and (recipe is None or recipe in recipe_names()):
                values.pop("dropout", None)  # the package chose it for the recipe's method
            values.pop("method", None)
            values.pop("mode", None)
        values |= given
        missing = [name for name in ("model", "out") if name not in values]
        _require(not missing, f"no --{' and no --'.join(missing)} given", "milora-init MODEL --out DIR")
        try:
            return cls(**values)
        except UsageError as error:
            try:
                cls(**{"model": values["model"], "out": values["out"]} | of_recipe)
            except UsageError as of_file:
                if str(of_file) == str(error):
                    raise UsageError(f"recipe {recipe}: {error}", hint=error.hint) from None
            raise


_OPTIONS = frozenset(f.name for f in dataclasses.fields(InitOptions))
_RECIPE_KEYS = _OPTIONS - {"token", "overwrite", "part", "ray"}


# What launchers set: the number of a process, the first of these numbers, the step between them, and their count.
_LAUNCHERS = (
    ("RANK", None, None, "WORLD_SIZE"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"),
    ("SKYPILOT_NODE_RANK", None, None, "SKYPILOT_NUM_NODES"),
)


def _part_of_environment() -> str:
    """The part that a launcher has given to this process. Raises UsageError."""
    hint = "give the numbers: --part 1/4"
    for name, first, step, count in _LAUNCHERS:
        if name in os.environ and count in os.environ:
            try:
                values = [int(os.environ[key]) for key in (name, count)]
                start, stride = int(os.environ.get(first or "", 0)), int(os.environ.get(step or "", 1))
                number = (values[0] - start) // max(stride, 1) + 1
            except ValueError:
                number, values = 0, [0, 0]
            if not 1 <= number <= values[1]:
                what = f"{name} is {_short(os.environ[name])} and {count} is {_short(os.environ[count])}"
                raise UsageError(f"--part auto: {what}", hint=hint)
            return f"{number}/{values[1]}"
    for name, _, _, count in _LAUNCHERS:
        for there, absent in ((name, count), (count, name)):
            if there in os.environ:
                raise UsageError(f"--part auto: {there} is set and {absent} is not", hint=hint)
    known = ", ".join(f"{name} and {count}" for name, _, _, count in _LAUNCHERS)
    raise UsageError(f"--part auto: none of these is set: {known}", hint=hint)


def canonical(values: Mapping[Any, Any], where: str, *, known: Iterable[str]) -> dict[str, Any]:
    """Options by their own names: `-` becomes `_`, and `SYNONYMS` are replaced.

    Args:
        values: Options by any of their names.
        where: Names the recipe in messages; empty for arguments.
        known: The options that are allowed.

    Raises:
        UsageError: An unknown name, or two names for one option.
    """
    known = sorted(known)
    found: dict[str, Any] = {}
    for key, value in values.items():
        word, name = str(key).replace("-", "_"), _option_name(key)
        if word in DTYPE_FLAGS:
            if value is not True:
                continue
            value = DTYPE_FLAGS[word]
        if name not in known:
            what = f"{where}unknown key `{key}`" if where else f"no option `{key}`"
            if word in _OF_LORA_CONFIG:
                raise UsageError(what, hint="it is a field of PEFT's LoraConfig that milora-init does not set: drop it")
            if where and name in _OPTIONS:
                raise UsageError(what, hint=f"give it on the command line: --{_dashed(name)}")
            close = get_close_matches(name, [*known, *SYNONYMS], n=1)
            spelled = _dashed if where else str  # arguments of Python have underscores, as the fields do
            hint = f"did you mean `{spelled(close[0])}`?" if close else f"known keys: {', '.join(map(spelled, known))}"
            raise UsageError(what, hint=hint)
        if name in found:
            other = next(k for k in values if k != key and _option_name(k) == name)
            raise UsageError(f"{where}`{other}` and `{key}` are two names of one option", hint="keep one of them")
        if name in ("target", "exclude", "device") and isinstance(value, str):
            value = split_names(value)
        found[name] = value
    return found


def _option_name(key: object) -> str:
    """The name of the option that a key of a recipe, or a keyword, stands for."""
    word = str(key).replace("-", "_")
    return "dtype" if word in DTYPE_FLAGS else SYNONYMS.get(word, word)


def dtype_name(given: str) -> str:
    """A dtype by torch's name: `bf16`, `torch.bfloat16` and `bfloat16` are one. What is not known is returned."""
    value = given.removeprefix("torch.")
    return _VALUE_SYNONYMS["dtype"].get(value, value if value in OUTPUT_DTYPES else given)


def split_names(text: str) -> list[str]:
    """Names that are separated by commas; a `re:PATTERN` is one name, because patterns contain commas."""
    return [text] if text.startswith("re:") else [name.strip() for name in text.split(",")]


def measured_target(target: str) -> tuple[Literal["kappa", "energy"], float] | None:
    """The figure and the share of a target that chooses by a figure: `kappa:0.2`; None for any other target.

    Raises:
        UsageError: The share is no number above 0 and at most 1.
    """
    figure, colon, text = target.partition(":")
    if not colon or figure not in ("kappa", "energy"):
        return None
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    _require(0 < share <= 1, f"target {_short(target)} has no share of the weights", f"for example {figure}:0.2")
    return ("kappa" if figure == "kappa" else "energy"), share


def require_ranks(ranks: Sequence[object]) -> tuple[int, ...]:
    """The ranks of a scan, ascending. Raises UsageError unless there is one, and all are whole numbers above 0."""
    _require(bool(ranks), "no rank is named", "for example --rank 64")
    found = []
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < _LIMIT:
            raise UsageError(f"rank is {_short(rank)}, {_AT_LEAST_1}", hint="for example rank 64")
        found.append(rank)
    return tuple(sorted(set(found)))


def clean_token(token: str | None) -> str | None:
    """A Hub token without the line end of a pasted secret. Raises UsageError, whose message does not show it."""
    _require(isinstance(token, str | None), "the Hub token is not text", "give it as text, or run `hf auth login`")
    token = token.strip() if token else None
    ok = token is None or (token.isascii() and token.isprintable() and " " not in token)
    _require(ok, "the Hub token has characters that no token has", "check HF_TOKEN or --token, or run `hf auth login`")
    return token


def local_path(given: str) -> Path:
    """The path that a user gave, whose first `~` is a home directory. Raises UsageError if that user is not known."""
    if not given.startswith("~"):  # `./~x` is a folder with this name
        return Path(given).absolute() if given.startswith("./~") else Path(given)
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UsageError(f"{given}: ~ names a user that is not known", hint="write the path without ~") from None


def require_repository(repo: str) -> None:
    """Raise UsageError unless this is the full name of a repository, `org/name`."""
    owner, _, name = repo.partition("/")
    _require(bool(owner and name) and "/" not in name, f"{repo!r} is not the name of a repository", "name it org/name")


def recipe_names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in _configs().glob("*.yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML text of a recipe, by its name in configs/ or its path. Raises UsageError if there is none."""
    _require("\0" not in recipe, f"the recipe {recipe!r} contains a NUL character", "name another path")
    named = _configs() / f"{recipe}.yaml"
    path = named if named.parent == _configs() and named.is_file() else Path(recipe)
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        hint = f"name one of {', '.join(recipe_names())}, or the path of a YAML file"
        what = f"recipe {recipe}: no such file" if path.suffix in (".yaml", ".yml") else f"no recipe {recipe!r}"
        raise UsageError(what, hint=hint) from None
    except ValueError as error:
        raise UsageError(f"recipe {recipe} is not text: {error}", hint="save it as UTF-8") from None


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read a recipe into keyword arguments of InitOptions; see `InitOptions.from_recipe` for its errors."""
    text = recipe_text(recipe)
    try:
        values = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"recipe {recipe} is not YAML: {' '.join(str(error).split())}"
        raise UsageError(message, hint="write lines like `rank: 64`, and patterns in single quotes") from None
    if not isinstance(values, dict):
        raise UsageError(f"recipe {recipe} is not a mapping of options", hint="write lines like `rank: 64`")
    options = canonical(values, f"recipe {recipe}: ", known=_RECIPE_KEYS)
    _require(options.get("target", ()) is not None, f"recipe {recipe}: target is empty", "name at least one target")
    return options


class _UniqueKeys(yaml.SafeLoader):
    """Loads a mapping only if no key stands twice in it: YAML forbids that, and PyYAML keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def _method_name(values: Mapping[str, Any]) -> str:
    """The method that a recipe or arguments ask for. A wrong name is returned as it is."""
    mode = str(values.get("mode") or "min")
    mode = _VALUE_SYNONYMS["mode"].get(mode, mode)
    return str(values.get("method") or (method_of_mode(mode).name if mode in MODES else mode))


def _configs() -> Path:
    # In the wheel the recipes are inside the package; in a checkout they are at the top level.
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _short(value: object) -> str:
    """A value for a message, cut off if it is long; Python cannot even write out some numbers."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(ok: bool, message: str, hint: str) -> None:
    if not ok:
        raise UsageError(message, hint=hint)
