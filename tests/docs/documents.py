"""The documents of this repository, and what stands in them: code blocks, inline code, links, headings."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "configuration.md")
DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *GUIDES,
    ROOT / "docs/configuration.md",
    *DECISIONS,
    ROOT / "benchmarks/README.md",
    ROOT / "blacksmith/experiments/torch/gemma11/README.md",
    ROOT / "src/trietune/demo/README.md",
]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Command:
    """A command line that begins with `trietune`, and the page that it stands on."""

    page: Path
    line: str

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.line, comments=True)[1:]

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The contents of fenced blocks in this language."""
    return [text for found, text in _BLOCK.findall(page.read_text("utf-8")) if found == language]


def inline_code(page: Path) -> list[str]:
    return _INLINE.findall(_without_blocks(page))


def links(page: Path) -> list[str]:
    return _LINK.findall(_without_blocks(page))


def anchors(page: Path) -> set[str]:
    """The names that a link may end with after `#`, made from headings as GitHub does."""
    found = set()
    for heading in _HEADING.findall(_without_blocks(page)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def section(page: Path, heading: str) -> str:
    """The text between `## heading` and the next heading of that rank."""
    text = page.read_text("utf-8")
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"{name_of(page)} has no section `{heading}`"
    return match[1]


def commands() -> list[Command]:
    """Every command line of the pages, from blocks and from inline code."""
    found = []
    for page in PAGES:
        text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
        lines = [line.rpartition("| ")[2].strip() for line in text.splitlines()] + inline_code(page)
        found += [Command(page, line) for line in dict.fromkeys(lines) if line.startswith("trietune ")]
    return found


def _without_blocks(page: Path) -> str:
    return _BLOCK.sub("", page.read_text("utf-8"))
