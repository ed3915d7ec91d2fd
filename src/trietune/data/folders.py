"""What a path stands for: a file, the files that a pattern finds, or a folder of splits."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from trietune.data.files import FORMATS_IN_WORDS, format_suffix, is_data_file
from trietune.data.opening import AS_USUAL, FileOptions, no_plain_file
from trietune.data.repositories import configured_splits, saved_splits
from trietune.data.rows import FileRows, Rows
from trietune.errors import UserError
from trietune.io.places import expand

SplitRole = Literal["train", "validation", "test"]

_SPLIT_NAMES: dict[SplitRole, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}

# `-00000-of-00002`, with the hub's hash behind it or not; `_1`; `.part3`.
_SHARD = re.compile(r"([-_.]?(part|shard)?[-_.]?\d+([-_.]of[-_.]\d+)?([-_][0-9a-f]{8,})?)?", re.IGNORECASE)

_SHARD_NUMBER = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")


def find_split(splits: Mapping[str, Rows], role: SplitRole) -> str | None:
    return next((name for name in _SPLIT_NAMES[role] if name in splits), None)


def local_splits(
    value: str, key: str, report: Callable[[str], None], options: FileOptions = AS_USUAL
) -> dict[str, Rows]:
    """What a path stands for; a file, or files that a pattern finds, are one split called `train`.

    `FOLDER:CONFIGURATION` names one of several configurations of a data set that was downloaded whole.
    """
    path = expand(value)
    folder, _, configuration = value.rpartition(":")
    if configuration and not path.exists() and folder and expand(folder).is_dir():
        return _splits_of_folder(expand(folder), report, options, configuration)
    if path.is_dir():
        return _splits_of_folder(path, report, options)
    paths = _expand(path, key)
    _say_how_texts_are_read(paths, options, report)
    return {"train": FileRows.of(paths, options)}


def _say_how_texts_are_read(paths: Sequence[Path], options: FileOptions, report: Callable[[str], None]) -> None:
    texts = [path for path in paths if format_suffix(path) in (".txt", ".text")]
    if texts:
        report(
            f"`{texts[0].name}`: each line is a text; `txt_unit: file` takes each file as one"
            if options.txt_unit == "line"
            else f"`{texts[0].name}`: each file is a text; `txt_unit: line` takes each line as one"
        )


def _splits_of_folder(
    folder: Path, report: Callable[[str], None], options: FileOptions, configuration: str = ""
) -> dict[str, Rows]:
    """Split names to files: `train.tsv`, shards such as `train-00000-of-00002.parquet`, or `train/anything.jsonl`."""
    known = saved_splits(folder) or configured_splits(folder, configuration)
    if known is None and configuration:
        known = {name: [*rows.paths] for name, rows in _plain_splits(folder / configuration, report, options).items()}
    if known is not None:
        return {name: FileRows.of(paths, options) for name, paths in known.items()}
    return dict(_plain_splits(folder, report, options))


def _plain_splits(folder: Path, report: Callable[[str], None], options: FileOptions) -> dict[str, FileRows]:
    if not folder.is_dir():
        raise no_such_path(folder, "train_file")
    # Data sets downloaded from the hub keep their files in `data`.
    roots = [folder, folder / "data"] if (folder / "data").is_dir() else [folder]
    files: dict[str, list[Path]] = {}
    similar: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in sorted(path for root in roots for path in root.iterdir()):
        name, is_exact = _split_of(_stem(path) if path.is_file() else path.name)
        if path.is_dir():
            if name and is_exact:
                files.setdefault(name, []).extend(_data_files(path))
        elif is_data_file(path):
            if name is None:
                unnamed.append(path)
            else:
                (files if is_exact else similar).setdefault(name, []).append(path)
    for name, paths in similar.items():
        _settle(name, paths, files, folder, report)
    # Other files of a repository of data, such as its licence, are texts, too.
    unnamed = [path for path in unnamed if path.stem.lower() not in ("readme", "license", "licence", "requirements")]
    if not files:
        unnamed = _take_last_words(unnamed, files, folder, report)
    _say_what_is_beside(files, unnamed if files else (), folder, report)
    for name, paths in files.items():
        suffixes = sorted({format_suffix(path) for path in paths})
        if len(suffixes) > 1:
            raise UserError(
                f"the split `{name}` is there in several forms: {', '.join(suffixes)}",
                where=str(folder),
                next_step="name the one to take: `train_file: ...` and `validation_file: ...`",
            )
    if not files:
        if not unnamed and (parts := _folders_with_splits(folder)):
            if len(parts) == 1:
                return _plain_splits(parts[0], report, options)
            raise UserError(
                f"`{folder}` holds several data sets: {', '.join(f'`{part.name}`' for part in parts)}",
                where=str(folder),
                next_step=f"name one: {folder}:{parts[0].name}",
            )
        if not unnamed:
            raise UserError(
                f"the folder `{folder}` holds no data files",
                where="train.*, and validation.* or dev.* are looked for",
                next_step=f"these can be read: {FORMATS_IN_WORDS}",
            )
        files["train"] = unnamed
    for paths in files.values():
        _say_how_texts_are_read(paths, options, report)
    return {name: FileRows.of(paths, options) for name, paths in files.items() if paths}


def _stem(path: Path) -> str:
    """A file's name without what says its form: `train` of `train.jsonl.gz`."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _folders_with_splits(folder: Path) -> list[Path]:
    """Folders in it that hold a training split of their own: the configurations of a data set."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in inner if any(_split_of(_stem(one))[0] in _SPLIT_NAMES["train"] for one in path.iterdir())]


def _settle(
    name: str, similar: list[Path], files: dict[str, list[Path]], folder: Path, report: Callable[[str], None]
) -> None:
    """`train_backup.jsonl` is not part of `train.jsonl`; a single `train_v2.jsonl` is the split where nothing else is.

    Raises:
        UserError: several could be the split.
    """
    names = ", ".join(f"`{path.name}`" for path in similar)
    if name in files:
        report(f"not read, beside `{files[name][0].name}` in `{folder}`: {names}")
    elif len(similar) == 1:
        files[name] = similar
    else:
        raise _several_could_be(name, similar, folder)


def _several_could_be(name: str, paths: Sequence[Path], folder: Path) -> UserError:
    return UserError(
        f"several files could be the split `{name}`: {', '.join(f'`{path.name}`' for path in paths)}",
        where=str(folder),
        next_step="name those to take: `train_file: ...` and `validation_file: ...` (a file or a pattern)",
    )


def _take_last_words(
    unnamed: list[Path], files: dict[str, list[Path]], folder: Path, report: Callable[[str], None]
) -> list[Path]:
    """`films_val.jsonl` is not for training; puts such files into `files`, and gives those that are left.

    Raises:
        UserError: several could be one split.
    """
    found: dict[str, list[Path]] = {}
    for path in unnamed:
        if (name := _last_word(_stem(path))) is not None:
            found.setdefault(name, []).append(path)
    if not found:
        return unnamed
    rest = [path for path in unnamed if not any(path in paths for paths in found.values())]
    for name, paths in found.items():
        if len({_SHARD_NUMBER.sub("", _stem(path)) for path in paths}) > 1:
            raise _several_could_be(name, paths, folder)
        files[name] = paths
    if rest and not any(name in found for name in _SPLIT_NAMES["train"]):
        files["train"], rest = rest, []
    for name, paths in files.items():
        report(f"the split `{name}` of `{folder}` is {', '.join(f'`{path.name}`' for path in paths)}, by the name")
    return rest


def _last_word(stem: str) -> str | None:
    """The split that a file's name ends with: `val` of `films_val`, and of `films-val-00000-of-00001`."""
    known = {name for names in _SPLIT_NAMES.values() for name in names}
    words = re.split(r"[-_. ]+", _SHARD_NUMBER.sub("", stem.lower()))
    return words[-1] if words[-1] in known else None


def _say_what_is_beside(
    files: Mapping[str, Sequence[Path]], unnamed: Sequence[Path], folder: Path, report: Callable[[str], None]
) -> None:
    """Name files that nothing reads: those of no split, and of a second one for the same use, `dev` beside `valid`."""
    used = {name: [one for one in names if files.get(one)] for name, names in _SPLIT_NAMES.items()}
    unread = [path for found in used.values() for name in found[1:] for path in files[name]] + [*unnamed]
    if unread:
        shown = ", ".join(f"`{path.name}`" for path in unread[:8]) + (", ..." if unread[8:] else "")
        report(f"not read, of the files in `{folder}`: {shown}")


def _split_of(stem: str) -> tuple[str | None, bool]:
    """The split that a file's name begins with, and whether nothing but the number of a shard follows."""
    word = re.match(r"[a-z]+", stem.lower())
    known = {name for names in _SPLIT_NAMES.values() for name in names}
    if word is None or word.group() not in known:
        return None, False
    return word.group(), _SHARD.fullmatch(stem[word.end() :]) is not None


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_data_file(path))


def _expand(path: Path, key: str) -> list[Path]:
    """The files that a path or a pattern stands for."""
    if path.is_file():
        return [path]
    if not glob.has_magic(str(path)):
        raise no_such_path(path, key)
    matches = glob.iglob(str(path), recursive=True)  # noqa: PTH207  (a pattern may begin at the root)
    paths = sorted(match for match in map(Path, matches) if match.is_file())
    if not paths:
        raise UserError(
            f"`{key}: {path}` finds no file",
            where=str(Path.cwd()),
            next_step=f"these can be read: {FORMATS_IN_WORDS}",
        )
    return paths


def no_such_path(path: Path, key: str) -> UserError:
    if (kind := no_plain_file(path)) is not None:
        return UserError(
            f"`{path}` is not read as data: it {kind}",
            where=f"`{key}`; data is read more than once",
            next_step="check the path"
            if path.is_symlink()
            else "write what comes from there into a file, and name that",
        )
    neighbors = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbors, n=1)
    return UserError(
        f"there is no file or folder `{path}`",
        where=f"`{key}`, looked for in {Path.cwd()}",
        next_step=f"did you mean `{path.parent / near[0]}`?"
        if near
        else "check the path; it counts from the folder that you are in",
    )
