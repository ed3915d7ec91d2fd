"""A tokenizer whose tokens are characters, so that tiny networks with 120 tokens can read any text."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.model.families import FAMILIES, VOCAB_SIZE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trietune.data.encoder import Encoder, make_encoder
from trietune.data.examples import Example, Task, TokenSequences
from trietune.data.templates import PromptFormat


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    vocabulary |= {character: number for number, character in enumerate(string.printable[:96] + "\n", start=4)}
    assert len(vocabulary) <= VOCAB_SIZE
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def make_test_encoder(tokenizer: Any) -> Callable[..., Encoder]:
    """An encoder for a task; another tokenizer, and any field of the prompt format, by name."""

    def make(task: Task, tokenizer: Any = tokenizer, **changes: Any) -> Encoder:
        fields: dict[str, Any] = {
            "kind": "template",
            "prompt_template": "",
            "completion_template": "",
            "chat_template": "",
            "parses_special_tokens": False,
            "bos_id": 2,
            "eos_id": 1,
            "stop_ids": (1,),
            "task": task,
            "tokenizer_hash": "",
        }
        return make_encoder(tokenizer, PromptFormat(**{**fields, **changes}))

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[[Encoder, Sequence[Example]], TokenSequences]:
    def encode(encoder: Encoder, examples: Sequence[Example]) -> TokenSequences:
        encoded = encoder.encode(examples)
        offsets = np.concatenate(([0], np.cumsum(encoded.lengths))).astype(np.int64)
        return TokenSequences(
            encoded.input_ids, encoded.labels, offsets, [example.id for example in examples], examples
        )

    return encode


@pytest.fixture
def talkative() -> Callable[[str], Any]:
    """A network of a family with a head of its own: with tied random embeddings it would repeat its last token."""
    import torch

    def make(family: str) -> Any:
        network = FAMILIES[family]()
        weights = torch.randn(network.lm_head.weight.shape, generator=torch.Generator().manual_seed(8))
        network.lm_head.weight = torch.nn.Parameter(weights)
        return network

    return make
