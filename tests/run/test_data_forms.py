"""Data in the forms that people have: each from its file to a finished run, by the command that a new user types."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from tiny_model import write_tiny_model
from trietune.cli.app import main
from trietune.config import load_config
from trietune.data import load_data, load_tokenizer

COUNT = 8
PAIRS = [{"prompt": f"plot {n}:", "completion": f" good {n}"} for n in range(COUNT)]
USER, BOT = "user", "assistant"


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(n: int, **keys: Any) -> list[dict[str, Any]]:
    return [{"role": USER, "content": f"hi {n}"}, {"role": BOT, "content": f"yes {n}", **keys}]


def table(separator: str = ",") -> str:
    rows = [("prompt", "completion"), *((row["prompt"], row["completion"]) for row in PAIRS)]
    return "".join(separator.join(row) + "\n" for row in rows)


def tools(n: int) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": json.dumps({"n": n})}}
    messages = [
        {"role": USER, "content": f"sky {n}?"},
        {"role": BOT, "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "blue"},
        {"role": BOT, "content": "It is blue."},
    ]
    described = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}
    return {"messages": messages, "tools": [described]}


def write(content: bytes | str) -> Callable[[Path], None]:
    def to(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return to


def many(**files: bytes) -> Callable[[Path], None]:
    def to(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return to


# Name of the form: the file, how it is written, and what a user types besides; nothing where it is read at once.
FORMS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "alpaca": (
        "a.json",
        write(json.dumps([{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(COUNT)])),
        (),
    ),
    "alpaca without input": (
        "a.jsonl",
        write(lines([{"instruction": f"do {n}", "output": f"done {n}"} for n in range(COUNT)])),
        (),
    ),
    "sharegpt": (
        "a.json",
        write(
            json.dumps(
                [
                    {"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": f"yes {n}"}]}
                    for n in range(COUNT)
                ]
            )
        ),
        (),
    ),
    "openai chat": ("a.jsonl", write(lines([{"messages": chat(n)} for n in range(COUNT)])), ()),
    "openai chat with tools": ("a.jsonl", write(lines([tools(n) for n in range(COUNT)])), ()),
    "openai chat, weight 0": (
        "a.jsonl",
        write(lines([{"messages": [*chat(n, weight=0), *chat(n + 1, weight=1)]} for n in range(COUNT)])),
        (),
    ),
    "openai chat, parts": (
        "a.jsonl",
        write(
            lines(
                [
                    {"messages": [{"role": USER, "content": [{"type": "text", "text": f"hi {n}"}]}, chat(n)[1]]}
                    for n in range(COUNT)
                ]
            )
        ),
        (),
    ),
    "prompt and completion": ("a.jsonl", write(lines(PAIRS)), ()),
    "prompt and completion, messages": (
        "a.jsonl",
        write(lines([{"prompt": chat(n)[:1], "completion": chat(n)[1:]} for n in range(COUNT)])),
        (),
    ),
    "query and response": (
        "a.jsonl", write(lines([{"query": f"q {n}", "response": f"a {n}"} for n in range(COUNT)])), ()
    ),
    "input and output": (
        "a.jsonl", write(lines([{"input": f"q {n}", "output": f"a {n}"} for n in range(COUNT)])), ()
    ),
    "question and answer": (
        "a.csv", write("question,answer\n" + "".join(f"q {n},a {n}\n" for n in range(COUNT))), ()
    ),
    "text": ("a.jsonl", write(lines([{"text": f"once {n}"} for n in range(COUNT)])), ()),
    "txt": ("a.txt", write("".join(f"once {n}\n" for n in range(COUNT))), ()),
    "csv, comma": ("a.csv", write(table()), ()),
    "csv, byte order mark": ("a.csv", write(b"\xef\xbb\xbf" + table().encode()), ()),
    "csv, semicolon": ("a.csv", write(table(";")), ("csv_separator=;",)),
    "csv, cp1252": ("a.csv", write(table().replace("good", "schön").encode("cp1252")), ("file_encoding=cp1252",)),
    "csv, UTF-16": ("a.csv", write(table().encode("utf-16")), ("file_encoding=utf-16",)),
    "parquet": ("a.parquet", lambda path: pq.write_table(pa.Table.from_pylist(PAIRS), path), ()),
    "arrow": ("a.arrow", lambda path: write_arrow(path), ()),
    "save_to_disk": ("saved", lambda path: save_to_disk(path), ()),
    "gz": ("a.jsonl.gz", write(gzip.compress(lines(PAIRS), mtime=0)), ()),
    "folder of splits": (
        "splits", many(train_dot_jsonl=lines(PAIRS), validation_dot_jsonl=lines(PAIRS[:2])), ()
    ),
    "hub-like folder": (
        "cloned",
        many(
            README_dot_md=(
                b"---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/tr*}\n---\n"
            ),
            main__train_dot_jsonl=lines(PAIRS),
        ),
        (),
    ),
}  # fmt: skip


def write_arrow(path: Path) -> None:
    data = pa.Table.from_pylist(PAIRS)
    with pa.ipc.new_stream(str(path), data.schema) as file:
        file.write_table(data)


def save_to_disk(path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(PAIRS), "validation": Dataset.from_list(PAIRS[:2])}).save_to_disk(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose chat template knows tools, as those of published models do."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_data_of_each_form_finishes(
    form: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    name, make, besides = FORMS[form]
    make(tmp_path / name)
    keys = [f"train_file={name}", f"model_name={model}", "dtype=float32", "max_steps=2", "batch_size=2", "device=cpu"]
    keys += ["project_dir=runs", "wandb_run_name=first"]

    def train(*more: str) -> int:
        return main(["train", *(part for key in (*keys, *more) for part in ("--set", key))])

    code = train()
    said = capfd.readouterr().err
    if besides:
        assert code == 2
        key, _, value = besides[0].partition("=")
        assert key in said  # the error names the key and the value that read it
        assert value in said
        assert not Path("runs/first/adapter").exists()
        code = train(*besides)
        said = capfd.readouterr().err
    assert code == 0, said
    assert Path("runs/first/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("form", FORMS)
def test_data_of_each_form_becomes_examples_with_labels(
    form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, besides = FORMS[form]
    make(tmp_path / name)
    options = dict(one.partition("=")[::2] for one in besides)
    data = load_data(
        load_config(None, {"train_file": name, **options}, environ={}),
        load_tokenizer(model),
        cache_folder=tmp_path / "cache",
        report=lambda _: None,
        progress=lambda *_: None,
        check_stop=lambda: None,
    )
    assert data.counts.train.kept == data.counts.train.num_examples > 0
    labels = data.train.labels
    assert np.add.reduceat(labels != -100, data.train.offsets[:-1]).min() > 1


def test_all_but_three_forms_need_no_second_try() -> None:
    assert len(FORMS) == 25
    assert [name for name, (_, _, besides) in FORMS.items() if besides] == [
        "csv, semicolon",
        "csv, cp1252",
        "csv, UTF-16",
    ]
