"""What `prompt_format.json` may hold: texts that can be written, wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_model import write_tiny_model
from trietune.data.encoder import load_tokenizer
from trietune.data.prompt_formats import make_plain_format
from trietune.data.templates import PromptFormat
from trietune.errors import UserError

TEXTS = ["prompt_template", "completion_template", "chat_template", "system_prompt", "tokenizer_hash"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_plain_format(load_tokenizer(write_tiny_model(Path(tmp_path_factory.mktemp("model"))))).to_json()


@pytest.mark.parametrize("value", ["\ud83d", "a\udcff", None, 1, ["a"], {}])
@pytest.mark.parametrize("key", TEXTS)
def test_a_text_that_is_none_or_cannot_be_written_is_refused(written: str, key: str, value: object) -> None:
    assert PromptFormat.from_json(written).to_json() == written
    with pytest.raises(UserError, match="the prompt format cannot be read"):
        PromptFormat.from_json(json.dumps({**json.loads(written), key: value}))
