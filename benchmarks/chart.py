"""Charts as SVG text: bars of examples a second, and lines of cost as work grows. Readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, LEFT, BAR, GAP = 720, 150, 18, 6
COLORS = {"trietune": "#d9480f", "trietune-packed": "#f59f00", "trietune-padded": "#f59f00"}
PEER_COLOR = "#748ffc"
STYLE = (
    "<style>text{font:13px sans-serif;fill:#444}.h{font-weight:bold}.s{font-size:11px;fill:#777}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.s{fill:#aaa}}</style>"
)


def bar_chart(results: Sequence[dict[str, Any]], *, title: str) -> str:
    """One block a workload, one bar an engine, slowest first, with its range over the rounds."""
    parts, y = [], 30
    parts.append(_text(10, 20, title + ", examples a second", "h"))
    workloads = list(dict.fromkeys(result["workload"] for result in results))
    for workload in workloads:
        done = [r for r in results if r["workload"] == workload and "failed" not in r]
        done.sort(key=lambda r: r["examples_per_second"]["median"])
        largest = max((r["examples_per_second"]["highest"] for r in done), default=1.0)
        y += 22
        parts.append(_text(10, y, workload, "h"))
        y += 8
        for result in done:
            rate = result["examples_per_second"]
            scale = (WIDTH - LEFT - 170) / largest
            color = COLORS.get(result["engine"], PEER_COLOR)
            parts.append(_text(10, y + 14, result["engine"]))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{rate["median"] * scale:.1f}" height="{BAR}" fill="{color}"/>'
            )
            low, high = LEFT + rate["lowest"] * scale, LEFT + rate["highest"] * scale
            middle = y + BAR / 2
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#333" stroke-width="2"/>')
            ratio = result.get("trietune_is_faster_by")
            label = f"{rate['median']:.3g}" + (f"   (TrieTune: {ratio['median']:.2f} x)" if ratio else "")
            parts.append(_text(high + 8, y + 14, label))
            y += BAR + GAP
    return _svg(y + 10, parts)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, across: str, up: str, height: int = 320
) -> str:
    """`lines[name]` are (x, y) points; x is drawn in equal steps, in the order of its values, y from zero."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    largest = max(y for points in lines.values() for _, y in points)
    left, top, right, bottom = 70, 40, WIDTH - 160, height - 50
    place_x = {x: left + (right - left) * at / max(1, len(xs) - 1) for at, x in enumerate(xs)}

    def place_y(y: float) -> float:
        return bottom - (bottom - top) * y / largest

    parts = [_text(10, 20, title, "h"), _text((left + right) / 2 - 60, height - 12, across), _text(10, 36, up, "s")]
    parts += [_text(place_x[x] - 6, bottom + 18, f"{x:g}", "s") for x in xs]
    for share in (0.0, 0.5, 1.0):
        y = place_y(largest * share)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#999" stroke-width="0.5"/>')
        parts.append(_text(14, y + 4, f"{largest * share:.3g}", "s"))
    for name, points in lines.items():
        color = COLORS.get(name, PEER_COLOR)
        path = "L".join(f"{place_x[x]:.1f} {place_y(y):.1f}" for x, y in sorted(points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        last_x, last_y = sorted(points)[-1]
        parts.append(_text(place_x[last_x] + 8, place_y(last_y) + 4, name))
    return _svg(height, parts)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}">{STYLE}\n{body}\n</svg>\n'
    )
