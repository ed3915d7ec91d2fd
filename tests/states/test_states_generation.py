"""Answers from a trie of prompts, going on from the states where these end, are those of one prompt at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from states.state_families import FAMILIES, VOCAB_SIZE, build
from trietune.evaluation.generation import GenerationLimits, generate, generate_and_score
from trietune.evaluation.scoring import FlatSequences, label_log_probabilities, no_progress, no_stop
from trietune.model.causal_lm import TrieModel

STOP_IDS = frozenset(range(1, VOCAB_SIZE, 8))
CPU = torch.device("cpu")
KINDS = ["lfm2", "qwen3_5_text", "bamba", "jamba"]
FP32_ROUNDING = 1e-4


def prompts() -> list[list[int]]:
    """Common beginnings, an equal pair, one that begins another, some shorter than a window."""
    draw = np.random.default_rng(4)
    stems = [draw.integers(3, VOCAB_SIZE, 12).tolist() for _ in range(2)]
    found = [stem[: draw.integers(4, 13)] + draw.integers(3, VOCAB_SIZE, 3).tolist() for stem in stems for _ in "123"]
    return [*found, found[0], found[1][:7], [5], [5, 9]]


@torch.no_grad()
def alone(network: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        token = int(network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token in STOP_IDS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def check(family: str, sizes: tuple[int, ...]) -> None:
    network = build(family)
    expected = [alone(network, prompt, 6) for prompt in prompts()]
    assert len({len(answer) for answer in expected}) > 2, "rows leave at several steps"
    model = TrieModel(network, device=CPU)
    for size in sizes:
        limits = GenerationLimits(STOP_IDS, max_new_tokens=6, max_positions=60, batch_size=size)
        assert generate(model, prompts(), limits) == expected, size


@pytest.mark.parametrize("family", KINDS)
def test_answers_are_those_of_one_prompt_at_a_time(family: str) -> None:
    check(family, (4,))  # rows join while others decode


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*KINDS, "kimi_linear")])
def test_every_familys_answers_are_those_of_one_prompt_at_a_time(family: str) -> None:
    check(family, (1, 6, 64))


def gold() -> FlatSequences:
    rows = [(prompt, [7, 9 + at % 3, 1]) for at, prompt in enumerate(prompts())]
    tokens = np.concatenate([np.array(prompt + answer) for prompt, answer in rows]).astype(np.int32)
    labels = np.concatenate([np.array([-100] * len(prompt) + answer) for prompt, answer in rows]).astype(np.int32)
    return FlatSequences(tokens, labels, np.concatenate(([0], np.cumsum([len(p) + len(a) for p, a in rows]))))


def test_losses_and_labels_are_scored_on_the_same_trie() -> None:
    network, sequences = build("qwen3_5_text"), gold()
    model, places = TrieModel(network, device=CPU), np.arange(len(prompts()))
    limits = GenerationLimits(STOP_IDS, max_new_tokens=4, max_positions=80, batch_size=6)
    answers, losses, weights = generate_and_score(model, sequences, places, limits)
    assert answers == [alone(network, prompt, 4) for prompt in prompts()]
    assert weights.tolist() == [3.0] * len(places)
    for at in places:
        begin, end = sequences.offsets[at : at + 2]
        tokens, labels = (torch.from_numpy(x[begin:end]).long() for x in (sequences.input_ids, sequences.labels))
        with torch.no_grad():
            logits = network(tokens[None], use_cache=False).logits[0, :-1]
        expected = float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        assert losses[at] == pytest.approx(expected, rel=FP32_ROUNDING)
    completions = [np.array([7, 9, 1], np.int32), np.array([8, 1], np.int32)]
    scores = label_log_probabilities(
        model, sequences, places, completions,
        batching="trie", max_positions=200, check_stop=no_stop, progress=no_progress,
    )  # fmt: skip
    said = np.arange(len(places)) % 3 == 0  # whose gold answer is the first completion
    assert np.allclose(scores[said, 0], -losses[said], rtol=FP32_ROUNDING)
