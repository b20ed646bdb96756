"""report: warnings, tables and loading lines are computed from the manifest."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from milora_init.accuracy import Certificate, Rounding
from milora_init.hub.model_card import card_text, step_summary
from milora_init.manifest import Manifest, WeightRecord
from milora_init.report import (
    LEAK_LIMIT,
    duration,
    loading_lines,
    notes,
    percent,
    report_json,
    size,
    warnings,
    weight_groups,
)
from milora_init.untrusted import printable


def certificate(component_error: float | None) -> Certificate:
    return Certificate("svd", "small", 1e-15, 1e-15, 0.1, component_error, "all were computed")


def record(module: str = "model.layers.0.q_proj", **values: Any) -> WeightRecord:
    leak = values.pop("leak", 0.01)
    leak_if = values.pop("leak_if", {"bfloat16": leak, "float16": leak / 8, "float32": leak / 2**16})
    given: dict[str, Any] = {
        "module": module,
        "tensor": f"{module}.weight",
        "shape": (32, 32),
        "transposed": False,
        "row": None,
        "expert": None,
        "key": module,
        "source_dtype": "bfloat16",
        "dtype": "bfloat16",
        "rank": 4,
        "scale": 1.0,
        "s_first": 0.2,
        "s_last": 0.1,
        "s_max": 1.0,
        "energy": 0.25,
        "untrainable": 0,
        "certificate": certificate(1e-14),
        "rounding": Rounding(component=0.5, error=0.001, leak=leak, leak_if=leak_if),
        "device": "cpu",
        "elapsed_s": 1.5,
        "read_s": 0.25,
        "write_s": 0.5,
    }
    return WeightRecord(**{**given, **values})


def manifest(*weights: WeightRecord, **values: Any) -> Manifest:
    given: dict[str, Any] = {
        "source": {"model": "m", "revision": None, "architecture": "LlamaForCausalLM"},
        "out": "./out",
        "fingerprint": "f" * 64,
        "inputs": {},
        "versions": {},
        "adapter": {"task_type": "CAUSAL_LM"},
        "files": {"model.safetensors": 10},
        "notices": (),
        "weights": weights or (record(),),
        "elapsed_s": 3.0,
    }
    return Manifest(**{**given, **values})


def test_weights_of_one_name_and_shape_are_one_group() -> None:
    found = weight_groups([
        record("a.0.q_proj", energy=0.2, leak=0.01, certificate=certificate(1e-12), elapsed_s=1.0),
        record("a.0.up_proj", shape=(48, 32)),
        record("a.1.q_proj", energy=0.4, leak=0.03, certificate=certificate(1e-14), elapsed_s=2.5),
        record("b.0.q_proj", shape=(16, 32)),
    ])  # fmt: skip
    assert [(kind.suffix, kind.shape, kind.count) for kind in found] == [
        ("q_proj", (32, 32), 2),
        ("up_proj", (48, 32), 1),
        ("q_proj", (16, 32), 1),
    ]
    first = found[0]
    assert first.energy == pytest.approx(0.3)  # the mean
    assert (first.leak, first.certificate, first.elapsed_s) == (
        0.03,
        1e-12,
        3.5,
    )  # leak and certificate: the worst; time: the sum


def test_a_leak_is_never_a_warning_and_a_large_one_is_a_note() -> None:
    assert notes(manifest(record(leak=LEAK_LIMIT))) == []
    assert warnings(manifest(record(leak=0.9))) == []
    assert len(notes(manifest(record(leak=0.9)))) == 1


def test_a_note_says_what_the_leak_means_and_names_the_dtypes_that_make_it_smaller() -> None:
    (note,) = notes(manifest(record("a.q_proj", leak=0.2), record("b.q_proj", leak=0.48)))
    assert "leaves up to 48% of a component in the base (b.q_proj, and 1 more weight)" in note
    assert "does not change the training" in note
    assert "within 0.1% a weight" in note  # Rounding.error of the records
    assert "--dtype float16" in note
    assert "--dtype float32" in note
    assert "--dtype bfloat16" not in note


def test_only_a_dtype_that_is_enough_for_every_weight_is_advised() -> None:
    near = {"bfloat16": 0.4, "float16": 0.095, "float32": 1e-5}  # float16 is better, and hardly below the limit
    (note,) = notes(manifest(record(leak=0.4, leak_if=near)))
    assert "--dtype float16" not in note
    assert "--dtype float32 (0.001%)" in note
    half = {"bfloat16": 0.5, "float16": 0.2, "float32": 1e-5}
    (note,) = notes(manifest(record("a", leak=0.6), record("b", leak=0.5, leak_if=half)))
    assert "--dtype float16" not in note  # it is enough for the worst weight alone
    overflows = {"bfloat16": 0.01, "float16": None, "float32": 1e-5}
    (note,) = notes(manifest(record("a", leak=0.6), record("b", leak_if=overflows)))
    assert "--dtype float16" not in note  # the other weight would end the run


def test_a_dtype_that_overflows_or_is_no_better_is_not_suggested() -> None:
    leaks = {"bfloat16": 0.5, "float16": None, "float32": 1e-5}
    (note,) = notes(manifest(record(leak=0.5, leak_if=leaks)))
    assert "float16 (" not in note.replace("bfloat16 (", "")
    assert "--dtype float32" in note
    (note,) = notes(manifest(record(leak=0.5, leak_if={"bfloat16": 0.5, "float16": None, "float32": None})))
    assert "smaller with" not in note


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-24)])
def test_an_error_beyond_one_rounding_is_a_warning(dtype: str, limit: float) -> None:
    def rounded(error: float) -> Manifest:
        return manifest(record(dtype=dtype, rounding=Rounding(component=0.5, error=error, leak=0.0, leak_if={})))

    assert warnings(rounded(limit)) == []
    (warning,) = warnings(rounded(1.01 * limit))
    assert f"more than one rounding to {dtype}" in warning


@pytest.mark.parametrize(
    ("part", "text"),
    [(0, "0%"), (0.5, "50%"), (0.1216, "12%"), (0.0013, "0.13%"), (2.1e-6, "0.00021%"), (4e-8, "4e-06%")],
)
def test_a_share_is_always_in_percent(part: float, text: str) -> None:
    assert percent(part) == text


def test_untrainable_directions_are_counted() -> None:
    (warning,) = warnings(manifest(record("a"), record("b", untrainable=3), record("c", untrainable=1)))
    assert "4 directions of 2 weights" in warning
    assert "the first weight is b" in warning


def test_notices_of_the_plan_are_warnings() -> None:
    assert warnings(manifest(notices=("look here",))) == ["look here"]


def test_the_json_of_a_report_has_every_weight_and_what_follows_from_them() -> None:
    made = manifest(record(leak=0.3), inputs={"mode": "min", "rank": 4, "alpha": 4}, versions={"milora_init": "0.1.0"})
    content = json.loads(json.dumps(report_json(made), allow_nan=False))
    assert (content["schema"], content["command"], content["status"]) == (1, "report", "done")
    assert content["source"] == {"model": "m", "revision": None}
    assert content["warnings"] == warnings(made)
    assert content["notes"] == notes(made)
    assert content["load"] == loading_lines(made)
    assert (content["worst_leak"], content["weight_count"]) == (0.3, 1)
    assert content["weights"][0]["module"] == made.weights[0].module


HOSTILE = "x\n::error::y\x1b]0;t\x07\u202e\u2028\x85##[z]|`b` <img src=e>[l](http://e.x) *s* __u__ https://e.x www.e.x"


@pytest.mark.parametrize("field", ["model", "architecture", "module", "dtype", "notice", "out", "mode", "revision"])
def test_names_from_a_manifest_inject_no_markup_and_no_command(field: str) -> None:
    source = {"model": "m", "revision": "c" * 40, "architecture": "LlamaForCausalLM"}
    source |= {field: HOSTILE} if field in source else {}
    weight = record(leak=0.3, **{name: HOSTILE for name in ("module", "dtype") if name == field})
    made = manifest(
        weight,
        source=source,
        out=HOSTILE if field == "out" else "./out",
        notices=(HOSTILE,) if field == "notice" else (),
        inputs={"mode": "min", "rank": 4, "alpha": 4, "rslora": False},
        adapter={"task_type": None, "lora_dropout": 0.05},
        versions={"milora_init": "0.1.0"},
    )
    step = replace(made, inputs={**made.inputs, "mode": HOSTILE}) if field == "mode" else made
    for text in (step_summary(step), card_text(made, "me/x")):
        assert all(line == printable(line) or line.startswith("##") for line in text.split("\n"))
        prose = re.sub(r"```.*?```|`[^`\n]*`|\\.|(?<!\\)\[MiLoRA\]\(\S+\)", "", text, flags=re.DOTALL)
        for markup in ("<img", "[l](", "*s*", "__u__", "https://e.x", "http://e.x", " www.e.x"):
            assert markup not in prose, (markup, prose)
        rows = [line for line in text.split("\n") if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    ast.parse(loading_lines(made))


def test_an_architecture_that_is_no_identifier_is_not_imported() -> None:
    source = {"model": "m", "revision": None, "architecture": "X; import os"}
    assert "import os" not in loading_lines(manifest(source=source, adapter={"task_type": None}))


@pytest.mark.parametrize(
    "out", ["./out", "/a b/ü", 'quo"te', "back\\slash", "it's", "a\u2028b\u202e\x1b", "\U000e0001"]
)
def test_the_loading_lines_are_python_that_names_the_folder(out: str) -> None:
    tree = ast.parse(loading_lines(replace(manifest(), out=out)))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert texts.count(out) == 2


def test_the_loading_lines_of_a_base_for_qlora_quantise_it() -> None:
    lines = loading_lines(manifest(inputs={"nf4": 5}))
    ast.parse(lines)
    assert 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")' in lines
    assert "quantization_config=nf4" in lines


@pytest.mark.parametrize(
    ("task", "architecture", "cls"),
    [("CAUSAL_LM", "LlamaForCausalLM", "AutoModelForCausalLM"), (None, "BertModel", "BertModel")],
)
def test_the_loading_lines_name_the_class(task: str | None, architecture: str, cls: str) -> None:
    source = {"model": "m", "revision": None, "architecture": architecture}
    made = manifest(source=source, adapter={"task_type": task})
    assert f"from transformers import {cls}\n" in loading_lines(made)
    assert f"base = {cls}.from_pretrained(" in loading_lines(made)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (13.5e9, "13.5 GB"), (2.69e9, "2.7 GB"), (3.2e12, "3.2 TB")],
)
def test_sizes_are_printed_with_a_unit(size_bytes: float, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("elapsed_s", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"),
     (3725, "1 h 02 min")],
)  # fmt: skip
def test_durations_are_printed_with_a_unit(elapsed_s: float, text: str) -> None:
    assert duration(elapsed_s) == text
