"""A software bill of materials (CycloneDX 1.5, JSON) from requirements.lock: what a tested installation consists of.

python tools/sbom.py requirements.lock > dist/trietune.cdx.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_PACKAGE = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def bill_of_materials(lock: str, *, version: str) -> dict[str, Any]:
    """The document; the same lock gives the same one."""
    found = list(_PACKAGE.finditer(lock))
    ends = [match.start() for match in found[1:]] + [len(lock)]
    components = []
    for match, end in zip(found, ends, strict=True):
        name, release = match.groups()
        hashes = [{"alg": "SHA-256", "content": digest} for digest in _HASH.findall(lock[match.end() : end])]
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{release}"
        component: dict[str, Any] = {"type": "library", "name": name, "version": release, "purl": purl, "bom-ref": purl}
        if len(hashes) == 1:
            component["hashes"] = hashes
        components.append(component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "trietune", "version": version}},
        "components": components,
    }


if __name__ == "__main__":
    import tomllib

    root = Path(__file__).parents[1]
    release = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    json.dump(bill_of_materials(Path(sys.argv[1]).read_text("utf-8"), version=release), sys.stdout, indent=1)
