"""Folders that other programs made: `save_to_disk` of `datasets`, and data sets of the hub, downloaded whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from trietune.config.yaml12 import YamlError, read_value
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping
from trietune.io.places import real_path

_ROLES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The arrow files of a folder that `save_to_disk` wrote, by split; None if it is none."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_object(folder / "dataset_dict.json").get("splits")
        if isinstance(names, list):
            return {str(name): _saved_files(folder / str(name)) for name in names}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": _saved_files(folder)}
    return None


def _saved_files(folder: Path) -> list[Path]:
    listed = _read_object(folder / "state.json").get("_data_files")
    names = [str(one.get("filename")) for one in listed] if isinstance(listed, list) else []
    paths = [folder / Path(name).name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise UserError(
            f"the saved data set `{folder}` is not whole: {', '.join(missing) or 'it names no files'}",
            where=str(folder / "state.json"),
            next_step="copy the folder again, or save it again: `dataset.save_to_disk(...)`",
        )
    return paths


def configured_splits(folder: Path, wanted: str = "") -> dict[str, list[Path]] | None:
    """The files that the README of a downloaded data set names, by split; None if it names none.

    Raises:
        UserError: it has several configurations, and none is named or the default; or files are missing.
    """
    configurations = {str(one.get("config_name")): one for one in _read_configurations(folder)}
    if not configurations:
        return None
    if wanted and wanted not in configurations:
        return None
    default = next((name for name, one in configurations.items() if one.get("default")), "default")
    chosen = wanted or (default if default in configurations else "")
    if not chosen and len(configurations) > 1:
        raise UserError(
            f"`{folder}` has several configurations: {', '.join(f'`{name}`' for name in configurations)}",
            where=str(folder / "README.md"),
            next_step=f"name one: {folder}:{next(iter(configurations))}",
        )
    return _find_files(folder, configurations[chosen or next(iter(configurations))])


def _find_files(folder: Path, configuration: JsonMapping) -> dict[str, list[Path]] | None:
    data_files = configuration.get("data_files")
    parts: list[tuple[str, object]]
    if isinstance(data_files, Mapping):
        parts = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(one, Mapping) for one in data_files):
        parts = [(str(one.get("split", "train")), one.get("path")) for one in data_files]
    else:
        parts = [("train", data_files)]
    root = real_path(folder / str(configuration.get("data_dir") or ""))
    found: dict[str, list[Path]] = {}
    for split, patterns in parts:
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            matches = [] if pattern is None else sorted(path for path in root.glob(str(pattern)) if path.is_file())
            inside = [path for path in matches if real_path(folder) in real_path(path).parents]
            if not inside:
                return None
            found.setdefault(_ROLES.get(split, split), []).extend(inside)
    return found


def _read_configurations(folder: Path) -> list[JsonMapping]:
    """What stands under `configs` in the head of the README of a data set."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    text = readme.read_text("utf-8", errors="replace").removeprefix("\ufeff")
    if not text.startswith("---"):
        return []
    head = text[3:].partition("\n---")[0]
    try:
        listed = read_value(head)
    except (YamlError, ValueError):
        return []
    configs = listed.get("configs") if isinstance(listed, Mapping) else None
    return [one for one in configs if isinstance(one, Mapping)] if isinstance(configs, list) else []


def _read_object(path: Path) -> JsonMapping:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{path}` cannot be read: {error}", next_step="copy the folder again, or save the data set again"
        ) from None
    return value if isinstance(value, Mapping) else {}
