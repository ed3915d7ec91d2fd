"""Conversations at the terminal, the system prompt that training data shares, and tokens that are drawn."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trietune import UserError, load_config, train
from trietune.cli.app import main
from trietune.cli.chat import Chat
from trietune.data.examples import Example, Message
from trietune.data.system_prompt import common_system_prompt, with_system_prompt
from trietune.data.templates import PromptFormat
from trietune.evaluation.sampling import Sampling, make_sampling
from trietune.run.loaded import LoadedModel
from trietune.run.opened import open_model, predict
from trietune.tracking.tracker import Tracker

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = "be very good"


def conversations(path: Path, systems: list[str | None]) -> Path:
    rows = []
    for number, system in enumerate(systems):
        turns = [{"role": "user", "content": f"is the film {number}?"}, {"role": "assistant", "content": "fine"}]
        rows.append({"messages": [*([{"role": "system", "content": system}] if system else []), *turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(overrides: dict[str, object]) -> dict[str, object]:
    return {
        **overrides, "dataset_id": None, "validation_file": None, "chat_template": TEMPLATE, "max_steps": 1,
        "self_check": False,
    }  # fmt: skip


def kept(settings: dict[str, object], file: Path, **more: object) -> PromptFormat:
    run = train(load_config(None, {**settings, "train_file": str(file), **more}, {}), tracker=Tracker())
    return PromptFormat.from_json((run.directory / "adapter" / "prompt_format.json").read_text())


@pytest.mark.slow
def test_a_system_prompt_common_to_all_is_kept_and_asked_with(settings: dict[str, object], tmp_path: Path) -> None:
    file = conversations(tmp_path / "same.jsonl", [SYSTEM] * 8)
    run = train(load_config(None, {**settings, "train_file": str(file)}, {}), tracker=Tracker())
    opened = open_model(run.directory, ["self_check=False"], Tracker())
    assert opened.prompt_format is not None
    assert opened.prompt_format.system_prompt == SYSTEM
    asked = decoded(opened, "is it?")
    assert asked == f"<system>{SYSTEM}</s><user>is it?</s><assistant>"
    assert decoded(opened.with_system_prompt("dull"), "is it?").startswith("<system>dull</s><user>")
    assert decoded(opened.with_system_prompt(""), "is it?").startswith("<user>is it?")
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]}
    assert decoded(opened, own) == "<system>own</s><user>x</s><assistant>"
    first = predict(opened, ["is it?"], max_new_tokens=4, sampling=Sampling(0.01))
    assert first == predict(opened, ["is it?"], max_new_tokens=4)


def decoded(opened: LoadedModel, given: Any) -> str:
    from trietune.evaluation.predict import make_examples

    encoder = opened.encoder()
    ids = encoder.encode_prompt(make_examples(encoder.prompt_format, [given])[0])
    return str(opened.tokenizer.decode(ids)).removeprefix("<s>")


@pytest.mark.parametrize("systems", [[SYSTEM] * 7 + ["other"], [SYSTEM] * 7 + [None], [None] * 8])
def test_a_system_prompt_that_is_not_common_is_not_kept(systems: list[str | None]) -> None:
    turns = (Message("user", "a"), Message("assistant", "b"))
    examples = [Example("", "", "b", messages=(*((Message("system", one),) if one else ()), *turns)) for one in systems]
    assert common_system_prompt(examples) == ""
    assert common_system_prompt(examples[:7]) == (SYSTEM if systems[0] else "")
    assert common_system_prompt([]) == ""


def test_chat_system_prompt_goes_before_conversations_without_one(
    settings: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = conversations(tmp_path / "mixed.jsonl", [None, "own", None, None])
    typed = [f"{key}={json.dumps(value)}" for key, value in {**settings, "train_file": str(file)}.items()]
    assert main(["train", *[part for one in typed for part in ("--set", one)], "--print-examples", "--dry-run",
                 "--chat-system-prompt", SYSTEM]) == 0  # fmt: skip
    out = capfd.readouterr().out
    assert out.count(f"<system>{SYSTEM}</s><user>") >= 2
    assert "<system>own</s><user>" in out
    assert kept(settings, file, chat_system_prompt=SYSTEM).system_prompt == SYSTEM


def test_chat_system_prompt_without_conversations_is_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(UserError, match="has no conversations to put it before"):
        train(load_config(None, {**overrides, "chat_system_prompt": SYSTEM}, {}), tracker=Tracker())


def test_messages_that_have_a_system_message_keep_it() -> None:
    user = Message("user", "a")
    assert with_system_prompt([user], "s")[0] == Message("system", "s")
    for role in ("system", "developer"):
        own = [Message(role, "own"), user]
        assert with_system_prompt(own, "s") is own
    assert with_system_prompt([user], "") == [user]


@pytest.fixture
def chat(settings: dict[str, object], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    opened = open_model(tiny_model, ["self_check=False", "dtype=float32", "device=cpu"], Tracker())
    opened.tokenizer.chat_template = TEMPLATE
    return Chat(opened.with_system_prompt(SYSTEM), max_new_tokens=3)


def say_lines(chat: Chat, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    chat.run()


def test_a_conversation_goes_on_and_begins_anew(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    say_lines(chat, ["is it?", "", "and the plot?"], monkeypatch)
    assert [message.role for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert SYSTEM in capfd.readouterr().err
    say_lines(chat, ["/new"], monkeypatch)
    assert chat.messages == []
    say_lines(chat, ["is it?", "/system be dull"], monkeypatch)
    assert (chat.messages, chat.system_prompt) == ([], "be dull")
    say_lines(chat, ["/system none"], monkeypatch)
    assert chat.system_prompt == ""


def test_commands_of_a_conversation_are_answered(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = ["/help", "/frob", "/temperature 0.5", "/top-p 2", "/top-p x", "/system", "/exit", "never asked"]
    say_lines(chat, typed, monkeypatch)
    err = capfd.readouterr().err
    for part in ("/temperature T", "no command `/frob`", "temperature 0.5, top-p 1", "top-p 2 is not allowed",
                 "`x` is not", f"system prompt: {SYSTEM}"):  # fmt: skip
        assert part in err
    assert (chat.temperature, chat.top_p, chat.messages) == (0.5, None, [])


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trietune.evaluation.predict.answer_turn", interrupt)
    say_lines(chat, ["is it?", "/temperature 1"], monkeypatch)
    assert "stopped" in capfd.readouterr().err
    assert (chat.messages, chat.temperature) == ([], 1.0)


def test_what_takes_no_conversations_has_no_system_prompt(chat: Chat) -> None:
    plain = replace(chat.opened.encoder().prompt_format, kind="template", chat_template="")
    with pytest.raises(UserError, match="takes no conversations"):
        replace(chat.opened, prompt_format=plain).with_system_prompt("x")


def test_tokens_are_drawn_from_the_nucleus_in_proportion() -> None:
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    drawn = torch.bincount(Sampling(1.0).choose(logits), minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    nucleus = torch.bincount(Sampling(1.0, 0.75).choose(logits), minlength=4) / 4000
    assert torch.allclose(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert set(Sampling(1.0, 0.1).choose(logits).tolist()) == {0}
    flatter = torch.bincount(Sampling(2.0).choose(logits), minlength=4) / 4000
    assert flatter[0] < 0.45


@pytest.mark.parametrize(
    ("temperature", "top_p", "made"),
    [
        (None, None, None),
        (0, None, None),
        (0, 0.5, None),
        (None, 0.9, Sampling(1.0, 0.9)),
        (0.7, None, Sampling(0.7)),
        (0.7, 0.9, Sampling(0.7, 0.9)),
    ],
)
def test_sampling_is_what_was_asked_for(temperature: float | None, top_p: float | None, made: Sampling | None) -> None:
    assert make_sampling(temperature, top_p) == made


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, None), (float("nan"), None), (None, 0), (None, 1.5)])
def test_sampling_out_of_range_is_refused(temperature: float | None, top_p: float | None) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        make_sampling(temperature, top_p)
