"""Every reader of files of others, given files that are nearly right: it reads them, or says what is wrong with them.

    make fuzz                                                     a minute for each reader
    TRIETUNE_FUZZ_SECONDS=600 python -m pytest tests/fuzz -m slow      ten
    TRIETUNE_FUZZ_INPUT=17 python -m pytest tests/fuzz -m slow -k gguf   the one input that a failure named

Anything but a value or a `UserError` would have reached a person as "a bug in TrieTune".
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mutator import Mutator
from readers import READERS, Reader, Seeds

from trietune.errors import UserError

SECONDS = float(os.environ.get("TRIETUNE_FUZZ_SECONDS", "10"))
ONLY = os.environ.get("TRIETUNE_FUZZ_INPUT")
# Enough that a reader which refuses everything at once is noticed.
FEWEST_INPUTS = 5


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return Seeds.write(tmp_path_factory.mktemp("seeds"))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_a_file_or_says_what_is_wrong(
    name: str,
    seeds: Seeds,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    reader: Reader = READERS[name](seeds)
    reader.read(reader.whole(tmp_path / "whole"))  # the seed itself is read, so that what is refused is the mutation
    deadline = time.monotonic() + SECONDS
    number = num_refused = 0
    kept: dict[str, int] = {}
    refusals: set[int] = set()
    for number in [int(ONLY)] if ONLY else range(10**9):
        if time.monotonic() > deadline and number >= FEWEST_INPUTS:
            break
        place = tmp_path / "input"
        shutil.rmtree(place, ignore_errors=True)
        path = reader.mutated(place, Mutator(f"{name} {number}"))
        try:
            reader.read(path)
        except UserError as error:
            num_refused += 1
            refusals.add(error.exit_code)
        except Exception as error:
            where = f"{type(error).__name__} at {_place_of(error)}"
            if where not in kept:
                kept[where] = number
                shutil.copytree(place, tmp_path / f"found-{number}", dirs_exist_ok=True, symlinks=True)
    record_property("inputs", number)
    print(f"\n{name}: {number:,} inputs in {SECONDS:.0f} s, {num_refused:,} refused, {len(kept)} findings")
    assert not kept, "\n".join(
        f"input {number}: {where} ({tmp_path / f'found-{number}'})" for where, number in kept.items()
    )


def _place_of(error: BaseException) -> str:
    """The last line of ours and the last of all."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/trietune/" in frame.filename]
    return (
        " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*frames[-1:], *ours[-1:]])
        + f" {str(error)[:100]!r}"
    )
