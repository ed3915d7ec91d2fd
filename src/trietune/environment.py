"""What surrounds a run: versions, machine, fingerprints. Kept with the run and compared when it is resumed."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trietune.prepare import Prepared

PACKAGES = ("trietune", "torch", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")


def describe(prepared: Prepared) -> dict[str, Any]:
    """Plain values for `environment.json`."""
    import torch

    plan, data = prepared.plan, prepared.data
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "device": plan.device.name,
        },
        "device": plan.device.kind,
        "num_threads": torch.get_num_threads(),
        "world_size": 1,
        "base_model": prepared.base.name,
        "base_revision": prepared.base.revision,
        "base_digest": prepared.base.digest,
        "data_fingerprint": data.train_fingerprint,
        "validation_fingerprint": data.validation_fingerprint,
        "tokenizer": data.prompt_format.tokenizer_hash,
        "git_revision": _git_revision(),
    }


def compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part that decides whether a resumed run is the same training, flat."""
    names = (
        "num_threads", "world_size", "base_model", "base_revision", "base_digest", "data_fingerprint",
        "validation_fingerprint", "tokenizer",
    )  # fmt: skip
    flat = {name: environment[name] for name in names}
    for group in ("versions", "machine"):
        flat.update({f"{group}.{key}": value for key, value in environment[group].items()})
    return flat


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607  (whatever git the user has)
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
