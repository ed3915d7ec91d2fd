"""Score what a data set says, or could have said: token-weighted losses, and every label of every example.

A label task asks which completion the model finds most likely. All of them share their prompt, so they are branches of
one trie, and the prompt is computed once:

    Review : a fine film \\n Output :  {" label ": " positive "} <eos>
                                                  |  negative "} <eos>

The true label's branch is the example itself, so the validation loss comes out of the same pass. The whole set is
sorted first: neighbors share as much as they ever can. Nothing is drawn, dropped or cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from trietune.data.examples import IGNORED_LABEL, Task
from trietune.trie import Batching, MicroBatch, Sequences, make_micro_batches, sort_sequences

# Sequences planned at once: enough that cutting them into micro-batches wastes nothing, few enough to plan at ease.
SEQUENCES_PLANNED_AT_ONCE = 4096

CheckStop = Callable[[], None]
Progress = Callable[[str, int, int], None]


def no_stop() -> None:
    """Default: never stops."""


def no_progress(phase: str, num_done: int, num_examples: int) -> None:
    """Default: reports nothing."""


class ScoringModel(Protocol):
    """What scoring needs of a model; `trietune.model.causal_lm.TrieModel` is one."""

    @property
    def network(self) -> torch.nn.Module: ...

    def pad_to_shapes(self, micro_batches: Sequence[MicroBatch], /) -> Sequence[MicroBatch]: ...

    def label_losses(self, micro_batch: MicroBatch, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class FlatSequences:
    """Token sequences with labels, flat: `TokenSequences` without ids and text."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    @classmethod
    def without_labels(cls, input_ids: np.ndarray, lengths: np.ndarray) -> FlatSequences:
        """Sequences of these lengths, laid end to end in `input_ids` (int32), none of whose tokens is labeled."""
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        return cls(input_ids, np.full(len(input_ids), IGNORED_LABEL, np.int32), offsets)


def sequence_losses(
    model: ScoringModel,
    sequences: Sequences,
    indices: np.ndarray,
    *,
    batching: Batching,
    max_positions: int,
    check_stop: CheckStop,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each of `sequences[indices]`, summed over its label tokens, and how many those are; both float64 [B]."""
    lengths = np.diff(sequences.offsets)[indices]
    losses, weights = np.zeros(len(indices)), np.zeros(len(indices))
    num_done = 0
    with inference(model.network):
        for chunk in _sorted_chunks(sequences, indices, lengths, chunk_size=SEQUENCES_PLANNED_AT_ONCE):
            losses[chunk], weights[chunk] = _score(
                model, sequences, indices[chunk], batching=batching, max_positions=max_positions, check_stop=check_stop
            )
            num_done += len(chunk)
            progress("loss", num_done, len(indices))
    return losses, weights


def label_log_probabilities(
    model: ScoringModel,
    prompts: Sequences,
    indices: np.ndarray,
    completions: Sequence[np.ndarray],
    *,
    batching: Batching,
    max_positions: int,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Log-probability of each completion after each prompt, summed over its tokens; float64 [B, number of labels].

    Args:
        prompts: sequences whose prompt ends before their first labeled token, or with the sequence if none is.
        indices: int64 [B], which of them.
        completions: the token ids of each label's completion, the end-of-sequence token included.
    """
    prompt_lengths = find_prompt_lengths(prompts)[indices]
    scores = np.zeros((len(indices), len(completions)))
    num_done = 0
    with inference(model.network):
        chunk_size = max(1, SEQUENCES_PLANNED_AT_ONCE // len(completions))
        for chunk in _sorted_chunks(prompts, indices, prompt_lengths, chunk_size=chunk_size):
            branches = branch(prompts, indices[chunk], prompt_lengths[chunk], completions)
            losses, _ = _score(
                model,
                branches,
                np.arange(len(branches.offsets) - 1),
                batching=batching,
                max_positions=max_positions,
                check_stop=check_stop,
            )
            scores[chunk] = -losses.reshape(len(chunk), len(completions))
            num_done += len(chunk)
            progress("labels", num_done, len(indices))
    return scores


def label_probabilities(log_probabilities: np.ndarray) -> np.ndarray:
    """Softmax over the labels: how sure the model is of each, if one of them it must be; float64 [B, labels]."""
    shifted = np.exp(log_probabilities - log_probabilities.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def find_prompt_lengths(sequences: Sequences) -> np.ndarray:
    """Tokens before the first labeled one; the whole sequence where none is. int64 [number of sequences]."""
    offsets = np.asarray(sequences.offsets)
    labeled = np.append(np.flatnonzero(np.asarray(sequences.labels) != IGNORED_LABEL), offsets[-1])
    first = labeled[np.searchsorted(labeled, offsets[:-1])]
    return np.asarray(np.minimum(first, offsets[1:]) - offsets[:-1])


def branch(
    prompts: Sequences, indices: np.ndarray, prompt_lengths: np.ndarray, completions: Sequence[np.ndarray]
) -> FlatSequences:
    """Every prompt followed by every completion, completions innermost; only completions carry labels."""
    starts = np.asarray(prompts.offsets)[indices]
    input_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for start, length in zip(starts.tolist(), prompt_lengths.tolist(), strict=True):
        prompt = prompts.input_ids[start : start + length]
        unlabeled = np.full(length, IGNORED_LABEL, np.int32)
        for completion in completions:
            input_ids += (prompt, completion)
            labels += (unlabeled, completion)
    lengths = prompt_lengths[:, None] + np.array([len(completion) for completion in completions])
    return FlatSequences(
        input_ids=np.concatenate(input_ids).astype(np.int32),
        labels=np.concatenate(labels).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths.ravel()))).astype(np.int64),
    )


def add_up(
    losses: np.ndarray, weights: np.ndarray, micro_batch: MicroBatch, places: np.ndarray, pair_losses: np.ndarray
) -> None:
    """Add what a micro-batch found to `losses` and `weights`, float64 [B], in place.

    Args:
        places: where in them each sequence of the micro-batch belongs.
        pair_losses: float64 [N], of each (position, label) pair.
    """
    place_of_label = places[micro_batch.sequence_of_label]
    losses += np.bincount(place_of_label, weights=pair_losses[micro_batch.pair_of_label], minlength=len(losses))
    weights += np.bincount(place_of_label, minlength=len(weights))


@contextmanager
def inference(network: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; each module's own mode comes back afterwards, also after an error."""
    was_training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        # Not `inference_mode`: XLA counts versions of tensors, which inference tensors have none of.
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _score(
    model: ScoringModel,
    sequences: Sequences,
    indices: np.ndarray,
    *,
    batching: Batching,
    max_positions: int,
    check_stop: CheckStop,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of labels of each of `sequences[indices]`; indices are distinct."""
    place = np.zeros(len(sequences.offsets) - 1, np.int64)
    place[indices] = np.arange(len(indices))
    losses, weights = np.zeros(len(indices)), np.zeros(len(indices))
    micro_batches = make_micro_batches(sequences, indices, batching=batching, max_positions=max_positions)
    for micro_batch in model.pad_to_shapes(micro_batches):
        check_stop()
        pair_losses = model.label_losses(micro_batch).cpu().double().numpy()
        add_up(losses, weights, micro_batch, place[micro_batch.sequence_indices], pair_losses)
    return losses, weights


def _sorted_chunks(
    sequences: Sequences, indices: np.ndarray, lengths: np.ndarray, *, chunk_size: int
) -> Iterator[np.ndarray]:
    """Places in `indices`, sorted by the first `lengths` tokens of the sequences there, a chunk at a time."""
    order = sort_sequences(np.asarray(sequences.input_ids), np.asarray(sequences.offsets)[indices], lengths)
    for start in range(0, len(order), chunk_size):
        yield order[start : start + chunk_size]


def names_of(task: Task) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of a task's labels, each once, and which of them each label has; int64 [labels].

    Labels that differ only in spaces at their ends have one name.
    """
    names = tuple(dict.fromkeys(task.label_names))
    return names, np.array([names.index(name) for name in task.label_names], np.int64)


def sum_by_name(probabilities: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """The probability of each name: that of all labels that have it; float64 [B, count]."""
    summed = np.zeros((len(probabilities), count))
    for label, name in enumerate(group.tolist()):
        summed[:, name] += probabilities[:, label]
    return summed
