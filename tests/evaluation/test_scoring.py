"""Scores on a trie are those of plain rows, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.families import FAMILIES, VOCAB_SIZE, in_double

from trietune.errors import StopRequested
from trietune.evaluation import scoring
from trietune.evaluation.scoring import FlatSequences, label_log_probabilities, sequence_losses
from trietune.model.causal_lm import TrieModel
from trietune.trie import Batching, make_micro_batches

# fp64 throughout; what is left is the order of sums.
ROUNDING = 1e-10

COMPLETIONS = [np.array([50, 51, 1], np.int32), np.array([50, 60, 61, 1], np.int32), np.array([70, 1], np.int32)]


def random_prompts(seed: int, num_prompts: int = 9) -> FlatSequences:
    """Prompts with common beginnings, the first two equal, and no labels."""
    generator = np.random.default_rng(seed)
    stem = generator.integers(3, VOCAB_SIZE, 8)
    prompts = [
        np.concatenate((stem[: generator.integers(1, 9)], generator.integers(3, VOCAB_SIZE, generator.integers(1, 7))))
        for _ in range(num_prompts - 1)
    ]
    prompts.insert(0, prompts[0])
    return FlatSequences.without_labels(
        np.concatenate(prompts).astype(np.int32), np.array([len(prompt) for prompt in prompts])
    )


@torch.no_grad()
def log_probability(network: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    tokens = torch.tensor([[*prompt, *completion]])
    log_probs = network(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return float(log_probs[torch.arange(len(prompt) - 1, tokens.shape[1] - 1), tokens[0, len(prompt) :]].sum())


def prompt_of(prompts: FlatSequences, index: int) -> list[int]:
    tokens: list[int] = prompts.input_ids[prompts.offsets[index] : prompts.offsets[index + 1]].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batching", ["trie", "packed", "padded"])
def test_label_scores_are_those_of_plain_rows(family: str, batching: Batching) -> None:
    network = in_double(FAMILIES[family]())
    prompts, indices = random_prompts(seed=1), np.array([7, 0, 1, 3, 8])
    expected = np.array(
        [[log_probability(network, prompt_of(prompts, index), label) for label in COMPLETIONS] for index in indices]
    )
    model = TrieModel(network, device=torch.device("cpu"), attention=None if batching == "padded" else "rows")
    seen: list[tuple[str, int, int]] = []
    scores = label_log_probabilities(
        model,
        prompts,
        indices,
        COMPLETIONS,
        batching=batching,
        max_positions=30,
        check_stop=scoring.no_stop,
        progress=lambda *at: seen.append(at),
    )
    assert np.abs(scores - expected).max() < ROUNDING * np.abs(expected).max()
    assert seen[-1] == ("labels", 5, 5)
    assert scoring.label_probabilities(scores).sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("batching", ["trie", "packed", "padded"])
def test_sequence_losses_are_those_of_plain_rows_and_nothing_is_dropped(batching: Batching) -> None:
    network = in_double(FAMILIES["qwen2"]())
    prompts = random_prompts(seed=2)
    everyone = np.arange(len(prompts.offsets) - 1)
    sequences = scoring.branch(prompts, everyone, np.diff(prompts.offsets), COMPLETIONS)
    indices = np.random.default_rng(0).permutation(len(sequences.offsets) - 1)
    pairs = [divmod(int(index), len(COMPLETIONS)) for index in indices]
    # Before the model takes the network: transformers' eager attention, which stands in without a trie, rounds its
    # probabilities to fp32.
    expected = [-log_probability(network, prompt_of(prompts, at), COMPLETIONS[label]) for at, label in pairs]
    model = TrieModel(network, device=torch.device("cpu"), attention=None if batching == "padded" else "rows")
    losses, weights = sequence_losses(
        model,
        sequences,
        indices,
        batching=batching,
        max_positions=40,
        check_stop=scoring.no_stop,
        progress=scoring.no_progress,
    )
    assert np.abs(losses - expected).max() < ROUNDING * max(expected)
    assert weights.tolist() == [len(COMPLETIONS[label]) for _, label in pairs]


def test_a_prompt_is_computed_once_for_all_its_labels() -> None:
    prompts = random_prompts(seed=3)
    branches = scoring.branch(prompts, np.array([0, 1]), np.diff(prompts.offsets)[[0, 1]], COMPLETIONS)
    [micro_batch] = make_micro_batches(branches, np.arange(6), batching="trie", max_positions=1000)
    # Prompts 0 and 1 are equal. Of the labels 50 51 1, 50 60 61 1 and 70 1 only 50, 51, 60, 61 and 70 are computed.
    assert micro_batch.num_positions == len(prompt_of(prompts, 0)) + 5


def test_planning_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = in_double(FAMILIES["llama"]())
    model = TrieModel(network, device=torch.device("cpu"))
    prompts = random_prompts(seed=4)

    def score() -> tuple[np.ndarray, list[int]]:
        done: list[int] = []
        scores = label_log_probabilities(
            model,
            prompts,
            np.arange(9),
            COMPLETIONS,
            batching="trie",
            max_positions=1000,
            check_stop=scoring.no_stop,
            progress=lambda phase, num_done, total: done.append(num_done),
        )
        return scores, done

    at_once, _ = score()
    monkeypatch.setattr(scoring, "SEQUENCES_PLANNED_AT_ONCE", 12)
    in_chunks, done = score()
    assert done == [4, 8, 9]
    assert np.abs(at_once - in_chunks).max() < ROUNDING * np.abs(at_once).max()


def test_prompts_end_before_the_first_label() -> None:
    labels = np.array([-100, -100, 5, 1, -100, -100, 7, -100, 8, -100], np.int32)
    sequences = FlatSequences(np.arange(10, dtype=np.int32), labels, np.array([0, 4, 6, 6, 9, 10]))
    assert scoring.find_prompt_lengths(sequences).tolist() == [2, 2, 0, 0, 1]


def test_the_modes_of_all_modules_come_back(fails: Callable[[], None]) -> None:
    network = FAMILIES["llama"]()
    network.train()
    network.model.layers[0].eval()
    before = [module.training for module in network.modules()]
    with scoring.inference(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == before
    with pytest.raises(StopRequested), scoring.inference(network):
        fails()
    assert [module.training for module in network.modules()] == before


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_an_evaluation(family: str) -> None:
    network = FAMILIES[family]()
    model = TrieModel(network, device=torch.device("cpu"))
    prompts = random_prompts(seed=5)
    sequences = scoring.branch(prompts, np.arange(9), np.diff(prompts.offsets), COMPLETIONS)
    [micro_batch] = make_micro_batches(sequences, np.arange(27), batching="trie", max_positions=1000)
    with scoring.inference(network):
        loss = model.label_losses(micro_batch).sum()
    trained = model.label_losses(micro_batch).sum()
    trained.backward()
    assert torch.equal(loss, trained.detach())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_stop_is_noticed_between_micro_batches(fails: Callable[[], None]) -> None:
    model = TrieModel(FAMILIES["llama"](), device=torch.device("cpu"))
    with pytest.raises(StopRequested):
        label_log_probabilities(
            model,
            random_prompts(seed=6),
            np.arange(9),
            COMPLETIONS,
            batching="trie",
            max_positions=30,
            check_stop=fails,
            progress=scoring.no_progress,
        )


@pytest.fixture
def fails() -> Callable[[], None]:
    def fail() -> None:
        raise StopRequested("SIGTERM", 143)

    return fail
