"""plan.peft_check: our rules agree with PEFT, and an adapter that PEFT would not load stops the run at its start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support import architectures
from support.families import FAMILIES, UNLIKE
from support.marks import mostly_wide, wide

from milora_init.errors import PlanError
from milora_init.model import meta_model
from milora_init.options import InitOptions
from milora_init.plan import peft_check
from milora_init.plan.peft_check import expected_by_peft, expected_by_rules, require_loadable
from milora_init.plan.plan import Plan, make_plan
from milora_init.run.initialize import run_plan

Built = Callable[..., Path]


def plan(folder: Path, out: Path | str = "out", **options: Any) -> Plan:
    return make_plan(InitOptions(model=str(folder), out=str(out), **{"rank": 4, **options}), folder)


@pytest.mark.parametrize("rslora", [wide(False), True])
@pytest.mark.parametrize("name", mostly_wide(FAMILIES, *UNLIKE))
def test_our_rules_expect_the_same_tensors_and_scales_as_peft(name: str, rslora: bool, tmp_path: Path) -> None:
    made = plan(
        architectures.save(tmp_path, FAMILIES[name], "bfloat16"),
        target=FAMILIES[name].targets,
        rslora=rslora,
        rank_pattern={FAMILIES[name].targets[-1]: 3},
        alpha_pattern={FAMILIES[name].targets[0]: 5},
    )
    planned = {key: info.shape for key, info in made.adapter_header.tensors.items()}
    config = made.adapter_config
    model = meta_model.build_meta_model(tmp_path, made.checkpoint.config)
    shapes, scales = expected_by_rules(model, config)  # first, because PEFT changes the model
    assert (shapes, scales) == expected_by_peft(model, config, planned)
    assert shapes == planned
    assert scales == pytest.approx({w.key: w.scale for w in made.weights}, rel=1e-12)


def test_it_returns_what_the_plan_was_compared_with(checkpoint: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(checkpoint("llama"))
    assert require_loadable(made) == f"PEFT {metadata.version('peft')}"

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert require_loadable(made) == "the rules of PEFT 0.19.1"


def test_a_peft_too_old_for_experts_is_not_used_for_them(
    checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.19.0")
    mixtral = architectures.save(tmp_path, FAMILIES["mixtral"], "bfloat16")
    assert require_loadable(plan(mixtral, target=("experts",))) == "the rules of PEFT 0.19.1"
    assert require_loadable(plan(checkpoint("llama"))) == "PEFT 0.19.0"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another module": ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "o_proj"]}, "would not be loaded"),
    "a module less": ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"]}, "would not be loaded"),
    "another rank": ({"r": 5}, "and should be"),
    "another alpha": ({"lora_alpha": 5}, "would be scaled by"),
    "another scale": ({"use_rslora": True}, "would be scaled by"),
}


@pytest.mark.parametrize("reference", ["peft", "rules"])
@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_peft_would_load_differently_stops_the_run_and_leaves_no_output(
    name: str, reference: str, checkpoint: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = WRONG[name]
    made = plan(checkpoint("llama"), tmp_path / "out", device=("cpu",))
    made = dataclasses.replace(made, adapter_config={**made.adapter_config, **changes})
    if reference == "rules":
        monkeypatch.setattr(peft_check, "_usable_peft_version", lambda **_: "")
    with pytest.raises(PlanError, match=message):
        run_plan(made)
    assert not (tmp_path / "out").exists()
