"""The generated parts of the pages are those of the code, the picture that of its script; all links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import draw_flow
import pytest
import support_table
import write_docs
import yaml
from support.families import FAMILIES

from milora_init import errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == write_docs.pages()[page], "run scripts/write_docs.py"


def test_every_generated_part_is_in_a_page() -> None:
    used = {name for page in PAGES for _, name, _ in write_docs.PART.findall(page.read_text(encoding="utf-8"))}
    assert used == write_docs.PARTS.keys()


def test_the_table_of_models_is_that_of_the_tested_families() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == support_table.with_table(page, support_table.table(FAMILIES))


def test_the_picture_is_up_to_date_and_stands_alone() -> None:
    picture = draw_flow.PICTURE.read_text(encoding="utf-8")
    assert picture == draw_flow.svg(), "run scripts/draw_flow.py"
    ElementTree.fromstring(picture)
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme: dark" in picture


def test_links_between_pages_lead_to_files_and_headings() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
                assert anchor in [_anchor(heading) for heading in headings], f"{page.name}: {target}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    text = str(nav)
    assert [page.name for page in PAGES[1:] if f"'{page.name}'" not in text] == []


def test_every_class_of_errors_has_a_row() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    names = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_the_quoted_messages_are_those_of_the_code() -> None:
    """Each part between the dots of a message in the table is in a string of the package."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "milora_init").rglob("*.py"))
    text = re.sub(r'"\s*\n\s*f?"', "", re.sub(r"{[^{}]*}", "...", code)).replace("no --", "no --out given")
    table = page.partition("## Common messages")[2].partition("##")[0]
    for cell in re.findall(r"^\| (`.*?`) \|", table, re.M):
        for message in re.findall(r"`(.*?)`", cell):
            for part in filter(None, (part.strip(" ().") for part in message.split("..."))):
                assert part in text, f"no message has: {part}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "SECURITY" / "index.html").exists()
