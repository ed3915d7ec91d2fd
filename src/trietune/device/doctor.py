"""What is here, what a run would use and why, what is missing: `trietune doctor`, made to be pasted into a report.

No value of a secret is shown, only whether it is set.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.version import Version

from trietune.device.choose import choose_device
from trietune.device.device import AttentionNeeds, Device
from trietune.device.kernels import ANY_NUMBER_OF_POSITIONS, choose_backend
from trietune.device.precision import product_seconds
from trietune.device.xla.plugin import INSTALL_TENSTORRENT, PLUGIN_GROUP, has_plugin
from trietune.device.xla.runtime import INSTALL_TORCH_XLA, torch_xla_version
from trietune.errors import UserError
from trietune.io.cache_folder import cache_folder
from trietune.io.columns import columns
from trietune.io.json_types import JsonObject

# Older ones have holes: CVE-2026-24747 (torch), CVE-2026-4372 and -5241 (transformers), CVE-2026-22701 (filelock).
SECURE_VERSIONS = {
    "torch": "2.10",
    "transformers": "5.5.0",
    "peft": "0.19.0",
    "safetensors": "0.8.0",
    "filelock": "3.20.3",
    "jinja2": "3.1.6",
}
OPTIONAL = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio", "bitsandbytes": "bitsandbytes"}
VARIABLES = (
    "HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE", "CUDA_VISIBLE_DEVICES",
    "TRIETUNE_CACHE", "OMP_NUM_THREADS", "PJRT_DEVICE",
)  # fmt: skip
HEAD_SIZES = (64, 128, 256)
PROBE_FLOPS = 2 * 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `state` is `ok`, `note` or `problem`; `remedy` is a command or a sentence, empty where all is well."""

    topic: str
    text: str
    state: str = "ok"
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """All findings, in the order to show."""

    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """For people."""
        rows = []
        for finding in self.findings:
            mark = {"ok": " ", "note": "-", "problem": "!"}[finding.state]
            rows.append((f"{mark} {finding.topic}", finding.text))
            if finding.remedy:
                rows.append(("", f"next: {finding.remedy}"))
        return columns(rows)

    def as_json(self) -> JsonObject:
        """For `--json`."""
        return {"findings": [asdict(finding) for finding in self.findings]}


def examine() -> Examination:
    """Look at devices, versions, disk, cache and logins; starts no accelerator runtime and asks no network."""
    return Examination(
        (
            Finding("system", f"{platform.platform()}, Python {platform.python_version()}"),
            *_devices(),
            *_versions(),
            _disk(Path.cwd()),
            _cache(),
            _variables(),
        )
    )


def _devices() -> list[Finding]:
    # A plug-in is named and not started.
    chosen = choose_device("auto", use_tt=not has_plugin())
    used = "the Tenstorrent plug-in (`use_tt: True`)" if has_plugin() else chosen.name
    memory = psutil.virtual_memory()
    findings = [
        Finding("device", f"a run would use {used}" + (f" ({chosen.reason})" if chosen.reason else "")),
        Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB free"),
    ]
    if not has_plugin():
        findings.append(find_attention(chosen))
    speeds = []
    for dtype in (torch.bfloat16, torch.float32):
        rate = PROBE_FLOPS / product_seconds(dtype, chosen.torch_device, chosen.synchronize)
        speeds.append(f"{str(dtype).removeprefix('torch.')} {rate / 1e9:,.0f} GFLOP/s")
    findings.append(Finding("products", ", ".join(speeds)))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        findings.append(Finding("cuda", f"{torch.version.cuda}: {', '.join(names)}"))
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch was built without it"
        findings.append(Finding("cuda", f"no device; {built}", "note"))
    return [*findings, *_xla()]


def find_attention(device: Device) -> Finding:
    """How tries would attend on `device`, in bf16, for the usual sizes of heads."""
    sizes_of_way: dict[str, list[str]] = {}
    for size in HEAD_SIZES:
        needs = AttentionNeeds(size, torch.bfloat16, has_soft_cap=False, num_positions=ANY_NUMBER_OF_POSITIONS)
        way, _ = choose_backend("auto", device, needs, where="doctor")
        sizes_of_way.setdefault(way, []).append(str(size))
    if len(sizes_of_way) == 1:
        return Finding("attention", f"tries use `{next(iter(sizes_of_way))}`")
    parts = (f"`{way}` for heads of {' and '.join(sizes)}" for way, sizes in sizes_of_way.items())
    return Finding("attention", f"tries use {', '.join(parts)}")


def _xla() -> list[Finding]:
    """What an XLA device would find; looked up in the installed packages, for starting one cannot be undone."""
    version = torch_xla_version()
    if version is None:
        torch_xla = Finding("torch_xla", "not installed (for Tenstorrent and `device: xla`)", "note", INSTALL_TORCH_XLA)
    else:
        pjrt = os.environ.get("PJRT_DEVICE")
        torch_xla = Finding("torch_xla", f"{version}, PJRT_DEVICE {f'is {pjrt}' if pjrt else 'is not set'}")
    if not has_plugin():
        return [torch_xla, Finding("tenstorrent", f"no plug-in in {PLUGIN_GROUP}", "note", INSTALL_TENSTORRENT)]
    state = "ok" if version is not None else "problem"
    return [torch_xla, Finding("tenstorrent", f"a plug-in is registered in {PLUGIN_GROUP}", state)]


def _versions() -> list[Finding]:
    findings = []
    for package, least in SECURE_VERSIONS.items():
        found = metadata.version(package)
        if Version(found) < Version(least):
            remedy = f"pip install --upgrade '{package}>={least}'"
            findings.append(Finding(package, f"{found} has known vulnerabilities", "problem", remedy))
        else:
            findings.append(Finding(package, found))
    for extra, package in OPTIONAL.items():
        try:
            findings.append(Finding(package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed (optional)", "note", f"pip install {extra}"))
    return findings


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    state = "ok" if free > 2 * 2**30 else "problem"
    return Finding("disk", f"{free / 2**30:.1f} GB free here", state, "" if state == "ok" else "free some space")


def _cache() -> Finding:
    try:
        folder = cache_folder()
    except UserError as error:
        return Finding("cache", error.what, "problem", "set TRIETUNE_CACHE to a folder")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(existing, os.W_OK):
        return Finding("cache", f"{folder} can be written")
    return Finding("cache", f"{folder} cannot be written", "problem", "set TRIETUNE_CACHE to a writable folder")


def _variables() -> Finding:
    found = [name for name in VARIABLES if os.environ.get(name)]
    return Finding("variables", f"set: {', '.join(found)}" if found else "none is set")
