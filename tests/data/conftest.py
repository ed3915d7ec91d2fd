"""Fixtures of the tests about data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizer_families import BUILDERS, GEMMA_FOLDER, Family, gemma
from transformers import AutoTokenizer

from trietune.config import Settings, load_config


@pytest.fixture(scope="session", params=[*BUILDERS, "gemma-real"])
def family(request: pytest.FixtureRequest) -> Family:
    """Each tokenizer family in turn, Gemma's real tokenizer last."""
    if request.param == "gemma-real":
        if not GEMMA_FOLDER.is_dir():
            pytest.skip("Gemma's tokenizer is not on this machine")
        return Family("gemma-real", AutoTokenizer.from_pretrained(GEMMA_FOLDER), adds_bos=True)
    return Family(request.param, BUILDERS[request.param](), adds_bos=request.param in ("llama2", "gemma", "unigram"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One tokenizer for tests about data rather than tokens."""
    return gemma()


@pytest.fixture
def make_settings() -> Callable[..., Settings]:
    """Settings by keyword; room for long sequences unless `max_length` is given."""

    def make(**changes: Any) -> Settings:
        return load_config(overrides={"max_length": 512, **changes}, environ={})

    return make
