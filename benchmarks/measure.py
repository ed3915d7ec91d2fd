"""What the machine is and can do: matrix products a second, memory of a process, versions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Rows, inner and outer size of the products: as large as a micro-batch on a 2B model's layer, and smaller.
CEILING_SHAPES = [(1024, 2048, 4096), (2048, 2048, 2048), (4096, 2048, 2048)]
# A GPU is done with those before the next can be launched.
GPU_CEILING_SHAPES, GPU_PRODUCTS_AT_ONCE = [(8192, 8192, 8192)], 10


def matmul_ceiling(dtype: torch.dtype, device: torch.device, repeats: int = 3) -> float:
    """The most floating-point operations a second that a product of two matrices reaches here."""
    best = 0.0
    is_gpu = device.type == "cuda"
    at_once = GPU_PRODUCTS_AT_ONCE if is_gpu else 1
    for rows, inner, columns in GPU_CEILING_SHAPES if is_gpu else CEILING_SHAPES:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        torch.nn.functional.linear(a, b)
        for _ in range(repeats):
            _synchronize(device)
            began = time.perf_counter()
            for _ in range(at_once):
                torch.nn.functional.linear(a, b)
            _synchronize(device)
            best = max(best, at_once * 2.0 * rows * inner * columns / (time.perf_counter() - began))
    return best


def median_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Of one call on the CPU, after three that do not count."""
    seconds = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def reset_peak_memory() -> int:
    """Begin a new peak; returns what is in use now, in bytes: resident on CPU, allocated on CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux: 5 sets the high-water mark to what is resident now. Loading a model may have gone higher than training.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int:
    """The most since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status_bytes("VmHWM")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, commit and command: what a result needs to be read later."""
    packages = ["torch", "transformers", "peft", "trl", "accelerate", "numpy"]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "card": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "commit": _commit(),
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *map(without_folder, sys.argv[1:])]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def without_folder(argument: str) -> str:
    """A path elsewhere on this machine by its last name alone: a result is read on others."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the checkout, with a plus if source files differ from it."""
    root = Path(__file__).parents[1]
    run = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = run("status", "--porcelain", "--", "src", "benchmarks", "examples")
    return run("rev-parse", "--short", "HEAD") + ("+" if changed else "")
