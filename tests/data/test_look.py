"""`trietune init FILE` looks at data and writes a configuration that trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_model import write_tiny_model
from trietune.cli.app import main
from trietune.config import load_config
from trietune.data import load_data
from trietune.data.encoder import load_tokenizer
from trietune.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("name", "content", "learned"),
    [
        ("alpaca.csv", b"instruction,input,output\ndo,it,done\ndo,,so\n", "done<eos>"),
        ("semicolon.csv", b"headline;summary\nh;s\ni;t\n", " s<eos>"),
        ("windows.csv", "Köpfe,Größe\nh,Müller\ni,t\n".encode("cp1252"), " Müller<eos>".replace("ü", "<unk>")),
        ("wide.csv", "headline,summary\nh,s\ni,t\n".encode("utf-16"), " s<eos>"),
        ("pairs.jsonl", b'{"prompt": "a:", "completion": " b"}\n' * 2, " b<eos>"),
        ("my chat (1).json", json.dumps([{"messages": MESSAGES}] * 2).encode(), "yes<eos>"),
        ("lines.txt", b"one\ntwo\n", "one<eos>"),
    ],
)
def test_what_is_written_for_a_file_trains_on_it(
    name: str, content: bytes, learned: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert main(["init", name]) == 0
    [config] = tmp_path.glob("*.yaml")
    data = load_data(
        load_config(config, (), environ={}),
        tokenizer,
        cache_folder=tmp_path / "cache",
        report=lambda _: None,
        progress=lambda *_: None,
        check_stop=lambda: None,
    )
    sequences = data.train
    texts = []
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        labels = sequences.labels[begin:end]
        texts.append(tokenizer.decode(labels[labels != -100].tolist()))
    held = data.validation
    if held is not None:
        labels = held.labels[: held.offsets[1]]
        texts.append(tokenizer.decode(labels[labels != -100].tolist()))
    assert learned in texts


def test_preferences_get_their_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 2)
    assert main(["init", "p.jsonl"]) == 0
    assert load_config("p.yaml", (), environ={}).objective == "dpo"


def test_neither_a_kind_nor_a_file_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "nothing.jsonl"]) == 2
    assert "no file `nothing.jsonl`" in capfd.readouterr().err


def test_the_templates_for_own_columns_load_by_the_kinds_that_they_were(tmp_path: Path) -> None:
    for kind in ("sst2", "squad", "chat", "jsonl"):
        assert main(["init", kind, "--out", str(tmp_path / f"{kind}.yaml")]) == 0
        load_config(tmp_path / f"{kind}.yaml", (), environ={})
    with pytest.raises(UserError):
        load_config(tmp_path / "none.yaml", (), environ={})
