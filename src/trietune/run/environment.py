"""What surrounds a run: versions, machine, fingerprints. Kept with the run and compared when it is resumed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trietune.run.prepared import Prepared

# Of each file of a base model: enough to tell two fine-tunes of one shape apart, little enough to read at every start.
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 64 * 2**10
PACKAGES = ("trietune", "torch", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")


def describe(prepared: Prepared) -> dict[str, Any]:
    """Plain values for `environment.json`."""
    plan, data = prepared.plan, prepared.data
    return {
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "device": plan.device.name,
        },
        "device": plan.device.kind,
        "num_threads": torch.get_num_threads(),
        "world_size": 1 if plan.processes is None else plan.processes.count,
        "base_model": prepared.base.name,
        "base_revision": prepared.base.revision,
        "base_digest": prepared.base.digest or sampled_digest(prepared.base.path),
        "base_weights": prepared.base.weights_digest,
        "data_fingerprint": data.train_fingerprint,
        "validation_fingerprint": data.validation_fingerprint,
        "tokenizer": data.prompt_format.tokenizer_hash,
        "git_revision": _git_revision(),
        **({} if prepared.start is None else {"start_adapter": start_adapter(prepared)}),
    }


def compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part that decides whether a resumed run is the same training, flat."""
    names = (
        "num_threads", "world_size", "base_model", "base_revision", "base_digest", "base_weights", "data_fingerprint",
        "validation_fingerprint", "tokenizer",
    )  # fmt: skip
    flat = {name: environment[name] for name in names}
    if "start_adapter" in environment:
        flat["start_adapter"] = environment["start_adapter"]
    for group in ("versions", "machine"):
        flat.update({f"{group}.{key}": value for key, value in environment[group].items()})
    return flat


def start_adapter(prepared: Prepared) -> str | None:
    """What the adapter that training begins with is, by its content; None without one."""
    if prepared.start is None:
        return None
    from trietune.model.adapter.start import adapter_digest  # imports transformers, which starts XLA devices

    return adapter_digest(prepared.start)


def sampled_digest(folder: Path) -> str:
    """SHA-256 of a folder's configuration and weights: names, sizes, and pieces of each file at even distances."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(_NUM_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def installed_version(package: str) -> str | None:
    """Of a distribution; None if it is not installed."""
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
