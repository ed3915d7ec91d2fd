"""Chat templates that do not come to an end, or need all memory: left after a while, or at the first signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slow_cases import slow_but
from tiny_model import write_tiny_model
from trietune.chat import process
from trietune.config import load_config
from trietune.data import chat
from trietune.data.columns import WrongRow
from trietune.data.encoder import load_tokenizer
from trietune.data.examples import Message
from trietune.data.load import load_data
from trietune.errors import StopRequested, UserError

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
]
# Each is one operation of Python's own code, which nothing in its process interrupts.
ONE_OPERATION = [
    "{% set n = namespace(a=9) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "{{ (3 ** (3 ** 30)) % 2 }}",
    "{% set n = namespace(a=['a'], b=['a']) %}{% for i in range(9) %}{% set n.a = [n.a] * 999 %}"
    "{% set n.b = [n.b] * 999 %}{% endfor %}{{ n.a == n.b }}",
    "{% set t = 'a' * 9999999 %}{{ ([t ~ 'b', t ~ 'c'] * 999999) | sort | length }}",
]
ALL_MEMORY = [
    "{% set n = namespace(a='abcdefgh') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{{ ('a,' * 10 ** 9).split(',') | length }}",
    "{% set n = namespace(a=[]) %}{% for i in range(99999) %}{% set n.a = n.a + ['a' * 10 ** 6 ~ i] %}{% endfor %}",
    "{{ ['a' * 10 ** 6] * 10 ** 6 }}",
    "{{ 'a' | indent(10 ** 12, true) }}",
]
SAYS = "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' }}{% endfor %}"
TURN = (Message("user", "a"), Message("assistant", "b"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def split_messages(tokenizer: Any, template: str, messages: tuple[Message, ...], **more: Any) -> Any:
    return chat.split_turns(messages, tokenizer=tokenizer, chat_template=template, add_generation_prompt=False, **more)


def split(tokenizer: Any, template: str, **more: Any) -> Any:
    return split_messages(tokenizer, template, TURN, **more)


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_template_is_a_wrong_row(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SECONDS_OF_A_TEMPLATE", 0.3)
    with pytest.raises(WrongRow, match="not come to an end"):
        split(tokenizer, template)


@pytest.mark.parametrize("template", slow_but(ONE_OPERATION, ONE_OPERATION[0], ONE_OPERATION[2]))
def test_what_nothing_interrupts_is_left(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SECONDS_OF_A_TEMPLATE", 1.5)
    began = time.monotonic()
    with pytest.raises(WrongRow, match="not come to an end"):
        split(tokenizer, template)
    assert time.monotonic() - began < 60  # they take hours


@pytest.mark.parametrize("template", slow_but(ALL_MEMORY, ALL_MEMORY[1], ALL_MEMORY[3]))
def test_memory_that_a_template_takes_is_not_taken_from_the_machine(tokenizer: Any, template: str) -> None:
    split(tokenizer, SAYS)
    # A machine that has to make room first may need longer for two gigabytes than a template is given.
    with pytest.raises(WrongRow, match=r"more than 2 GB of memory|OverflowError|not come to an end"):
        split(tokenizer, template)
    assert split(tokenizer, SAYS) == [("a:", False), ("b", True)]


def test_a_template_that_took_too_long_is_not_waited_for_as_long_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SECONDS_OF_A_TEMPLATE", 1.0)
    monkeypatch.setattr(process, "SECONDS_AFTER_THAT", 0.2)
    for words in ("after 1 s", "after 0 s"):
        with pytest.raises(WrongRow, match=words):
            split(tokenizer, ENDLESS[0] + " ")


def test_half_a_character_that_a_template_writes_is_a_wrong_row(tokenizer: Any) -> None:
    with pytest.raises(WrongRow, match=r"writes half a character \(\\ud83d\)"):
        split(tokenizer, SAYS + "{{ '\\ud83d' }}")


def test_many_renderings_may_take_longer_than_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forty turns each is rendered, since each asks for their number; all take longer than one may."""
    monkeypatch.setattr(process, "SECONDS_OF_A_TEMPLATE", 2.5)
    slow = "{% set n = messages | length %}{% for a in range(150) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    segments = split_messages(tokenizer, SAYS + slow, TURN * 40)
    assert len(segments) == 80
    assert time.monotonic() - began > 2.5


def test_the_process_is_started_again_when_it_was_killed(tokenizer: Any) -> None:
    expected = split(tokenizer, SAYS)
    running = process._process
    assert running is not None
    os.kill(running._popen.pid, signal.SIGKILL)
    assert split(tokenizer, SAYS) == expected
    assert process._process is not running


def test_the_process_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    """Killed in the middle of a question, by a signal that nothing can answer."""
    asker = tmp_path / "ask.py"
    asker.write_text(
        "from trietune.chat import process\n"
        "from trietune.chat.conversation import Conversation, TemplateSource\n"
        "find = process._find_process\n"
        "def found(stop):\n"
        "    one = find(stop)\n"
        "    print(one._popen.pid, flush=True)\n"
        "    return one\n"
        "process._find_process = found\n"
        "talk = Conversation([{'role': 'user', 'content': 'a'}], [False], asks=True)\n"
        "endless = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'\n"
        "source = TemplateSource(endless, {})\n"
        "process.cut(talk, source, only_last=False, check_stop=lambda: None)\n"
    )
    with subprocess.Popen([sys.executable, asker], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        pid = int(asking.stdout.readline())
        time.sleep(0.5)
        used = Path(f"/proc/{pid}/limits").read_text()
        asking.kill()
    [cpu] = [line.split() for line in used.splitlines() if line.startswith("Max cpu time")]
    assert 60 <= int(cpu[3]) < 90
    [addresses] = [line.split() for line in used.splitlines() if line.startswith("Max address space")]
    assert 2 << 30 < int(addresses[3]) < 20 << 30
    os.kill(pid, signal.SIGXCPU)  # what the system does when that is used up
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
    monkeypatch.setattr(process, "SECONDS_OF_A_TEMPLATE", 0.2)
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
