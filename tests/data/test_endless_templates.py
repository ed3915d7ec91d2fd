"""Chat templates that do not come to an end: left after a while, or at the first signal."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_model import write_tiny_model
from trietune.config import load_config
from trietune.data import chat
from trietune.data.columns import WrongRow
from trietune.data.encoder import load_tokenizer
from trietune.data.examples import Message
from trietune.data.interruptible import TookTooLong, interruptible
from trietune.data.load import load_data
from trietune.errors import StopRequested, UserError

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
]
TURN = (Message("user", "a"), Message("assistant", "b"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def split(tokenizer: Any, template: str, **more: Any) -> Any:
    return chat.split_turns(TURN, tokenizer=tokenizer, chat_template=template, add_generation_prompt=False, **more)


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_template_is_a_wrong_row(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS_OF_A_TEMPLATE", 0.3)
    with pytest.raises(WrongRow, match="not come to an end"):
        split(tokenizer, template)


def test_a_stop_is_answered_while_a_template_runs(tokenizer: Any) -> None:
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()

    def check_stop() -> None:
        if stopped.is_set():
            raise StopRequested("SIGTERM", 143)

    with pytest.raises(StopRequested):
        split(tokenizer, ENDLESS[0], check_stop=check_stop)


def test_data_with_an_endless_template_are_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS_OF_A_TEMPLATE", 0.2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    settings = load_config(overrides={"train_file": str(rows), "chat_template": ENDLESS[0]}, environ={})
    with pytest.raises(UserError, match="not come to an end"):
        load_data(
            settings,
            tokenizer,
            cache_folder=tmp_path / "cache",
            report=lambda text: None,
            progress=lambda phase, done, total: None,
            check_stop=lambda: None,
        )


def test_a_template_that_writes_the_world_is_a_wrong_row(tokenizer: Any) -> None:
    with pytest.raises(WrongRow, match="characters of"):
        split(tokenizer, "{{ 'a' * 5000000 }}{% for m in messages %}{{ m.content }}{% endfor %}")


def test_many_short_blocks_are_never_interrupted() -> None:
    for _ in range(2000):
        with interruptible(10.0):
            pass


def test_an_interruption_never_arrives_after_its_block() -> None:
    for delay in (0.05, 0.1, 0.15, 0.2):
        try:
            with interruptible(delay):
                end = time.monotonic() + 0.3
                while time.monotonic() < end:
                    pass
        except TookTooLong:
            pass
        for _ in range(200_000):
            pass
