"""Weights of labels: the gradients are those of a flat loop over rows, each label's loss times its weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from parity.test_gradients import FP64_TOLERANCE, build, gradients, relative_error
from strategies import FlatSequences, question_batch
from trietune.device.cpu import describe_cpu
from trietune.model.causal_lm import TrieModel
from trietune.training.objectives.learning import Work
from trietune.training.objectives.sft import LearnWeightedLabels, learn_labels
from trietune.trie import MicroBatch, make_micro_batches


def weighted_batch(*, seed: int = 3) -> tuple[FlatSequences, np.ndarray]:
    """A batch with equal sequences, a first token with a label, and labels of weight 0, which have become none."""
    draw = np.random.default_rng(seed)
    batch = question_batch(draw, vocabulary=120)
    weights = np.round(draw.normal(size=len(batch.labels)), 2)
    weights[draw.random(len(weights)) < 0.2] = 0
    batch.labels[weights == 0] = -100
    return batch, weights


def flat_loop(family: str, batch: FlatSequences, weights: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    network = build(family, torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        for place in range(begin + 1, end):
            if batch.labels[place] != -100:
                tokens = torch.from_numpy(batch.input_ids[begin:place].astype(np.int64))[None]
                logits = network(input_ids=tokens, use_cache=False).logits[:, -1]
                label = torch.tensor([int(batch.labels[place])])
                total = total + weights[place] * cross_entropy(logits, label)
                count += 1
    loss = total / count
    loss.backward()
    return loss.item(), gradients(network)


def learn(
    family: str, batch: FlatSequences, weights: np.ndarray, batching: str, max_positions: int
) -> tuple[float, dict]:
    network = build(family, torch.float64)
    model = TrieModel(network, device=torch.device("cpu"), attention=None if batching == "padded" else "rows")
    parts = np.array_split(np.random.default_rng(1).permutation(len(batch)), 2)
    micro_batches: list[MicroBatch] = []
    for part in parts:
        micro_batches += make_micro_batches(batch, part, batching=batching, max_positions=max_positions)
    work = Work(np.arange(len(batch)), micro_batches, describe_cpu(), lambda: None, None)
    learnt = LearnWeightedLabels.of(batch, weights)(model, work)
    return float(learnt.loss), gradients(network)


@pytest.mark.parametrize("batching", ["trie", "packed", "padded"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_weighted_labels_have_the_gradients_of_a_flat_loop(family: str, batching: str) -> None:
    batch, weights = weighted_batch()
    loss, expected = flat_loop(family, batch, weights)
    for max_positions in (10_000, 60):
        ours, found = learn(family, batch, weights, batching, max_positions)
        assert abs(ours - loss) < FP64_TOLERANCE * abs(loss)
        assert relative_error(found, expected) < FP64_TOLERANCE


def test_weights_of_one_change_nothing() -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    ours, found = learn("llama", batch, np.ones(len(batch.labels)), "trie", 60)
    network = build("llama", torch.float64)
    model = TrieModel(network, device=torch.device("cpu"), attention="rows")
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=60)
    plain = learn_labels(model, Work(np.arange(len(batch)), micro_batches, describe_cpu(), lambda: None, None))
    assert abs(ours - float(plain.loss)) < FP64_TOLERANCE
    assert relative_error(found, gradients(network)) < FP64_TOLERANCE
