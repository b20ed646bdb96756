"""merge and convert of adapters with more than factors, compared with PEFT's own merge_and_unload."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, Family
from support.family_training import initialize_family
from support.marks import wide
from support.tiny_models import edit_json, tensors
from support.trained_beside import load, outputs, train, with_settings
from tokenizers import Tokenizer, models

from milora_init.api import convert, verify
from milora_init.errors import MiloraError, PlanError
from milora_init.export.merge import merge

NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
TIED: Mapping[str, Family] = {
    "tied llama": dataclasses.replace(FAMILIES["llama"], sizes={**FAMILIES["llama"].sizes, "tie_word_embeddings": True})
}
EMBEDDINGS = {"gpt2": "wte"}


def family_of(name: str) -> Family:
    return TIED.get(name) or FAMILIES[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(family) is a folder with `source` and `out`, made once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
            initialize_family(family_of(name), folders[name], "float32", alpha=6)
        return folders[name]

    return get


def require_equal_functions(
    name: str, folder: Path, trained: Path, tmp_path: Path, *, rows: int | None = None, auto: str = "",
    peft_merges: bool = True, **options: Any,
) -> None:  # fmt: skip
    """The trained pair, PEFT's merge of it, our merge, and our plain adapter on the original compute one function."""
    family = family_of(name)

    def pair(base: Path, adapter: Path) -> Any:
        torch.manual_seed(0)  # of the rows that a resize adds; an adapter brings its own
        return peft.PeftModel.from_pretrained(load(family, base, rows=rows, auto=auto, **options), str(adapter))

    model = pair(folder / "out", trained)
    expected = outputs(family, model)
    with model.disable_adapter():
        without = outputs(family, model)
    assert float((expected - without).norm() / expected.norm()) > 0.01, "the training changed nothing"
    if peft_merges:
        torch.testing.assert_close(outputs(family, model.merge_and_unload()), expected, **NEAR)
    merged = merge(str(folder / "out"), str(tmp_path / "merged"), adapter=str(trained))
    torch.testing.assert_close(outputs(family, load(family, tmp_path / "merged", auto=auto)), expected, **NEAR)
    assert verify(tmp_path / "merged", model=folder / "source").ok
    assert verify(folder / "out", adapter=trained).code == "trained_pair"
    convert(folder / "out", trained, tmp_path / "plain")
    torch.testing.assert_close(outputs(family, pair(folder / "source", tmp_path / "plain")), expected, **NEAR)
    assert merged.retrained or "use_dora" in (trained / "adapter_config.json").read_text()


SETTINGS: Mapping[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["EMB"]},
    "both": {"modules_to_save": ["EMB", "lm_head"]},
    "both, kept tied": {"modules_to_save": ["EMB", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens of embeddings": {"trainable_token_indices": {"EMB": [3, 5]}},
    "tokens of both": {"trainable_token_indices": {"EMB": [3, 5], "lm_head": [7]}},
    "a module": {"modules_to_save": ["NORM"]},
    "DoRA": {"use_dora": True},
}
NORMS = {"gpt2": "ln_f", "llava": "language_model.norm"}


def settings_of(name: str, what: str) -> dict[str, Any]:
    words = {"EMB": EMBEDDINGS.get(name, "embed_tokens"), "NORM": NORMS.get(name, "model.norm")}
    text = json.dumps(SETTINGS[what])
    for word, own in words.items():
        text = text.replace(f'"{word}"', f'"{own}"')
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize(
    ("name", "what"),
    [
        wide("llama", "both"), ("llama", "tokens of both"), ("llama", "a module"), ("llama", "DoRA"),
        wide("tied llama", "head"), wide("tied llama", "embeddings"), ("tied llama", "both, kept tied"),
        wide("tied llama", "tokens"), wide("tied llama", "tokens of both"),
        wide("gpt2", "both"), wide("gpt2", "DoRA"), ("mixtral", "both"), wide("qwen3_moe", "head"),
        wide("llava", "both"), wide("gemma3", "tokens of embeddings"),
    ],
)  # fmt: skip
def test_what_was_trained_beside_the_factors_is_merged_and_converted(
    name: str, what: str, made: Any, tmp_path: Path
) -> None:
    folder, family = made(name), family_of(name)
    model = with_settings(folder / "out", load(family, folder / "out"), **settings_of(name, what))
    trained = train(family, model, tmp_path / "trained")
    # PEFT 0.21.2 merges tokens of tied embeddings and head into one tensor, and so computes another function.
    peft_merges = (name, what) != ("tied llama", "tokens of both")
    require_equal_functions(name, folder, trained, tmp_path, peft_merges=peft_merges)


@pytest.mark.parametrize(("name", "bias"), [("gpt2", "all"), wide("qwen2", "lora_only")])
def test_biases_are_merged_and_converted(name: str, bias: str, made: Any, tmp_path: Path) -> None:
    folder, family = made(name), family_of(name)
    trained = train(
        family, with_settings(folder / "out", load(family, folder / "out"), bias=bias), tmp_path / "trained"
    )
    require_equal_functions(name, folder, trained, tmp_path)


def grown_tokenizer(folder: Path, tokens: int) -> Path:
    """A tokenizer of this many tokens, the last one for padding."""
    words = {f"w{number}": number for number in range(tokens - 1)} | {"<pad>": tokens - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    cls: Any = transformers.PreTrainedTokenizerFast
    cls(tokenizer_object=backend, unk_token="w0", pad_token="<pad>").save_pretrained(folder)
    return folder


def resized(name: str, folder: Path, to: Path, rows: int, **settings: Any) -> Path:
    """An adapter that was trained after the vocabulary was resized."""
    family = family_of(name)
    torch.manual_seed(1)
    model = with_settings(folder / "out", load(family, folder / "out", rows=rows), **settings)
    # Of models with a text_config PEFT 0.21.2 does not see that the vocabulary was resized.
    return train(family, model, to, save_embedding_layers=True if name == "gemma3" else "auto")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        wide("llama", {}),
        ("tied llama", {"trainable_token_indices": [61, 65]}),
        ("gpt2", {"modules_to_save": ["wte", "lm_head"]}),
        wide("gemma3", {}),
    ],
)
def test_a_resized_vocabulary_is_merged_with_the_tokenizer_that_grew(
    name: str, settings: dict[str, Any], made: Any, tmp_path: Path
) -> None:
    folder, rows = made(name), 67
    trained = resized(name, folder, tmp_path / "trained", rows, **settings)
    grown_tokenizer(trained, rows)
    require_equal_functions(name, folder, trained, tmp_path, rows=rows)
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(merged) == rows
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("text_config", config)["vocab_size"] == rows
    read = verify(tmp_path / "merged")
    assert read.ok, read.differences


@pytest.mark.parametrize(("tokens", "rows", "refused"), [(70, 67, True), (64, 67, True), (64, 72, False)])
def test_a_resized_vocabulary_with_another_tokenizer(
    tokens: int, rows: int, refused: bool, made: Any, tmp_path: Path
) -> None:
    """Too many tokens never fit; too few can only be padding to a multiple of 8."""
    folder = made("llama")
    trained = resized("llama", folder, tmp_path / "trained", rows)
    grown_tokenizer(tmp_path / "tokenizer", tokens)

    def merge_it() -> Any:
        return merge(str(folder / "out"), str(tmp_path / "merged"), adapter=str(trained),
                     tokenizer=str(tmp_path / "tokenizer"))  # fmt: skip

    if refused:
        with pytest.raises(PlanError, match="the embeddings have 67 rows") as caught:
            merge_it()
        assert "--tokenizer" in caught.value.hint
        assert not (tmp_path / "merged").exists()
    else:
        assert any("they are padding, or name the tokenizer" in line for line in merge_it().notices)


def test_a_vocabulary_that_was_resized_in_part_is_refused(made: Any, tmp_path: Path) -> None:
    folder = made("llama")
    trained = resized("llama", folder, tmp_path / "trained", 67)
    path = trained / "adapter_model.safetensors"
    stored = load_file(path)
    del stored["base_model.model.lm_head.weight"]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"resized only in part.*lm_head\.weight is not in the adapter"):
        merge(str(folder / "out"), str(tmp_path / "merged"), adapter=str(trained))
    assert not (tmp_path / "merged").exists()


def test_copies_of_embeddings_that_were_not_trained_are_recognised(made: Any, tmp_path: Path) -> None:
    folder, family = made("llama"), FAMILIES["llama"]
    model = with_settings(folder / "out", load(family, folder / "out"))
    trained = train(family, model, tmp_path / "trained", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(trained / "adapter_model.safetensors")
    require_equal_functions("llama", folder, trained, tmp_path)
    before, after = tensors(folder / "source"), tensors(tmp_path / "merged")
    assert all(torch.equal(before[name], after[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert all(".lora_" in key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert convert(folder / "out", trained, tmp_path / "served", for_="vllm").notices == ()


@pytest.mark.parametrize("name", ["llama", wide("gpt2")])
def test_a_new_classification_head_is_merged_and_converted(name: str, made: Any, tmp_path: Path) -> None:
    folder, family = made(name), family_of(name)
    auto = "AutoModelForSequenceClassification"
    options: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}
    base = load(family, folder / "out", auto=auto, **options)
    trained = train(family, with_settings(folder / "out", base, task_type="SEQ_CLS"), tmp_path / "trained")
    require_equal_functions(name, folder, trained, tmp_path, auto=auto, **options)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert len(config["id2label"]) == 3
    assert "lm_head.weight" not in tensors(tmp_path / "merged")
    cls = config["architectures"][0]
    merged = merge(str(folder / "out"), str(tmp_path / "again"), adapter=str(trained))
    assert f"it has a new head: load it with {cls}" in merged.notices
    (notice,) = convert(folder / "out", trained, tmp_path / "converted").notices
    assert f"load the original model with {cls}.from_pretrained(..., num_labels=3) first" in notice


def test_what_servers_cannot_read_is_refused_with_the_reason(made: Any, tmp_path: Path) -> None:
    folder, family = made("llama"), FAMILIES["llama"]
    for name, settings, reason in (
        ("dora", {"use_dora": True}, "vllm has no DoRA"),
        ("head", {"modules_to_save": ["lm_head"]}, "vllm reads factors only"),
    ):
        trained = train(
            family, with_settings(folder / "out", load(family, folder / "out"), **settings), tmp_path / name
        )
        with pytest.raises(PlanError, match=reason) as caught:
            convert(folder / "out", trained, tmp_path / "served", for_="vllm")
        assert "milora-init merge" in caught.value.hint
        assert not (tmp_path / "served").exists()


def unknown_tensor(trained: Path) -> None:
    path = trained / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 61)}, path)


def outside_the_model(trained: Path) -> None:
    path = trained / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.ones(2, 32)}, path)


def rows_too_high(trained: Path) -> None:
    path = trained / "adapter_model.safetensors"
    edit_json(trained / "adapter_config.json", trainable_token_indices=[3, 1000])
    delta = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
    save_file(load_file(path) | delta, path)


def rows_not_listed(trained: Path) -> None:
    rows_too_high(trained)
    edit_json(trained / "adapter_config.json", trainable_token_indices=[3])


def without_magnitudes(trained: Path) -> None:
    edit_json(trained / "adapter_config.json", use_dora=True)


def lora_bias(trained: Path) -> None:
    edit_json(trained / "adapter_config.json", lora_bias=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_tensor, "lora_embedding_A is not a factor of a linear layer"),
        (outside_the_model, "LlamaForCausalLM has no parameter score.weight"),
        (rows_too_high, "trainable_token_indices has row 1000"),
        (rows_not_listed, "has (2,) rows, and trainable_token_indices is [3]"),
        (without_magnitudes, "the lora_magnitude_vector of model.layers.0.mlp.down_proj is missing"),
        (lora_bias, "lora_bias = True"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_neither_command_knows_is_refused_and_nothing_is_written(
    damage: Callable[[Path], None], message: str, made: Any, tmp_path: Path
) -> None:
    folder, family = made("llama"), FAMILIES["llama"]
    trained = train(family, with_settings(folder / "out", load(family, folder / "out")), tmp_path / "trained", steps=1)
    damage(trained)
    for command in (
        lambda: merge(str(folder / "out"), str(tmp_path / "written"), adapter=str(trained)),
        lambda: convert(folder / "out", trained, tmp_path / "written"),
    ):
        with pytest.raises(MiloraError) as caught:
            command()
        assert message in caught.value.message
        assert caught.value.hint
        assert not (tmp_path / "written").exists()
