"""The first batch of a run as a picture: `batch.json`, which the report draws.

{"segments": [[0, 2, 0, 2, "5 6", []], ...]}      first and last example, begin and end, text, label stretches
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trietune.io import files, strict_json
from trietune.tracking.report.record import BATCH_PICTURE
from trietune.trie import Sequences
from trietune.trie.picture import label_runs, picture_batch

# More than a screen can show; what is left out is counted.
MOST_EXAMPLES = 64
LONGEST_TEXT = 1200


def write_batch_picture(
    directory: Path, sequences: Sequences, indices: np.ndarray, ids: Sequence[str], tokenizer: Any
) -> None:
    """Write `batch.json` into a run's folder, whole or not at all.

    Args:
        sequences: the training data.
        indices: the sequences of the batch.
        ids: id of the example that each of them belongs to.
        tokenizer: a fast tokenizer of transformers.
    """
    document = describe_batch(sequences, indices, ids, tokenizer)
    files.replace_file(directory / BATCH_PICTURE, strict_json.serialize(document))


def describe_batch(sequences: Sequences, indices: np.ndarray, ids: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """The document: three counts of positions over the whole batch, and the picture of at most `MOST_EXAMPLES`."""
    whole = _picture(sequences, indices)
    shown = indices[:MOST_EXAMPLES]
    picture = whole if len(shown) == len(indices) else _picture(sequences, shown)
    segments = []
    for segment in picture.segments:
        index = shown[picture.order[segment.first]]
        begin = int(sequences.offsets[index]) + segment.depth
        # An example's last label is predicted and never read: not a position, but its text belongs to the picture.
        end = int(sequences.offsets[index]) + segment.end
        is_last = segment.end == picture.lengths[segment.first]
        shown_end = min(end + 1, int(sequences.offsets[index + 1])) if is_last else end
        text = tokenizer.decode(np.asarray(sequences.input_ids[begin:shown_end]).tolist())
        runs = label_runs(np.asarray(sequences.labels), begin, end)
        segments.append([segment.first, segment.last, segment.depth, segment.end, _shortened(text), runs])
    return {
        "version": 1,
        "num_examples": len(indices),
        "num_left_out": len(indices) - len(shown),
        "num_padded": whole.num_padded,
        "num_real": whole.num_real,
        "num_distinct": whole.num_distinct,
        "ids": [ids[number] for number in picture.order],
        "lengths": list(picture.lengths),
        "segments": segments,
    }


def _picture(sequences: Sequences, indices: np.ndarray) -> Any:
    bounds = [(int(sequences.offsets[index]), int(sequences.offsets[index + 1])) for index in indices]
    ids = [np.asarray(sequences.input_ids[begin:end]) for begin, end in bounds]
    labels = [np.asarray(sequences.labels[begin:end]) for begin, end in bounds]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])]).astype(np.int64)
    empty = np.zeros(0, np.int32)
    return picture_batch(np.concatenate([*ids, empty]), np.concatenate([*labels, empty]), offsets)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"
