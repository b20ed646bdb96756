"""Pages in a real browser: Debian's chromium without a window, driven over its debugging pipe.

It is told to log to the console all that goes wrong, a refusal of the content security policy among it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import pages

from milora_init.pictures.page import report_page, scan_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
_PATIENCE_S = 60  # of a loaded machine
NAMES = [*pages.LLAMA_405B[:60], f"model.layers.3.{pages.HOSTILE}"]

# Functions of the page, for `Browser.evaluate`.
PROBE = """
const figure = () => [...document.querySelectorAll("#maps figure")].filter((f) => f.offsetHeight).map((f) => f.id);
const column = (n) => [...document.querySelectorAll("tbody tr")].map((r) => r.cells[n].dataset.v);
"""


class Browser:
    """A chromium process with one page, driven over `--remote-debugging-pipe`."""

    def __init__(self, folder: Path) -> None:
        self._profile = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def numbered() -> None:
            # chromium reads commands from descriptor 3 and writes answers to 4.
            read, write = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=numbered, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._session, self._received = 0, "", b""
        self.said: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Load a page in a window of this width."""
        self.said.clear()
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self._call("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=f"{{{PROBE}{code}}}", returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Image.Image:
        """What the window shows."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))
        return Image.open(path).convert("RGB")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._read], [], [], _PATIENCE_S)[0], "chromium says nothing"
            received = os.read(self._read, 1 << 20)
            assert received, "chromium ended"
            self._received += received
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.said.append(json.dumps(message["params"]))
        return message


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {"report": report_page(pages.manifest(NAMES)), "scan": scan_page(pages.scan(NAMES))}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("kind", ["report", "scan"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_page_renders_without_errors_and_fits_the_window(
    kind: str, width: int, browser: Browser, files: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(files[kind], width)
    assert browser.said == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('#maps rect').length") > 60
    image = browser.screenshot(tmp_path / "page.png")
    assert image.getpixel((3, 3)) == (255, 255, 255)
    assert len(image.getcolors(1 << 24) or []) > 50  # a picture, and no blank page


def test_in_the_dark_the_page_is_dark(browser: Browser, files: dict[str, Path], tmp_path: Path) -> None:
    browser.open(files["scan"], 1400, "dark")
    assert browser.screenshot(tmp_path / "dark.png").getpixel((3, 3)) == (0x14, 0x18, 0x1D)


def test_a_button_shows_its_map_and_a_cell_says_its_figure(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["report"], 1400)
    assert browser.evaluate("figure()") == ["map-energy"]
    browser.evaluate("document.querySelector('#m-leak').click()")
    assert browser.evaluate("figure()") == ["map-leak"]
    browser.evaluate("document.querySelector('#map-leak rect').dispatchEvent(new Event('click', {bubbles: true}))")
    said = browser.evaluate("document.querySelector('output').textContent")
    assert said.startswith("self_attn.q_proj, layer 0: ")
    assert browser.said == []


def test_a_heading_sorts_the_table_both_ways(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["scan"], 1400)
    names = browser.evaluate("[...document.querySelectorAll('thead button')].map((b) => b.textContent)")
    column = names.index("condition")
    for order in ("descending", "ascending"):
        browser.evaluate(f"document.querySelectorAll('thead button')[{column}].click()")
        found = [float(value) for value in browser.evaluate(f"column({column})")]
        assert found == sorted(found, reverse=order == "descending")
        sorted_by = browser.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')")
        assert sorted_by == order


def test_a_hostile_name_runs_nothing(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["scan"], 1400)
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.said == []
