"""Fixtures of the tests about data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizer_families import BUILDERS, GEMMA_FOLDER, Family, gemma
from transformers import AutoTokenizer


@pytest.fixture(scope="session", params=[*BUILDERS, "gemma-real"])
def family(request: pytest.FixtureRequest) -> Family:
    """Each tokenizer family in turn, Gemma's real tokenizer last."""
    if request.param == "gemma-real":
        if not GEMMA_FOLDER.is_dir():
            pytest.skip("Gemma's tokenizer is not on this machine")
        return Family("gemma-real", AutoTokenizer.from_pretrained(GEMMA_FOLDER), has_bos=True)
    return Family(request.param, BUILDERS[request.param](), has_bos=request.param != "qwen")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One tokenizer for tests about data rather than tokens."""
    return gemma()


@pytest.fixture
def make_settings() -> Any:
    """Settings with the defaults of the data keys, any of them given by name."""

    def make(**changes: Any) -> Any:
        defaults = {
            "dataset_id": "stanfordnlp/sst2",
            "train_file": None,
            "validation_file": None,
            "dataset_split": None,
            "max_train_examples": None,
            "max_length": 512,
            "overlong": "drop",
            "prompt_template": None,
            "completion_template": None,
            "chat_template": None,
            "ignored_index": -100,
        }
        unknown = changes.keys() - defaults.keys()
        assert not unknown, unknown
        # `where` is what the real settings have: which values are the user's own.
        return SimpleNamespace(
            **{**defaults, **changes}, where=lambda key: "test.yaml, line 1" if key in changes else "default"
        )

    return make
