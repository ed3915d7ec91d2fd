"""What the package's metadata says beyond pyproject.toml: its addresses, and a README whose links lead somewhere.

The repository's address is one constant, `repository` under `[tool.hatch.metadata.hooks.custom]`. While it is empty,
the package's README keeps the words of its links without the links: relative ones lead nowhere on an index.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


class AbsoluteLinks(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        repository = self.config.get("repository", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
        if repository:
            metadata["urls"] = {
                "Source": repository,
                "Documentation": f"{repository}/blob/main/docs/commands.md",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }


def absolute(text: str, repository: str) -> str:
    """The README with links into the repository; pictures without an address are left out."""

    def replace(match: re.Match[str]) -> str:
        is_picture, words, target = match.groups()
        if not repository:
            return "" if is_picture else words
        kind = "raw" if is_picture else "blob"
        return f"{is_picture}[{words}]({repository}/{kind}/main/{target})"

    return _LINK.sub(replace, text)
