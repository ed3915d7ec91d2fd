"""Generation on a shared trie says what greedy decoding says, one prompt at a time, without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.families import FAMILIES, VOCAB_SIZE

from slow_cases import slow_but
from trietune.errors import StopRequested
from trietune.evaluation import decoding
from trietune.evaluation.generation import GenerationLimits, generate, generate_and_score
from trietune.evaluation.scoring import FlatSequences, no_progress, no_stop, sequence_losses
from trietune.model.causal_lm import TrieModel

# Sums of fp32 losses in another order.
FP32_ROUNDING = 1e-5

STOP_IDS = frozenset(range(1, 120, 8))


def random_prompts(seed: int, *, num_stems: int = 3, per_stem: int = 5) -> list[list[int]]:
    """Prompts with common beginnings, an equal pair, one that begins another, one of a single token."""
    generator = np.random.default_rng(seed)
    stems = [generator.integers(3, VOCAB_SIZE, 12).tolist() for _ in range(num_stems)]
    prompts = [
        stem[: generator.integers(4, 13)] + generator.integers(3, VOCAB_SIZE, generator.integers(1, 6)).tolist()
        for stem in stems
        for _ in range(per_stem)
    ]
    prompts += [prompts[0], prompts[1][:7], [5]]
    order = generator.permutation(len(prompts))
    return [prompts[i] for i in order]


@torch.no_grad()
def decode_alone(network: torch.nn.Module, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding as its definition says: the whole sequence through the network for every token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        logits = network(input_ids=torch.tensor([tokens]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in STOP_IDS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", slow_but(["rows", "mask", None], "rows"))
def test_tokens_are_those_of_one_prompt_at_a_time(family: str, attention: Any, talkative: Any) -> None:
    network = talkative(family)
    prompts = random_prompts(seed=4)
    expected = [decode_alone(network, prompt, max_new_tokens=10) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 2, "answers of several lengths make rows leave at several steps"
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    before = network.config._attn_implementation
    for batch_size in (1, 6, 64):
        seen: list[tuple[str, int, int]] = []
        limits = GenerationLimits(STOP_IDS, max_new_tokens=10, max_positions=120, batch_size=batch_size)
        answers = generate(model, prompts, limits, progress=lambda *at, seen=seen: seen.append(at))
        assert answers == expected
        assert seen[-1] == ("answers", len(prompts), len(prompts))
    assert network.config._attn_implementation == before


def test_a_row_for_each_group_and_one_group_for_all_say_the_same(
    talkative: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TrieModel(talkative("gemma2"), device=torch.device("cpu"))
    prompts = random_prompts(seed=5)
    limits = GenerationLimits(STOP_IDS, max_new_tokens=8, max_positions=1000, batch_size=8)
    answers = []
    for scores_worth_a_group in (0, 40, 10**9):
        monkeypatch.setattr(decoding, "SCORES_WORTH_A_GROUP", scores_worth_a_group)
        answers.append(generate(model, prompts, limits))
    assert answers[0] == answers[1] == answers[2]


def test_rows_outgrow_the_memory_that_was_first_kept(talkative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FIRST_CAPACITY", 2)
    network = talkative("qwen2")
    model = TrieModel(network, device=torch.device("cpu"))
    prompts = random_prompts(seed=7)
    expected = [decode_alone(network, prompt, max_new_tokens=13) for prompt in prompts]
    assert max(map(len, expected)) == 13
    limits = GenerationLimits(STOP_IDS, max_new_tokens=13, max_positions=1000, batch_size=6)
    assert generate(model, prompts, limits) == expected


def test_groups_keep_together_what_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SCORES_WORTH_A_GROUP", 400)
    # Nodes of two paragraphs of 300 tokens; three questions of 2 tokens behind the first, one behind the second.
    on_path = np.zeros((4, 608), bool)
    for row, (context, question) in enumerate(((0, 300), (0, 302), (0, 304), (306, 606))):
        on_path[row, context : context + 300] = on_path[row, question : question + 2] = True
    assert decoding.cut_into_groups(on_path) == [(0, 3), (3, 4)]


@pytest.mark.parametrize("attention", ["rows", None])
def test_every_distinct_context_is_computed_once(attention: Any, talkative: Any) -> None:
    network = talkative("llama")
    context = list(range(10, 40))
    prompts = [[*context, question] for question in (50, 51, 52, 50)]
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    num_positions: list[int] = []
    network.model.layers[0].register_forward_pre_hook(
        lambda module, arguments: num_positions.append(arguments[0].shape[0] * arguments[0].shape[1])
    )
    generate(model, prompts, GenerationLimits(frozenset(), max_new_tokens=3, max_positions=1000, batch_size=4))
    # The tokens of the trie and then three distinct rows a step; padded rows compute four whole prompts.
    assert num_positions == ([33, 3, 3] if attention == "rows" else [124, 4, 4])


@pytest.mark.parametrize("attention", ["rows", None])
def test_losses_of_gold_completions_come_with_the_answers(attention: Any, talkative: Any) -> None:
    network = talkative("qwen2")
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    prompts = random_prompts(seed=6)
    completions = [[60 + at % 3, 61, 1][at % 2 :] for at in range(len(prompts))]
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    sequences = FlatSequences(
        np.concatenate([[*p, *c] for p, c in zip(prompts, completions, strict=True)]).astype(np.int32),
        np.concatenate([[-100] * len(p) + c for p, c in zip(prompts, completions, strict=True)]).astype(np.int32),
        np.concatenate(([0], np.cumsum(lengths))),
    )
    indices = np.random.default_rng(1).permutation(len(prompts))[:11]
    limits = GenerationLimits(STOP_IDS, max_new_tokens=6, max_positions=90, batch_size=5)
    answers, losses, weights = generate_and_score(model, sequences, indices, limits)
    assert answers == generate(model, [prompts[index] for index in indices], limits)
    expected, num_labels = sequence_losses(
        model,
        sequences,
        indices,
        batching="padded",
        max_positions=200,
        check_stop=no_stop,
        progress=no_progress,
    )
    assert weights.tolist() == num_labels.tolist() == [len(completions[index]) for index in indices]
    assert np.abs(losses - expected).max() < FP32_ROUNDING * expected.max()


@pytest.mark.parametrize("attention", ["rows", None])
def test_tokens_are_told_as_they_come(attention: Any, talkative: Any) -> None:
    model = TrieModel(talkative("llama"), device=torch.device("cpu"), attention=attention)
    told: list[int] = []
    limits = GenerationLimits(STOP_IDS, max_new_tokens=7, max_positions=100, batch_size=1)
    [answer] = generate(model, [[5, 6]], limits, on_token=lambda places, token: told.append(token))
    assert told[: len(answer)] == answer
    assert len(told) <= len(answer) + 1


@pytest.mark.parametrize("attention", ["rows", None])
def test_a_stop_is_noticed_between_decoding_steps(attention: Any, talkative: Any) -> None:
    network = talkative("mistral")
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    before = network.config._attn_implementation
    network.train()
    num_checks = 0

    def stop_at_the_third_check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise StopRequested("SIGINT", 130)

    limits = GenerationLimits(frozenset(), max_new_tokens=20, max_positions=100, batch_size=4)
    with pytest.raises(StopRequested):
        generate(model, [[5, 6]], limits, check_stop=stop_at_the_third_check)
    assert network.config._attn_implementation == before
    assert network.training


def test_nothing_to_say_and_nobody_to_say_it_to(talkative: Any) -> None:
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    limits = GenerationLimits(frozenset(range(VOCAB_SIZE)), max_new_tokens=5, max_positions=100, batch_size=4)
    assert generate(model, [[5, 6], [7]], limits) == [[], []]
    assert generate(model, [], limits) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[5], []], limits)
