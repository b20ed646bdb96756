"""What a release needs: one version everywhere, and workflows that name files and inputs that exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import milora_init

ROOT = Path(__file__).parents[2]
RELEASE = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == milora_init.__version__
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        "Wang", "Li", "Wang", "Chen", "Chen",
    ]  # fmt: skip


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {milora_init.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_only_the_publishing_job_may_ask_for_an_identity() -> None:
    workflow = yaml.safe_load(RELEASE)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in workflow["jobs"]["build"]
    assert not any("run" in step for step in workflow["jobs"]["publish"]["steps"])


def test_the_targets_that_the_workflow_and_the_pages_name_are_in_the_makefile() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
    text = RELEASE + "".join(page.read_text(encoding="utf-8") for page in pages)
    assert set(re.findall(r"(?:`|run: )make ([a-z]+)", text)) <= set(targets)


def test_the_example_workflow_gives_inputs_that_the_action_has() -> None:
    action = yaml.safe_load((ROOT / ".github" / "actions" / "prepare-base" / "action.yml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "prepare-base.yml").read_text(encoding="utf-8"))
    (step,) = [step for step in workflow["jobs"]["prepare"]["steps"] if "prepare-base" in step.get("uses", "")]
    assert step["with"].keys() <= action["inputs"].keys()
