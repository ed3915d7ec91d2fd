"""Loading a base model: dtype, what is refused before it is loaded, and which architectures take a trie."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from model.families import FAMILIES
from trietune.device.memory import is_out_of_memory
from trietune.errors import UserError
from trietune.model.architecture import TESTED_FAMILIES, check_architecture, longest_of_one_rope, why_whole_rows
from trietune.model.base import load
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import load_network
from trietune.model.base.locate import locate_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with load.quiet_library():
        FAMILIES["llama"]().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _load(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    return load_network(locate_model(str(folder)), dtype=dtype, device=CPU, **more)


def _error(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(UserError) as caught:
        _load(folder, dtype)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_it_was_saved(family: str, tmp_path: Path) -> None:
    network = FAMILIES[family]()
    network.save_pretrained(tmp_path)
    loaded = _load(tmp_path)
    assert not loaded.training
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, network(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_weights_are_in_the_dtype_that_was_asked_for(folder: Path, dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in _load(folder, dtype).parameters()} == {dtype}


def test_no_other_dtype(folder: Path) -> None:
    assert "cannot be held in torch.int8" in _error(folder, torch.int8)


def test_the_librarys_bars_are_as_they_were(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    _load(folder)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert capfd.readouterr().err == ""


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    trap = folder / "modeling_own.py"
    trap.write_text(f"open({str(folder / 'was-run')!r}, 'w')\nclass Own: pass\n")
    _change_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.Own"})
    error = _error(folder)
    assert "needs Python code from its own folder, and TrieTune runs none" in error
    assert not (folder / "was-run").exists()


def test_code_beside_a_known_architecture_is_not_run_either(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\nclass Own: pass\n")
    _change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert type(_load(folder)).__name__ == "LlamaForCausalLM"
    assert not (folder / "was-run").exists()


def test_an_architecture_of_the_future(folder: Path) -> None:
    _change_config(folder, model_type="llama9")
    error = _error(folder)
    assert "does not know the architecture `llama9`" in error
    assert "pip install --upgrade transformers" in error


def test_no_causal_language_model(folder: Path) -> None:
    _change_config(folder, model_type="t5")
    assert "is not a model that generates text: transformers has no such class for `t5`" in _error(folder)


def test_a_model_that_sees_what_comes_is_no_causal_one(folder: Path) -> None:
    _change_config(folder, model_type="gemma3_text", use_bidirectional_attention=True)
    assert "it attends in both directions" in _error(folder)


@pytest.mark.parametrize("key", ["quantization_config", "text_config", "rope_scaling"])
def test_null_is_as_good_as_no_key(folder: Path, key: str) -> None:
    _change_config(folder, **{key: None})
    assert type(_load(folder)).__name__ == "LlamaForCausalLM"


def test_quantized_weights(folder: Path) -> None:
    _change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "are quantized (gptq)" in _error(folder)


def test_weights_that_are_not_all_there(folder: Path) -> None:
    """transformers fills the gap with random numbers and continues."""
    _change_config(folder, num_hidden_layers=3)
    error = _error(folder)
    assert "lack 9 tensors of the model that its config.json describes" in error
    assert "the first is `model.layers.2." in error


def test_weights_of_another_shape(folder: Path) -> None:
    _change_config(folder, intermediate_size=96)
    assert "tensors of other shapes than" in _error(folder)


def test_weights_too_many_are_reported(folder: Path) -> None:
    _change_config(folder, num_hidden_layers=1)
    said: list[str] = []
    _load(folder, report=said.append)
    assert len(said) == 1
    assert "9 tensors" in said[0]


@pytest.mark.parametrize("kept", [4, 200, -10])
def test_a_damaged_file(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    error = _error(folder)
    assert "is damaged or only partly downloaded" in error


def test_a_model_too_large_is_refused_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_available_bytes", lambda device: 1000)
    error = _error(folder)
    assert "for its weights alone in float32" in error
    assert "dtype: bfloat16" in error
    assert "0.0 GB are free on cpu" in error
    assert "dtype: bfloat16" not in _error(folder, torch.bfloat16)


def test_an_allocators_refusal_is_an_error_for_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert "for its weights alone" in _error(folder)


def test_what_is_out_of_memory_and_what_is_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


# ---- architectures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_takes_a_trie(family: str) -> None:
    network = FAMILIES[family]()
    assert network.config.model_type in TESTED_FAMILIES
    assert check_architecture(network) is None


def test_the_list_of_families_is_what_is_tested() -> None:
    assert {FAMILIES[family]().config.model_type for family in FAMILIES} == set(TESTED_FAMILIES)


def _tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config)


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "attention dropout": (lambda: _tiny("llama", attention_dropout=0.1), "dropout on attention weights"),
    "losses of experts": (
        lambda: _tiny("mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True),
        "adds a loss for its experts",
    ),
}
ON_WHOLE_ROWS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "state-space": (lambda: _tiny("rwkv"), "carry a state from token to token"),
    "attention under a mask of its own": (lambda: _tiny("minimax"), "`linear_attention`, which a trie's own attention"),
    "own attention": (lambda: _tiny("bloom"), "computes attention in its own way"),
    "attention that keeps what it is given to itself": (lambda: _tiny("nemotron"), "computes attention in its own way"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_take_a_trie_is_refused_with_its_reason(name: str) -> None:
    make, expected = REFUSED[name]
    reason = check_architecture(make())
    assert reason is not None
    assert expected in reason


@pytest.mark.parametrize("name", ON_WHOLE_ROWS)
def test_what_takes_no_trie_as_nodes_runs_on_whole_rows(name: str) -> None:
    make, expected = ON_WHOLE_ROWS[name]
    network = make()
    assert check_architecture(network) is None
    reason = why_whole_rows(network)
    assert reason is not None
    assert expected in reason


def test_angles_that_depend_on_the_call_end_at_the_original_length() -> None:
    dynamic = _tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert longest_of_one_rope(dynamic.config) == dynamic.config.max_position_embeddings
    assert longest_of_one_rope(_tiny("llama").config) is None


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    "family", ["phi3", "olmo2", "smollm3", "starcoder2", "glm", "gpt2", "mixtral", "cohere", "gpt_oss", "lfm2"]
)
def test_families_beyond_the_tested_ones_are_looked_at(family: str) -> None:
    """Each of these gives on a trie the losses of plain rows, some through a lower rung of the self-check's ladder."""
    network = _tiny(family, **(EXPERTS if family in ("mixtral", "gpt_oss") else {}))
    before = network.config._attn_implementation
    assert check_architecture(network) is None
    assert why_whole_rows(network) is None
    assert network.config._attn_implementation == before, "looking changes nothing"


def test_a_network_without_weights_can_be_asked() -> None:
    with torch.device("meta"):
        assert check_architecture(_tiny("olmo2")) is None
        assert why_whole_rows(_tiny("olmo2")) is None


def test_the_name_of_the_folder_is_in_errors() -> None:
    folder = ModelFolder(Path("/nowhere"), "owner/name", "hub")
    with pytest.raises(UserError, match="int8"):
        load_network(folder, dtype=torch.int8, device=CPU)
