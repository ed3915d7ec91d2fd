"""What the table of all types promises, and a few of them tried anew, as `make test-families` tries them all."""

from __future__ import annotations

from typing import Any

import pytest

from causal_types.models_page import NUM_TYPES, PAGE, page_of
from causal_types.small_models import causal_types
from causal_types.try_types import complete, read_table, try_type

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Attention in chunks, which changes what a projection returned in place; a bias by distance made of the mask.
TRIED = ("bloom",)
# Conv1D layers and dropout; experts in one parameter; values of another size than keys; streams beside each other;
# no dense layer that the memory estimate knew; a state and no attention; positions by index.
TRIED_SLOWLY = ("gpt2", "mixtral", "deepseek_v3", "gemma3n_text", "llama4_text", "mpt", "rwkv", "roberta", "smollm3")

ROWS = read_table()
OF_TEXT = [row for row in ROWS if not row.get("is_multimodal")]


def fails(row: dict[str, Any]) -> list[str]:
    """What a row of the table must not say."""
    found = [
        f"{row['type']}: {way} {row[way]['status']}"
        for way in ("trie", "padded", "bf16", "heads")
        if row.get(way, {}).get("status") in ("WRONG", "crashed", "proven")
    ]
    return found + [
        f"{row['type']}: a broken {name} is missed" for name, x in row.get("caught", {}).items() if x == "MISSED"
    ]


@pytest.mark.parametrize("model_type", [*TRIED, *(pytest.param(name, marks=pytest.mark.slow) for name in TRIED_SLOWLY)])
def test_gradients_are_those_of_a_plain_loop_and_broken_ones_are_caught(model_type: str) -> None:
    row = complete(model_type, try_type(model_type))
    assert not fails(row), row
    assert row["trie"]["status"] == row["padded"]["status"] == "exact", row
    assert "caught" in row["caught"].values()


def test_what_is_not_settled_is_known_by_name() -> None:
    """Further from the loop in fp32 than the bound, as padded rows are: rounding or not, fp64 has to tell."""
    assert [row["type"] for row in ROWS if row.get("trie", {}).get("status") == "unsettled"] == ["hrm_text"]


def test_nothing_in_the_table_is_wrong_crashes_or_goes_unnoticed() -> None:
    assert [text for row in ROWS for text in fails(row)] == []


def test_what_is_refused_is_told_a_way_that_was_tried() -> None:
    for row in ROWS:
        if row.get("trie", {}).get("status") != "refused":
            continue
        advises_padded = "batching=padded" in str(row["trie"]["next"])
        assert advises_padded == (row["padded"]["status"] == "exact"), row


def test_the_table_is_of_types_of_the_installed_transformers() -> None:
    import transformers

    if transformers.__version__ != ROWS[0]["transformers"]:
        pytest.skip(f"the table is of transformers {ROWS[0]['transformers']}")
    assert len(causal_types()) == NUM_TYPES[transformers.__version__]
    assert {row["type"] for row in OF_TEXT} <= set(causal_types())


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text() == page_of(ROWS), "python tests/causal_types/models_page.py writes it anew"
