"""Data sets by hub id, against a hub on loopback: found, gone, gated, misspelt, offline."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_data_hub import DataHub
from pytest_httpserver import HTTPServer

from trietune.data.hub import find_task, is_hub_id, load_from_hub
from trietune.data.load import load_data
from trietune.data.loaded_data import Data
from trietune.errors import UserError


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SST2 = {
    "data/train-00000-of-00001.parquet": parquet(
        [{"idx": i, "sentence": f"film {i} ", "label": i % 2} for i in range(6)]
    ),
    "data/validation-00000-of-00001.parquet": parquet([{"idx": 0, "sentence": "a fine film ", "label": 1}]),
    "data/test-00000-of-00001.parquet": parquet([{"idx": 0, "sentence": "unlabeled ", "label": -1}]),
}
SQUAD = {
    "train.parquet": parquet(
        [
            {
                "id": "q1",
                "title": "t",
                "context": "C.",
                "question": "Q?",
                "answers": {"text": ["a"], "answer_start": [0]},
            },
            {"id": "q2", "title": "t", "context": "C.", "question": "R?", "answers": {"text": [], "answer_start": []}},
        ]
    ),
    "validation.parquet": parquet(
        [
            {
                "id": "q3",
                "title": "t",
                "context": "C.",
                "question": "S?",
                "answers": {"text": ["b", "c"], "answer_start": [0, 1]},
            }
        ]
    ),
}
TWO_CONFIGS = {
    "README.md": (
        b"---\nconfigs:\n- config_name: ax\n  data_files: ax.jsonl\n- config_name: qa\n  data_files: qa.jsonl\n---\n"
    ),
    "ax.jsonl": lines([{"text": "x"}] * 3),
    "qa.jsonl": lines([{"text": "y"}] * 3),
}


@pytest.fixture
def hub(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    import datasets
    from huggingface_hub import HfFileSystem, constants

    endpoint = httpserver.url_for("").rstrip("/")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "datasets" / "downloads")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    HfFileSystem.clear_instance_cache()
    yield DataHub(
        httpserver,
        {
            "stanfordnlp/sst2": SST2,
            "nyu-mll/glue": SST2,
            "rajpurkar/squad_v2": SQUAD,
            "owner/two": TWO_CONFIGS,
            "owner/pairs": {"train.jsonl": lines([{"prompt": "p", "completion": f" {i}"} for i in range(40)])},
            "owner/program": {"program.py": b"print()"},
            "owner/empty": {"README.md": b"nothing"},
            "owner/gated": SST2,
        },
        gated={"owner/gated"},
    )
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def load(tokenizer: Any, make_settings: Any, tmp_path: Path) -> Any:
    def call(dataset_id: str, said: list[str] | None = None, **changes: Any) -> Data:
        return load_data(
            make_settings(dataset_id=dataset_id, **changes),
            tokenizer,
            cache_folder=tmp_path / "cache",
            report=(said if said is not None else []).append,
            progress=lambda *_: None,
            check_stop=lambda: None,
        )

    return call


@pytest.mark.parametrize("dataset_id", ["stanfordnlp/sst2", "sst2", "SST2"])
def test_sst2_by_its_names(hub: DataHub, load: Any, dataset_id: str) -> None:
    data = load(dataset_id)
    assert data.train.examples[1].prompt == "Review: film 1 \nOutput:"
    assert data.train.ids[1] == "train:1"
    assert data.task.label_names == ("negative", "positive")
    assert len(data.validation) == 1
    assert not data.counts.held_out
    assert data.counts.train.source == "stanfordnlp/sst2"


@pytest.mark.parametrize("dataset_id", ["squadv2", "squad_v2", "rajpurkar/squad_v2"])
def test_squad_by_its_names(hub: DataHub, load: Any, dataset_id: str) -> None:
    data = load(dataset_id)
    assert [data.train.examples[i].completion for i in range(2)] == ["a", "unanswerable"]
    assert list(data.train.ids) == ["q1", "q2"]
    assert data.validation.examples[0].answers == ("b", "c")


def test_another_data_set_by_its_columns(hub: DataHub, load: Any) -> None:
    data = load("owner/pairs")
    assert (len(data.train), len(data.validation)) == (38, 2)
    assert data.counts.held_out


def test_a_configuration_and_a_split_by_name(hub: DataHub, load: Any) -> None:
    assert load("owner/two:qa").train.examples[0].completion == "y"
    assert len(load("sst2", dataset_split="train[:2]").train) == 2
    # Its rows have the label -1.
    with pytest.raises(UserError, match="have no label"):
        load("sst2", dataset_split="test")


@pytest.mark.parametrize(
    ("dataset_id", "message", "advice"),
    [
        ("nobody/nothing", "no data set `nobody/nothing` on the hub", "HF_TOKEN"),
        ("stanfordnlp/sst_2", "no data set `stanfordnlp/sst_2`", "did you mean `stanfordnlp/sst2`?"),
        ("owner/gated", "`owner/gated` is gated", "hf auth login"),
        ("owner/two", "has several configurations", "dataset_id: owner/two:ax"),
        ("owner/program", "is a script, not data", "parquet"),
        ("owner/empty", "holds no data files", "train_file"),
        ("owner/pairs@nowhere", "no such revision", "leave"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    hub: DataHub, load: Any, dataset_id: str, message: str, advice: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(dataset_id)
    assert advice in str(caught.value)
    assert f"dataset_id: {dataset_id}" in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub: DataHub, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "ENDPOINT" if place is constants else "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached, and `stanfordnlp/sst2` is not in the cache"):
        load("sst2")


def test_the_cache_stands_in_for_a_hub_that_is_down(hub: DataHub, load: Any) -> None:
    online = load("sst2")
    hub.broken_with = 503
    said: list[str] = []
    data = load("sst2", said)
    assert data.fingerprint == online.fingerprint
    assert any("cannot be reached: `stanfordnlp/sst2` comes from the cache" in line for line in said)


def test_offline_mode_asks_nobody(hub: DataHub, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    online = load("squadv2")
    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.paths.clear()
    assert load("squadv2").fingerprint == online.fingerprint
    with pytest.raises(UserError, match="offline mode is on") as caught:
        load("owner/pairs")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert hub.paths == []


def test_the_other_place_of_sst2_is_taken_if_one_is_gone(hub: DataHub, load: Any) -> None:
    del hub.data_sets["stanfordnlp/sst2"]
    hub.data_sets["nyu-mll/glue"] = {
        "README.md": (
            b"---\nconfigs:\n- config_name: sst2\n  data_files:\n  - split: train\n    path: data/train-*\n"
            b"  - split: validation\n    path: data/validation-*\n---\n"
        ),
        **SST2,
    }
    assert load("sst2").counts.train.source == "nyu-mll/glue (sst2)"
    assert load("glue/sst2").counts.train.source == "nyu-mll/glue (sst2)"


def test_names_that_are_hub_ids() -> None:
    assert all(map(is_hub_id, ["sst2", "owner/name", "owner/name:config", "owner/name@v1.0"]))
    assert not any(map(is_hub_id, ["a/b/c", "two words", "owner/name:", ""]))
    assert find_task("stanfordnlp/sst2@main") == "sst2"
    assert find_task("owner/sst2") is None


def test_the_librarys_own_settings_are_left_as_they_were(hub: DataHub) -> None:
    import datasets

    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity(), datasets.config.HF_HUB_OFFLINE
    load_from_hub("sst2", report=lambda _: None)
    assert before == (
        datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
        datasets.config.HF_HUB_OFFLINE,
    )
