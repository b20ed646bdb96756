"""options: every value is checked when the options are made, and a recipe with an unknown key is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from milora_init.errors import UsageError
from milora_init.methods import METHODS
from milora_init.options import DEFAULT_RECIPE, DEFAULT_TARGET, InitOptions, local_path, read_recipe, recipe_names

CONFIGS = Path(__file__).parent.parent / "configs"
Q_K_V_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def request(**values: Any) -> InitOptions:
    return InitOptions(**{"model": "m", "out": "o", **values})


def test_every_recipe_in_configs_is_found_by_its_name() -> None:
    assert recipe_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_recipe_sets_the_values_of_its_file(name: str) -> None:
    made = InitOptions.from_recipe(name, model="m", out="o")
    for key, value in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).items():
        found = getattr(made, key.replace("-", "_"))
        assert found == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize(
    ("name", "rank", "dropout"),
    [("commonsense", 32, 0.05), ("math", 64, 0.05), ("instruction", 32, 0.05), ("llm-adapters", 64, 0.0)],
)
def test_the_recipes_have_the_settings_of_the_paper(name: str, rank: int, dropout: float) -> None:
    """MiLoRA paper (NAACL 2025), tables 10 to 12: five linears, alpha = r."""
    made = InitOptions.from_recipe(name, model="m", out="o")
    assert (made.rank, made.lora_dropout, made.effective_method.mode, made.lora_alpha) == (rank, dropout, "min", rank)
    assert made.target == Q_K_V_UP_DOWN


def test_the_qlora_recipe_targets_all_seven_linears() -> None:
    made = InitOptions.from_recipe("qlora", model="m", out="o")
    assert made.target == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert made.dropout == 0.1


def test_the_defaults_of_the_class_are_the_default_recipe() -> None:
    assert InitOptions.from_recipe(model="m", out="o") == request()
    named = InitOptions.from_recipe(DEFAULT_RECIPE, model="m", out="o")
    assert named == dataclasses.replace(request(), target=DEFAULT_TARGET)


def test_arguments_override_the_recipe_and_the_recipe_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("rank: 8\nalpha: 32\ntask-type: SEQ_CLS\ntarget: fc\n")
    made = InitOptions.from_recipe(str(path), model="m", out="o", rank=16, alpha=None)
    assert (made.rank, made.alpha, made.task_type, made.target, made.seed) == (16, 32, "SEQ_CLS", ("fc",), 0)


@pytest.mark.parametrize(
    ("key", "meant"), [("ranks", "rank"), ("tagret", "target"), ("task_typ", "task-type"), ("drop-out", "dropout")]
)
def test_an_unknown_key_names_the_closest(key: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{key}: 1\n")
    with pytest.raises(UsageError, match=f"unknown key `{key}`") as caught:
        read_recipe(str(path))
    assert caught.value.hint == f"did you mean `{meant}`?"
    assert caught.value.exit_code == 2


def test_an_unknown_key_without_a_close_match_lists_all_keys(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("xyzzy: 1\n")
    with pytest.raises(UsageError) as caught:
        read_recipe(str(path))
    known = {field.name.replace("_", "-") for field in dataclasses.fields(InitOptions)} - {
        "token",
        "overwrite",
        "part",
        "ray",
    }
    assert set(caught.value.hint.removeprefix("known keys: ").split(", ")) == known


@pytest.mark.parametrize("key", ["token", "overwrite"])
def test_a_recipe_may_not_set_token_or_overwrite(key: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"{key}: true\n")
    with pytest.raises(UsageError, match="unknown key"):
        read_recipe(str(path))


@pytest.mark.parametrize("content", ["- rank\n", "7\n", "", "rank: [\n", "a: b: c\n"])
def test_a_recipe_that_is_no_mapping_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=str(path)):
        read_recipe(str(path))


@pytest.mark.parametrize("name", ["absent", "../pyproject", "../configs/qlora"])
def test_an_unknown_recipe_lists_the_known_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no recipe '{name}'") as caught:
        read_recipe(name)
    assert all(recipe in caught.value.hint for recipe in recipe_names())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""), ("out", ""),
        ("rank", 0), ("rank", -4), ("rank", 1.5), ("rank", True), ("rank", "8"), ("rank", None),
        ("mode", "minor"), ("mode", "MIN"), ("method", "min"), ("method", 1), ("method", ["milora"]),
        ("target", ()), ("target", ("",)), ("target", "q_proj"), ("target", (1,)), ("exclude", ("",)),
        ("alpha", 0), ("alpha", -1), ("alpha", 1.5), ("alpha", True),
        ("rslora", 1), ("rslora", "yes"), ("text_only", 1),
        ("dropout", 1), ("dropout", -0.1), ("dropout", math.nan), ("dropout", "0.1"),
        ("task_type", "causal"), ("dtype", "float64"),
        ("seed", -1), ("seed", 2**63), ("seed", 0.5),
    ],
)  # fmt: skip
def test_an_invalid_value_is_a_usage_error_that_shows_it(field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        request(**{field: value})
    shown = value if not isinstance(value, tuple) or not value else value[0]
    assert repr(shown) in caught.value.message or value in ("", ())  # an empty value has nothing to show
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("field", "value"), [("target", 5), ("target", None), ("device", 7), ("exclude", 1.5)])
def test_a_list_option_of_another_type_is_a_usage_error(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({field: value}))
    with pytest.raises(UsageError, match=field):
        InitOptions.from_recipe(str(path), model="m", out="o")


@pytest.mark.parametrize("field", ["model", "out", "revision", "cache-dir"])
def test_a_number_instead_of_text_is_a_usage_error(field: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "out": "o"} | {field: 1234567}))
    with pytest.raises(UsageError, match=field.replace("-", "_")):
        InitOptions.from_recipe(str(path))


@pytest.mark.parametrize("field", ["model", "out"])
def test_options_without_a_model_or_an_output_are_refused(field: str) -> None:
    given = {"model": "m", "out": "o"}
    del given[field]
    with pytest.raises(UsageError, match=f"no --{field} given"):
        InitOptions.from_recipe(**given)


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    assert request(rank=8).lora_alpha == 8
    assert request(rank=8, alpha=16).lora_alpha == 16


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], {"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": True}, {"": 4}, {3: 4}, "q"])
def test_a_pattern_that_maps_no_targets_to_whole_numbers_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        request(**{name: value})


def test_options_are_frozen_and_hide_the_token() -> None:
    made = request(token="hf_secret")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rank = 3  # type: ignore[misc]
    assert "hf_secret" not in repr(made)


@pytest.mark.parametrize("name", ["rank", "alpha", "seed"])
def test_a_number_that_is_too_large_is_refused(name: str) -> None:
    for value in (2**63, 10**400, 10**5000):
        with pytest.raises(UsageError, match=f"{name} is ") as caught:
            InitOptions(model="m", out="o", **{name: value})  # type: ignore[arg-type]
        assert len(caught.value.message) < 400


def test_a_wrong_value_names_the_recipe_only_if_it_is_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rank: 0\n")
    with pytest.raises(UsageError, match=r"^recipe .*r\.yaml: rank is 0"):
        InitOptions.from_recipe(str(recipe), model="m", out="o")
    with pytest.raises(UsageError, match=r"^dtype is 'int8'"):
        InitOptions.from_recipe(str(recipe), model="m", out="o", rank=4, dtype="int8")
    assert InitOptions.from_recipe(str(recipe), model="m", out="o", rank=4).rank == 4


def test_a_recipe_with_a_number_that_yaml_cannot_read_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for content in (f"alpha: {'9' * 5000}", "[" * 5000, "seed: 2024-99-99"):
        recipe.write_text(content)
        with pytest.raises(UsageError, match="is not YAML"):
            InitOptions.from_recipe(str(recipe), model="m", out="o")


@pytest.mark.parametrize("content", ["rank: 8\nrank: 16", "rank_pattern: {q_proj: 8, q_proj: 16}"])
def test_a_key_that_stands_twice_in_a_recipe_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UsageError, match="stands twice"):
        InitOptions.from_recipe(str(tmp_path / "r.yaml"), model="m", out="o")


@pytest.mark.parametrize("name", ["model", "out", "revision", "cache_dir"])
def test_a_nul_character_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} contains a NUL"):
        InitOptions.from_recipe(**{"model": "m", "out": "o", name: "a\0b"})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_decides_triplets_factors_and_dropout(name: str) -> None:
    made = request(method=name)
    assert (made.effective_method.name, made.lora_dropout) == (name, 0.0)
    assert made == request(method=name, mode=None)
    assert request(method=name, mode=made.effective_method.mode).effective_method is made.effective_method
    assert request(method=name, dropout=0.1).lora_dropout == 0.1


def test_a_mode_alone_has_the_factors_of_milora() -> None:
    assert [request(mode=mode).effective_method.name for mode in ("min", "max", "mid", "random")] == [
        "milora", "pissa", "mid", "random",
    ]  # fmt: skip
    assert request(mode="pissa").effective_method.name == "pissa"  # the reference's words
    assert request().effective_method.name == "milora"


def test_a_mode_that_contradicts_the_method_is_refused() -> None:
    with pytest.raises(UsageError, match="method rlmo takes the `min` triplets, not `max`"):
        request(method="rlmo", mode="max")


@pytest.mark.parametrize("name", ["rlmo", "rlpo", "mica"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"low_disk": True}])
def test_options_of_a_base_are_refused_where_none_is_written(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"method {name} writes no base"):
        request(method=name, **options)


def test_an_argument_replaces_the_method_of_a_recipe_and_its_dropout(tmp_path: Path) -> None:
    def made(recipe: str, **options: Any) -> tuple[str, float]:
        found = InitOptions.from_recipe(recipe, model="m", out="o", **options)
        return found.effective_method.name, found.lora_dropout

    assert made("math", method="olora-tail") == ("olora-tail", 0.0)
    assert made("qlora", mode="max") == ("pissa", 0.0)
    assert made("qlora", mode="min") == ("milora", 0.1)
    assert made("qlora", mode="max", dropout=0.2) == ("pissa", 0.2)
    assert made("rl", mode="min") == ("milora", 0.0)
    own = tmp_path / "own.yaml"
    own.write_text("method: rlmo\ndropout: 0.1\n")
    assert made(str(own)) == ("rlmo", 0.1)
    assert made(str(own), method="mica") == ("mica", 0.1)  # its writer asked for it


def test_the_recipe_of_pissa_has_the_settings_of_its_authors() -> None:
    made = InitOptions.from_recipe("pissa", model="m", out="o")
    assert (made.effective_method.name, made.rank, made.lora_alpha, made.lora_dropout) == ("pissa", 128, 128, 0.0)


def test_the_rl_recipe_writes_no_base_and_has_no_dropout() -> None:
    made = InitOptions.from_recipe("rl", model="m", out="o")
    assert (made.effective_method.name, made.rank, made.lora_alpha, made.lora_dropout) == ("rlmo", 16, 32, 0.0)
    assert made.target
    assert len(made.target) == 7


@pytest.mark.parametrize("key", ["bias", "modules_to_save", "use_dora"])
def test_a_field_of_peft_s_config_without_an_option_is_explained(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        InitOptions.from_recipe(None, model="m", out="o", **{key: "none"})
    assert "LoraConfig" in caught.value.hint


def test_only_a_first_tilde_is_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/x") == Path("/home/me/x")
    assert local_path("./~x") == tmp_path / "~x"
    assert local_path("a/~x") == Path("a/~x")
