"""Several data sets as one: their sequences side by side, each repeated or thinned by its share.

    a.jsonl  10 rows, share 2        0 1 .. 9 0 1 .. 9
    b.csv    10 rows, share 0.5      1 2 5 7 8              drawn by the seed, once for the whole run

The joined sequences are an entry of the token cache like any other: memory stays bounded, and nothing that comes after
knows that there were several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trietune.data.answers import flat_ranges
from trietune.data.cache import CacheWriter, make_key, open_cached
from trietune.data.encoder import EncodedExamples
from trietune.data.examples import Example, TokenSequences
from trietune.data.loading import READING_VERSION
from trietune.data.templates import PromptFormat
from trietune.errors import UserError

ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """One of several data sets that a model is measured on.

    Attributes:
        name: in names of metrics: `reviews` of `data/reviews.csv`.
        source: as messages name it.
        prompt_format: how its examples are asked, and what a right answer is.
        key: changes whenever a token or a label of it does.
    """

    name: str
    source: str
    sequences: TokenSequences
    prompt_format: PromptFormat
    key: str


def draw_rows(num_rows: int, share: float, *, seed: int, number: int, source: str) -> np.ndarray:
    """Which rows of a data set an epoch takes, int64: each `int(share)` times, and the rest of the share drawn once.

    Args:
        number: of the data set in its list: each has a draw of its own.

    Raises:
        UserError: none is left.
    """
    whole = int(share)
    num_drawn = round((share - whole) * num_rows)
    drawn = np.sort(np.random.default_rng([seed, number]).choice(num_rows, num_drawn, replace=False))
    rows = np.concatenate([np.tile(np.arange(num_rows), whole), drawn]).astype(np.int64)
    if not len(rows):
        raise UserError(
            f"a share of {share:g} leaves none of the {num_rows:,} examples of `{source}`",
            where="data_shares",
            next_step="write a greater share, or leave this file out",
        )
    return rows


def join(
    parts: Sequence[tuple[TokenSequences, np.ndarray]], cache_folder: Path, key: str, check_stop: Callable[[], None]
) -> TokenSequences:
    """The chosen rows of several sequences, one after the other; out of the cache, or made now and kept there.

    Args:
        parts: sequences, and int64 rows of them; what is taken again has a number behind its id.
        key: of the cache's entry: all that decides the content.
    """
    entry = make_key(joined=key, reading_version=READING_VERSION)
    found = open_cached(cache_folder, entry)
    if found is not None:
        return found[0]
    has_weights = any(sequences.weights is not None for sequences, _ in parts)
    with CacheWriter(cache_folder, entry) as writer:
        for sequences, rows in parts:
            seen = np.zeros(sequences.num_rows, np.int64)
            for begin in range(0, len(rows), ROWS_AT_ONCE):
                check_stop()
                chosen = rows[begin : begin + ROWS_AT_ONCE]
                # A row is taken at most once a round, so this counts how often it was taken before.
                copies = np.empty(len(chosen), np.int64)
                for at, row in enumerate(chosen.tolist()):
                    seen[row] += 1
                    copies[at] = seen[row]
                _append(writer, sequences, chosen, copies, has_weights)
        return writer.finish({})


def join_parts(parts: Sequence[Part], cache_folder: Path, check_stop: Callable[[], None]) -> tuple[TokenSequences, str]:
    """The sequences of all parts, one after the other, and their key."""
    key = make_key(measured=[one.key for one in parts])
    if len(parts) == 1:
        return parts[0].sequences, key
    every = [(one.sequences, np.arange(one.sequences.num_rows)) for one in parts]
    return join(every, cache_folder, key, check_stop), key


def _append(
    writer: CacheWriter, sequences: TokenSequences, rows: np.ndarray, copies: np.ndarray, has_weights: bool
) -> None:
    indices = sequences.sequences_of(rows)
    offsets = np.asarray(sequences.offsets)
    lengths = offsets[indices + 1] - offsets[indices]
    at = flat_ranges(offsets[indices], offsets[indices + 1])
    weights = None
    if has_weights:
        weights = np.ones(len(at)) if sequences.weights is None else np.asarray(sequences.weights[at])
    sizes = np.ones(len(rows), np.int64)
    if sequences.row_start is not None:
        sizes = np.asarray(sequences.row_start[rows + 1] - sequences.row_start[rows])
    examples = [
        _copy(sequences.examples[index], copy)
        for index, copy in zip(indices.tolist(), np.repeat(copies, sizes).tolist(), strict=True)
    ]
    encoded = EncodedExamples(np.asarray(sequences.input_ids[at]), np.asarray(sequences.labels[at]), lengths, weights)
    writer.append(encoded, examples)
    if sequences.grades is not None:
        writer.append_rows(sizes, np.asarray(sequences.grades[indices]))


def _copy(example: Example, copy: int) -> Example:
    return example if copy == 1 else replace(example, id=f"{example.id} (copy {copy})")


def metric_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Short names for data sets, each another: `reviews` of `reviews.csv`, and more of the path where that is not
    enough."""
    for shorten in (_stem, _name, _whole):
        names = [shorten(source) for source in sources]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{_stem(source)}-{number}" for number, source in enumerate(sources, start=1))


def _stem(source: str) -> str:
    parts = source.rstrip("/").split("/")[-1].split(".")
    return _plain(parts[0] or ".".join(parts[1:]))


def _name(source: str) -> str:
    return _plain(source.rstrip("/").split("/")[-1])


def _whole(source: str) -> str:
    return _plain(source)


def _plain(text: str) -> str:
    return "-".join("".join(char if char.isalnum() or char in "_." else " " for char in text).split()) or "data"


def told_apart(paths: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of paths that are each another: `a/train.jsonl` and `b/train.jsonl`."""
    return tuple(next(_shortest_ends(path, paths)) for path in paths)


def _shortest_ends(path: str, others: Sequence[str]) -> Iterator[str]:
    parts = path.split("/")
    for number in range(1, len(parts)):
        end = "/".join(parts[-number:])
        if sum(other == end or other.endswith(f"/{end}") for other in others) == 1:
            yield end
    yield path
