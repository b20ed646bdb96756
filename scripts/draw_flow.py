"""Write docs/flow.svg, the picture of the flow: model -> base and adapter -> training -> merge or convert.

    python scripts/draw_flow.py

The picture has its own background and follows the reader's light or dark setting. It uses no external font.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "flow.svg"
WIDTH, HEIGHT = 960, 300
STYLE = """
    .page { fill: #ffffff; }
    .box { fill: #f3f5f8; stroke: #8c96a3; }
    .trained { fill: #e3f1e6; stroke: #3f8f55; }
    .frozen { fill: #e6eef9; stroke: #4a78b8; }
    text { fill: #1c2128; font: 15px system-ui, -apple-system, "Segoe UI", sans-serif; text-anchor: middle; }
    .small { fill: #4d5661; font-size: 12.5px; }
    .command { fill: #1c2128; font: 13px ui-monospace, Consolas, monospace; }
    .arrow { stroke: #6b7684; stroke-width: 1.6; fill: none; }
    .head { fill: #6b7684; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #14181d; }
      .box { fill: #22282f; stroke: #76828f; }
      .trained { fill: #1d3324; stroke: #57a86d; }
      .frozen { fill: #1d2b40; stroke: #6d9bdb; }
      text, .command { fill: #e8ecf0; }
      .small { fill: #b3bcc6; }
      .arrow { stroke: #9aa5b1; }
      .head { fill: #9aa5b1; }
    }"""

# (left, top, width, class, title, lines below the title); every box is BOX_HEIGHT high.
BOX_HEIGHT = 66
BOXES = [
    (20, 117, 150, "box", "original model", "each weight W"),
    (270, 40, 170, "frozen", "residual base", "W - scale * B A, frozen"),
    (270, 194, 170, "trained", "adapter", "B, A: r triplets of W"),
    (520, 117, 150, "trained", "trained adapter", "plain PEFT files"),
    (760, 40, 180, "box", "merged model", "one plain model"),
    (760, 194, 180, "box", "plain LoRA", "of the original model"),
]
# (points of the line, label, where the label is)
ARROWS = [
    (((170, 150), (215, 150), (215, 73), (262, 73)), "init", (217, 62)),
    (((170, 150), (215, 150), (215, 227), (262, 227)), "", (0, 0)),
    (((440, 73), (480, 73), (480, 150), (512, 150)), "", (0, 0)),
    (((440, 227), (480, 227), (480, 150), (512, 150)), "your trainer", (495, 250)),
    (((670, 150), (715, 150), (715, 73), (752, 73)), "merge", (715, 62)),
    (((670, 150), (715, 150), (715, 227), (752, 227)), "convert", (715, 250)),
]


def svg() -> str:
    """The picture."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">',
        '  <title id="title">init splits a model into a residual base and an adapter; a trainer trains the adapter; '
        "merge makes one model of them, convert makes a plain LoRA of the original model</title>",
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *(line for arrow in ARROWS for line in _arrow(*arrow)),
        *(line for box in BOXES for line in _box(*box)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(left: int, top: int, width: int, kind: str, title: str, text: str) -> list[str]:
    middle = left + width // 2
    return [
        f'  <rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{BOX_HEIGHT}" rx="7"/>',
        f'  <text x="{middle}" y="{top + 28}">{escape(title)}</text>',
        f'  <text class="small" x="{middle}" y="{top + 49}">{escape(text)}</text>',
    ]


def _arrow(points: tuple[tuple[int, int], ...], label: str, place: tuple[int, int]) -> list[str]:
    path = " L ".join(f"{x} {y}" for x, y in points)
    x, y = points[-1]
    lines = [
        f'  <path class="arrow" d="M {path}"/>',
        f'  <path class="head" d="M {x + 8} {y} l -10 -5 v 10 z"/>',
    ]
    if label:
        lines.append(f'  <text class="command" x="{place[0]}" y="{place[1]}">{escape(label)}</text>')
    return lines


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
