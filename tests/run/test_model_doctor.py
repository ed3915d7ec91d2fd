"""`trietune doctor MODEL` says what a run would do, from the configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from causal_types.small_models import small_config
from trietune import UserError
from trietune.cli.app import main
from trietune.model.base.few_layers import VOCABULARY, WINDOW, few_layers
from trietune.run.model_doctor import examine_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def config_of(folder: Path, model_type: str, **changes: Any) -> Path:
    small_config(model_type, **changes).save_pretrained(folder)
    return folder


def told(folder: Path, topic: str) -> list[str]:
    return [finding.text for finding in examine_model(str(folder)).findings if finding.topic == topic]


def test_without_a_weight_it_says_how_a_model_trains(tmp_path: Path) -> None:
    folder = config_of(tmp_path, "llama")
    assert not list(folder.glob("*.safetensors"))
    assert told(folder, "trie") == ["trains exactly: attention by rows, layers fused where they can be"]
    assert "100% of the layers' weights" in told(folder, "adapter")[0]
    assert "GB for its weights" in told(folder, "memory")[0]


def test_it_says_what_runs_on_whole_rows_and_why(tmp_path: Path) -> None:
    text = told(config_of(tmp_path, "bloom"), "trie")
    assert text[0].startswith("trains exactly: on whole rows")
    assert any("computes attention in its own way" in line for line in text[1:])


def test_a_model_that_sees_tokens_to_come_is_refused_with_what_makes_it_a_decoder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = config_of(tmp_path, "bert", is_decoder=False)
    assert main(["doctor", str(folder), "--json"]) == 0
    findings = json.loads(capfd.readouterr().out)["findings"]
    (trie,) = [one for one in findings if one["topic"] == "trie"]
    assert "is not a causal language model: tokens change the logits of those before them" in trie["text"]
    assert "is_decoder" in trie["remedy"]
    # The advice, tried.
    config = json.loads((folder / "config.json").read_bytes()) | {"is_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert told(folder, "trie")[0].startswith("trains exactly")


def test_a_folder_without_a_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no `model_type`"):
        examine_model(str(tmp_path))


def test_one_layer_of_each_kind_is_left(tmp_path: Path) -> None:
    config = small_config("llama4_text")
    kinds = ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"] * 3
    config.num_hidden_layers, config.layer_types, config.no_rope_layers = 12, kinds, [1, 1, 1, 0] * 3
    config.attention_chunk_size, config.vocab_size = 8192, 200_000
    small = few_layers(config)
    assert small.layer_types == ["chunked_attention", "full_attention", "full_attention"]
    assert small.no_rope_layers == [1, 0, 0]
    assert (small.num_hidden_layers, small.attention_chunk_size, small.vocab_size) == (3, WINDOW, VOCABULARY)
    assert (small.hidden_size, small.num_attention_heads) == (config.hidden_size, config.num_attention_heads)
    assert config.num_hidden_layers == 12, "the configuration itself is not changed"
