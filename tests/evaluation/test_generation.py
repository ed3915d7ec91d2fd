"""Generation on a shared trie says what greedy decoding says, one prompt at a time, without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.families import FAMILIES, VOCAB_SIZE

from trietune.evaluation.generation import GenerationLimits, generate
from trietune.model.causal_lm import TrieModel

STOP_IDS = frozenset(range(1, 120, 8))


def talkative(family: str) -> Any:
    """A network of the family with a head of its own: with tied random embeddings it would repeat its last token."""
    network = FAMILIES[family]()
    generator = torch.Generator().manual_seed(8)
    network.lm_head.weight = torch.nn.Parameter(torch.randn(network.lm_head.weight.shape, generator=generator))
    return network


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
@pytest.mark.parametrize("attention", ["rows", None])
def test_tokens_are_those_of_one_prompt_at_a_time(family: str, attention: Any) -> None:
    network = talkative(family)
    prompts = random_prompts(seed=4)
    expected = [decode_alone(network, prompt, max_new_tokens=10) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 2, "answers of several lengths make rows leave at several steps"
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    answers = generate(model, prompts, GenerationLimits(STOP_IDS, max_new_tokens=10, max_nodes=120, batch_size=6))
    assert answers == expected
