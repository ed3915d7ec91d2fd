"""A few of the causal types, as `make test-families` tries them all: one of each kind that once went wrong."""

from __future__ import annotations

import pytest

from causal_types.small_models import causal_types
from causal_types.try_types import try_type

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Conv1D layers and dropout; experts in one parameter; no configuration that the memory estimate knew.
EXACT_ON_A_TRIE = ("gpt2", "mixtral")
EXACT_PADDED = ("rwkv", "mpt")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT_ON_A_TRIE)
def test_a_trie_trains_the_adapter_of_a_plain_loop(model_type: str) -> None:
    row = try_type(model_type)
    assert row["trie"]["status"] == row["padded"]["status"] == "exact", row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT_PADDED)
def test_where_a_trie_is_refused_padded_rows_train_the_adapter_of_a_plain_loop(model_type: str) -> None:
    row = try_type(model_type)
    assert row["trie"]["status"] == "refused"
    assert "batching=padded" in row["trie"]["said"]
    assert row["padded"]["status"] == "exact", row


def test_every_type_of_the_installed_transformers_is_in_the_list() -> None:
    assert len(causal_types()) > 150
    assert {"llama", "gpt2", "mixtral", "gpt_oss"} <= set(causal_types())
