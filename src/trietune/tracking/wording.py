"""How numbers read: one place, so that terminal, log and report say the same thing in the same way."""

from __future__ import annotations

import math
import unicodedata

from trietune.io.metric_names import kind_of


def metric_name(key: str) -> str:
    """`eval/exact_match` as a person says it: `exact match`; `eval/rewards/margins` as `rewards/margins`."""
    return (key.partition("/")[2] or key).replace("_", " ")


def is_share(key: str) -> bool:
    """Whether a metric is a fraction of one, such as accuracy, `f1_answerable` included."""
    return kind_of(key).is_share


def metric_value(key: str, value: float | int | None) -> str:
    """`0.875` as `87.5%` for a share, four significant digits for the rest, `-` for what was not measured."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else "not finite"
    if is_share(key):
        return f"{100 * value:.1f}%"
    return f"{value:,}" if isinstance(value, int) else number(value)


def interval(key: str, low: float, high: float) -> str:
    """A 95% interval in the unit of its metric, without the unit: `85.1 to 89.6`."""
    if is_share(key):
        return f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    """Four significant digits, never in a form that needs counting zeros."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 4)}f}"


def rate(value: float) -> str:
    """Examples or tokens per second: `8.5`, `360`, `1,240`."""
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `1:02:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: float) -> str:
    """Decimal units, as disks and downloads are sold: `1.3 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            count = num_bytes / factor
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def visible(text: str) -> str:
    """`text` with control characters written out, so that data cannot steer a terminal; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        char if char == "\n" or not unicodedata.category(char).startswith("C") else _escaped(char) for char in text
    )


def line(text: str) -> str:
    """`text` as one line of output: line breaks are written out too, so that a name cannot look like a line of ours."""
    return visible(text).replace("\n", "\\n")


def one_line(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters; what is cut is marked by `…`."""
    flat = " ".join(visible(text).split())
    return flat if len(flat) <= width else flat[: max(0, width - 1)] + "…"


def _escaped(char: str) -> str:
    if char in "\u200c\u200d":  # joiners, part of words in several scripts and of emoji
        return char
    return char.encode("unicode_escape").decode("ascii")
