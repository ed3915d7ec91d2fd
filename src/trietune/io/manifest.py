"""`manifest.json`: what a directory holds, to the byte. It is written last, so a directory that has it is complete.

    {
      "details": {"model_name": "...", ...},        what the resume compares; plain values
      "digest": "9f1c...",                          SHA-256 of this document with the digest left empty
      "files": {"adapter_model.safetensors": {"sha256": "...", "size": 19611648}, ...},
      "format_version": "1.0",
      "kind": "checkpoint",                         or "adapter"
      "metrics": {"eval/loss": 0.41},               measured on exactly these weights; NaN is null
      "run_id": "5e0b...",
      "step": 50
    }

The text is accepted only in the one spelling in which we write it, so a flipped bit in a blank is damage as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trietune.io import strict_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = (1, 0)
MAX_FILES = 1_000
MAX_MANIFEST_BYTES = 4 * 2**20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEYS = {"details", "digest", "files", "format_version", "kind", "metrics", "run_id", "step"}


class ManifestError(ValueError):
    """The manifest cannot be believed; the message says why."""


@dataclass(frozen=True, slots=True)
class ManifestInfo:
    """What a writer says about a directory beyond its files.

    `details` are plain JSON values (config, fingerprints, versions) that a resume compares; secrets stay out.
    """

    run_id: str
    step: int
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    kind: Literal["checkpoint", "adapter"] = "checkpoint"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256, in hex, of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read and believed, or is about to be written."""

    info: ManifestInfo
    files: Mapping[str, FileEntry]

    @property
    def size_bytes(self) -> int:
        """Of all files that it names, itself not counted."""
        return sum(entry.size for entry in self.files.values())


def serialize(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`. Raises ValueError for names and details that a reader would refuse."""
    _check_names(manifest.files)
    info = manifest.info
    document: dict[str, Any] = {
        "details": strict_json.without_nan(dict(info.details)),
        "digest": "",
        "files": {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in sorted(manifest.files.items())},
        "format_version": ".".join(map(str, FORMAT_VERSION)),
        "kind": info.kind,
        "metrics": strict_json.without_nan(dict(info.metrics)),
        "run_id": info.run_id,
        "step": info.step,
    }
    data = _with_digest(document)
    parse(data)  # what a reader would refuse must fail while the old checkpoint is still the newest
    return data


def parse(data: bytes) -> Manifest:
    """Read `manifest.json`. Raises `ManifestError` unless each byte is what we would have written."""
    try:
        document = strict_json.parse(data, max_bytes=MAX_MANIFEST_BYTES)
    except strict_json.NotStrict as error:
        raise ManifestError(f"{error}") from error
    if not isinstance(document, dict):
        raise ManifestError("it is not an object")
    _check_version(document.get("format_version"))
    if set(document) != _KEYS:
        raise ManifestError(f"its keys are not {', '.join(sorted(_KEYS))}")
    _check_count(document["files"])  # before anything that takes longer the more there are
    if _with_digest({**document, "digest": ""}) != data:
        raise ManifestError("its own digest does not fit: it was changed after it was written")
    manifest = Manifest(info=_parse_info(document), files=_parse_files(document["files"]))
    _check_names(manifest.files)
    return manifest


def _with_digest(document: Mapping[str, Any]) -> bytes:
    try:
        digest = hashlib.sha256(strict_json.serialize(document)).hexdigest()
        return strict_json.serialize({**document, "digest": digest})
    except UnicodeEncodeError as error:
        raise ManifestError("it holds half a character (a lone surrogate)") from error


def _check_version(text: object) -> None:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", text, re.ASCII):
        raise ManifestError("it names no format version")
    major, minor = map(int, text.split("."))
    if (major, minor) > FORMAT_VERSION:
        ours = ".".join(map(str, FORMAT_VERSION))
        raise ManifestError(f"its format {text} is newer than {ours}, the newest that this TrieTune reads; update it")


def _parse_info(document: Mapping[str, Any]) -> ManifestInfo:
    run_id, step, kind = document["run_id"], document["step"], document["kind"]
    metrics, details = document["metrics"], document["details"]
    if not isinstance(run_id, str) or not 0 < len(run_id) <= 200:
        raise ManifestError("`run_id` is not a short text")
    if type(step) is not int or step < 0:
        raise ManifestError("`step` is not a count")
    if kind != "checkpoint" and kind != "adapter":
        raise ManifestError("`kind` is neither checkpoint nor adapter")
    if not isinstance(metrics, dict) or not all(
        value is None or type(value) in (int, float) for value in metrics.values()
    ):
        raise ManifestError("`metrics` are not numbers")
    if not isinstance(details, dict):
        raise ManifestError("`details` is not an object")
    return ManifestInfo(
        run_id=run_id, step=step, metrics=metrics, kind="adapter" if kind == "adapter" else "checkpoint",
        details=details,
    )  # fmt: skip


def _parse_files(files: object) -> dict[str, FileEntry]:
    if not isinstance(files, dict):
        raise ManifestError("`files` is not an object")
    entries = {}
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise ManifestError(f"its entry for {name[:80]!r} is not a size and a SHA-256")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size < 2**63:
            raise ManifestError(f"the size of {name[:80]!r} is not a count")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ManifestError(f"the SHA-256 of {name[:80]!r} is not 64 hex digits")
        entries[name] = FileEntry(size=size, sha256=sha256)
    return entries


def _check_count(files: object) -> None:
    if isinstance(files, dict) and len(files) > MAX_FILES:
        raise ManifestError(f"it names {len(files):,} files, more than the {MAX_FILES:,} allowed")


def _check_names(files: Mapping[str, FileEntry]) -> None:
    # Plain names in one flat folder: no separator, no leading dot, no two that a Mac would take for one.
    folded: dict[str, str] = {}
    for name in files:
        if not _NAME.fullmatch(name) or name.casefold() == MANIFEST_NAME:
            raise ManifestError(f"{name[:80]!r} is not a file name that a checkpoint may hold")
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            raise ManifestError(f"{twin!r} and {name!r} differ only in case")
