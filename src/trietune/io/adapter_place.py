"""Where an adapter lies: known without PEFT, since transformers must not be imported before a device is chosen."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "adapter_config.json"


def adapter_in(path: Path) -> Path | None:
    """The adapter's folder: `path` itself, or `adapter/` in a run; None if neither holds one."""
    return next((folder for folder in (path, path / "adapter") if (folder / CONFIG_FILE).is_file()), None)
