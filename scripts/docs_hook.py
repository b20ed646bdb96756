"""A hook of MkDocs: SECURITY.md and CHANGELOG.md are pages of the site, although they are not in docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ("SECURITY.md", "CHANGELOG.md")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Change links to the repository's root, which are right on GitHub, to links inside the site."""
    for name in PAGES:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    return markdown
