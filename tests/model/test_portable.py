"""A merged model means the same under the names of old and new readers; and it knows how it was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from model.families import FAMILIES
from model.test_export import _adapter, _base
from tiny_model import CHAT_TEMPLATE, write_tiny_model
from trietune.data.encoder import hash_tokenizer, load_tokenizer
from trietune.model.adapter.export import export_adapter
from trietune.model.adapter.portable import old_rope, portable_config, portable_tokenizer_config
from trietune.model.base.load import quiet_library
from trietune.model.base.locate import locate_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet_library():
        yield


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0}},
        ),
        (
            {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
    ],
)  # fmt: skip
def test_rope_parameters_are_written_under_their_old_names_too(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    assert old_rope(rope) == expected


def test_the_bases_own_config_is_carried_over() -> None:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e5, "torch_dtype": "float32",
            "of_the_author": 7}  # fmt: skip
    written = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_theta": 1e5}}
    found = portable_config(written, base, dtype="bfloat16")
    assert found == {**base, "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_the_config_of_another_class_is_not_carried_over() -> None:
    base = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    written = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "rope_parameters": rope}
    found = portable_config(written, base, dtype="float32")
    assert (found["model_type"], found["rope_theta"]) == ("gemma3_text", 1e6)


def test_a_nested_configuration_has_both_forms_too() -> None:
    text = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "dtype": "float32"}
    found = portable_config({"model_type": "x", "text_config": text}, {}, dtype="bfloat16")
    assert (found["text_config"]["rope_theta"], found["text_config"]["torch_dtype"]) == (2e5, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_config_names_its_rotary_base_and_means_the_same(tmp_path: Path, family: str) -> None:
    base = _base(tmp_path / "base", family)
    merged = export_adapter(_adapter(base, tmp_path / "adapter"), tmp_path / "out", merge=True).folder
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == (1e6 if family == "gemma3" else config["rope_parameters"]["rope_theta"])
    assert config["dtype"] == config["torch_dtype"] == "float32"
    if family == "gemma3":
        assert config["rope_local_base_freq"] == 1e4
    expected, found = (AutoConfig.from_pretrained(folder).to_dict() for folder in (base.path, merged))
    same = set(expected) - {"_name_or_path", "transformers_version"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}


def test_scaled_positions_survive_both_forms(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    written = LlamaConfig(rope_parameters=rope, max_position_embeddings=512).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(portable_config(written, {}, dtype="float32")))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_theta"] == 5e5
    found = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: found[key] for key in rope} == rope


def test_a_base_in_the_old_form_stays_in_it(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    file = base.path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps({**config, "rope_theta": 250_000.0}))
    merged = export_adapter(_adapter(base, tmp_path / "adapter"), tmp_path / "out", merge=True).folder
    found = json.loads((merged / "config.json").read_text())
    assert found["rope_theta"] == 250_000.0
    assert "rope_parameters" not in found
    assert AutoModelForCausalLM.from_pretrained(merged).config.rope_parameters["rope_theta"] == 250_000.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}),
        ({"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}),
        (
            {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]},
            {"additional_special_tokens": ["<b>", "<a>"]},
        ),
        ({"extra_special_tokens": {"image_token": "<i>"}}, {"extra_special_tokens": {"image_token": "<i>"}}),
        ({"backend": "tokenizers", "is_local": True}, {}),
    ],
)
def test_a_tokenizers_class_and_keys_are_those_that_old_readers_know(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert portable_tokenizer_config(config) == expected


def test_the_merged_tokenizer_is_the_bases_and_has_the_trained_template(tmp_path: Path) -> None:
    base = locate_model(str(write_tiny_model(tmp_path / "base")))
    adapter = _adapter(base, tmp_path / "adapter")
    trained = CHAT_TEMPLATE + "{# ours #}"
    (adapter / "prompt_format.json").write_text(json.dumps({"chat_template": trained}))
    copied = export_adapter(adapter, tmp_path / "copied").folder
    merged = export_adapter(adapter, tmp_path / "merged", merge=True).folder
    assert (copied / "chat_template.jinja").read_text() == (merged / "chat_template.jinja").read_text() == trained
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(merged).chat_template == trained
    assert hash_tokenizer(load_tokenizer(merged)) == hash_tokenizer(load_tokenizer(base.path))


def test_an_adapter_that_was_trained_on_no_chat_brings_no_template(tmp_path: Path) -> None:
    base = locate_model(str(write_tiny_model(tmp_path / "base")))
    adapter = _adapter(base, tmp_path / "adapter")
    (adapter / "prompt_format.json").write_text(json.dumps({"chat_template": ""}))
    assert not (export_adapter(adapter, tmp_path / "copied").folder / "chat_template.jinja").exists()
    merged = export_adapter(adapter, tmp_path / "merged", merge=True).folder
    assert AutoTokenizer.from_pretrained(merged).chat_template == CHAT_TEMPLATE


def test_positions_of_the_merged_model_are_those_of_its_base(tmp_path: Path) -> None:
    """The fault that this file is about: another rotary base, and another answer at every position but the first."""
    base = _base(tmp_path / "base")
    file = base.path / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    file.write_text(json.dumps(config))
    merged = export_adapter(_adapter(base, tmp_path / "adapter"), tmp_path / "out", merge=True).folder
    written = json.loads((merged / "config.json").read_text())
    old_reader = {key: value for key, value in written.items() if key != "rope_parameters"}
    (merged / "config.json").write_text(json.dumps(old_reader))
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        by_old_names = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(tokens).logits
        (merged / "config.json").write_text(json.dumps(written))
        by_both = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(tokens).logits
        (merged / "config.json").write_text(json.dumps({**old_reader, "rope_theta": 10_000.0}))
        wrong = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(tokens).logits
    assert torch.equal(by_old_names, by_both)
    assert (wrong - by_both).abs().max() > 0.01, "the rotary base matters here"
