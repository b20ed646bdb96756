"""The page: one file that needs no network, small for every model, in which a name is never anything but text."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html.parser import HTMLParser

import pytest
from support import pages
from support.marks import wide

from milora_init.pictures.page import report_page, scan_page

MOST_BYTES = 5_000_000
VOID = {"meta", "link", "input"}
SELF_CLOSED = {"rect", "polyline", "path"}


class Page(HTMLParser):
    """Elements, attributes and text of a page. Raises AssertionError for elements that are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.parts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSED
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
        if "tr" in self._open and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


BOTH = {
    "report": lambda names: report_page(pages.manifest(names)),
    "scan": lambda names: scan_page(pages.scan(names)),
}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        wide("report", pages.LLAMA_405B),
        wide("scan", pages.LLAMA_405B),
        ("report", pages.EXPERTS),
        wide("report", pages.SHUFFLED),
        wide("scan", pages.FULL),
    ],
    ids=["405b-report", "405b-scan", "moe-report", "shuffled-report", "full-scan"],
)
def test_the_page_of_a_large_model_is_small_and_has_a_row_for_each_layer_and_module(
    kind: str, names: Sequence[str]
) -> None:
    text = BOTH[kind](names)
    assert len(text.encode()) < MOST_BYTES
    page = Page(text)
    assert page.rows[0][:4] == ["module", "layer", "weights", "shape"]
    assert sum(int(row[2]) for row in page.rows[1:]) == len(names)
    if names is pages.LLAMA_405B:
        assert len(page.rows) == 1 + 630
        assert page.rows[1][:4] == ["self_attn.q_proj", "0", "1", "4096 x 4096"]


@pytest.mark.parametrize("kind", BOTH)
def test_a_name_from_a_file_is_text_and_nothing_else(kind: str) -> None:
    names = [f"model.layers.0.{pages.HOSTILE}", *pages.LLAMA_405B[:3]]
    plain, hostile = Page(BOTH[kind](pages.LLAMA_405B[:4])), Page(BOTH[kind](names))
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, found in hostile.elements for name in found} == {n for _, f in plain.elements for n in f}
    text = BOTH[kind](names)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert any("<img src=x" in row[0] for row in hostile.rows)


def test_the_names_of_model_folder_and_remarks_are_escaped_too() -> None:
    manifest = pages.manifest(pages.LLAMA_405B[:4], model=pages.HOSTILE, out=pages.HOSTILE)
    scanned = pages.scan(pages.LLAMA_405B[:4], model=pages.HOSTILE)
    for text in (report_page(manifest), scan_page(scanned)):
        page = Page(text)
        assert not page.all("img")
        assert len(page.all("script")) == 1
        assert "&lt;img src=x" in text


@pytest.mark.parametrize("kind", BOTH)
def test_the_page_loads_nothing_and_its_policy_allows_only_its_own_style_and_script(kind: str) -> None:
    text = BOTH[kind](pages.LLAMA_405B[:4])
    page = Page(text)
    assert re.findall(r"(?:https?:)?//[a-z]", text) == []
    links = [value for _, found in page.elements for name, value in found.items() if name in ("src", "href")]
    assert links == ["data:,"]
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [name for _, found in page.elements for name in found if name.startswith("on") or name == "style"]


def test_every_map_has_a_button_and_the_pictures_have_names() -> None:
    page = Page(BOTH["report"](pages.LLAMA_405B))
    buttons = [found["id"].removeprefix("m-") for found in page.all("input")]
    maps = [found["id"].removeprefix("map-") for found in page.all("figure") if "id" in found]
    assert buttons == maps
    assert {"energy", "leak", "condition", "solver", "time"} <= set(maps)
    assert all(found["role"] == "img" and found["aria-label"] for found in page.all("svg"))
    assert len([found for found in page.all("input") if "checked" in found]) == 1


def test_a_spectrum_is_drawn_with_the_place_of_the_component() -> None:
    page = Page(BOTH["scan"](pages.LLAMA_405B[:10]))
    curves = [found["points"].split() for found in page.all("polyline")]
    assert len(curves) == 10
    assert all(len(points) == 48 for points in curves)
    for points in curves:
        heights = [float(point.partition(",")[2]) for point in points]
        assert heights == sorted(heights)  # downwards, as the singular values fall
    bands = [found for found in page.all("rect") if found.get("class") == "band"]
    assert len(bands) == 5
    frame = next(found for found in page.all("rect") if found.get("class") == "frame")
    width = 64 / 4096 * float(frame["width"])
    assert float(bands[0]["width"]) == pytest.approx(max(1.5, width), abs=0.1)


def test_a_model_of_one_weight_and_one_of_zeros_have_pages() -> None:
    for names in (["lm_head"], ["a.0.b"]):
        Page(report_page(pages.manifest(names)))
        Page(scan_page(pages.scan(names)))
