"""Run the tests of every architecture, and write the families that passed into the table of docs/models.md.

python scripts/support_table.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.families import FAMILIES  # noqa: E402

TESTS = ("tests/model/test_architectures.py", "tests/plan/test_peft_check.py", "tests/model/test_meta_model.py")
START, END = "<!-- scripts/support_table.py writes this -->", "<!-- to here -->"


def main() -> int:
    """Run the tests and write the table; the exit status is 1 if a family did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed = [name for name in FAMILIES if _passed(name, cases)]
    page = ROOT / "docs" / "models.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), table(passed)), encoding="utf-8")
    print(f"{len(passed)} of {len(FAMILIES)} families passed")
    return 0 if len(passed) == len(FAMILIES) else 1


def table(names: Collection[str]) -> str:
    """The table of these families, in Markdown."""
    lines = ["| model | class | adapted in its test | |", "|---|---|---|---|"]
    for name in names:
        family = FAMILIES[name]
        targets = ", ".join(f"`{target}`" for target in family.targets)
        lines.append(f"| {name} | `{family.architecture}` | {targets} | {family.note} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """The page with this table between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table}\n{END}{after}"


def _passed(name: str, cases: Collection[ElementTree.Element]) -> bool:
    """Whether a family has tests, and none that failed or was skipped."""
    own = [case for case in cases if name in case.get("name", "").partition("[")[2].rstrip("]").split("-")]
    return bool(own) and not any(child.tag in ("failure", "error", "skipped") for case in own for child in case)


if __name__ == "__main__":
    sys.exit(main())
