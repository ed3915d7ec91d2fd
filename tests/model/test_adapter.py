"""LoRA adapters: made, written as PEFT reads them, and read back without a tensor too few or too many."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel

from model.families import FAMILIES
from trietune.errors import UserError
from trietune.io.safetensors import RawTensor, from_numpy, parse, serialize
from trietune.model.adapter.adapter import (
    WEIGHTS_FILE,
    adapter_files,
    adapter_tensors,
    add_adapter,
    linear_modules,
    load_adapter,
    load_adapter_files,
)
from trietune.model.adapter.config import CONFIG_FILE
from trietune.model.adapter.start import keys_of, start_from
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import quiet_library

# PEFT 0.21 asks transformers 5.23 under a name that the latter is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASE = ModelFolder(Path("/nowhere"), "owner/tiny", "hub", revision="5c1a" * 10)
TOKENS = torch.arange(3, 19)[None]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*\.layers\.1\..*_proj"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"dropout": 0.3},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "a norm trained whole": {"modules_to_save": ["norm"]},
}


def _add(network: PreTrainedModel, **more: Any) -> PeftModel:
    return add_adapter(network, **{"r": 4, "alpha": 8, "base": BASE, "seed": 1, **more})


def _moved(peft_model: PeftModel) -> PeftModel:
    """As after training: every trained tensor is off its start, B is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return peft_model


def _logits(network: Any) -> torch.Tensor:
    network.train(False)
    with torch.no_grad():
        logits: torch.Tensor = network(TOKENS).logits
    return logits


def _write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# ---- made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_trained_is_fp32_and_the_base_is_frozen(dtype: torch.dtype) -> None:
    peft_model = _add(FAMILIES["llama"]().to(dtype), modules_to_save=["norm", "lm_head"])
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert len(trained) == 2 * 7 * 2 + 2
    for name, parameter in peft_model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else dtype), name


def test_modules_trained_whole_compute_in_fp32_between_neighbors_that_do_not() -> None:
    exact = _logits(FAMILIES["llama"]())
    network = FAMILIES["llama"]().to(torch.bfloat16)
    before = _logits(network)
    after = _logits(_add(network, modules_to_save=["norm", "lm_head"]))
    assert after.dtype == torch.bfloat16
    assert (after - exact).abs().mean() <= (before - exact).abs().mean(), "not farther from fp32 than without it"


def test_a_name_is_not_taken_for_the_end_of_another() -> None:
    peft_model = _add(FAMILIES["llama"](), modules_to_save=["norm"])
    whole = [name for name in adapter_tensors(peft_model) if "lora_" not in name]
    assert whole == ["base_model.model.model.norm.weight"]


def test_a_double_base_has_a_double_adapter() -> None:
    tensors = adapter_tensors(_add(FAMILIES["llama"]().double()))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}


def test_the_seed_alone_decides_where_it_starts() -> None:
    torch.manual_seed(1)
    first = adapter_files(_add(FAMILIES["llama"]()), BASE)
    network = FAMILIES["llama"]()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = adapter_files(_add(network), BASE)
    assert torch.equal(torch.get_rng_state(), state), "the global stream is another's"
    assert first == second
    assert adapter_files(_add(FAMILIES["llama"](), seed=2), BASE) != first


def test_a_new_adapter_changes_nothing() -> None:
    network = FAMILIES["gemma2"]()
    before = _logits(network)
    assert torch.equal(_logits(_add(network)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_all_but_the_head(family: str) -> None:
    peft_model = _add(FAMILIES[family]())
    adapted = {name.rsplit(".lora_", 1)[0].rpartition(".")[2] for name in adapter_tensors(peft_model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_dropout_is_there_in_training_alone() -> None:
    peft_model = _moved(_add(FAMILIES["llama"](), dropout=0.5))
    peft_model.train(True)
    with torch.no_grad():
        assert not torch.equal(peft_model(TOKENS).logits, peft_model(TOKENS).logits)
    assert torch.equal(_logits(peft_model), _logits(peft_model))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"target_modules": ["q_proj", "query"]}, "nothing in this model is called `query`"),
        ({"target_modules": "q_proj"}, "nothing in this model is called `q_proj`"),
        ({"target_modules": "((q_proj"}, "is not a pattern"),
        ({"target_modules": ["norm"]}, "is not supported"),
        ({"modules_to_save": ["score"]}, "`modules_to_save`: nothing in this model is called `score`"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        _add(FAMILIES["llama"](), **more)
    assert expected in str(caught.value)
    if "pattern" not in expected:
        assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_biases_of_a_short_dtype_are_refused() -> None:
    with pytest.raises(UserError, match="trains biases of the base model itself, which are bfloat16"):
        _add(FAMILIES["qwen2"]().to(torch.bfloat16), bias="all")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_half_of_a_tied_pair_is_not_trained_whole(name: str) -> None:
    with pytest.raises(UserError, match="shares its weights"):
        _add(FAMILIES["gemma"](), modules_to_save=[name])


def test_linear_modules_are_named_once() -> None:
    assert linear_modules(FAMILIES["qwen3"]()) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "lm_head",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


# ---- written -----------------------------------------------------------------------------------------------------


def test_the_files_name_the_base_and_its_commit() -> None:
    config = json.loads(adapter_files(_add(FAMILIES["llama"]()), BASE)[CONFIG_FILE])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", "5c1a" * 10)
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8)
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_those_that_peft_writes(variant: str, tmp_path: Path) -> None:
    peft_model = _moved(_add(FAMILIES["qwen2"](), **VARIANTS[variant]))
    peft_model.peft_config["default"].base_model_name_or_path = None  # else it asks the hub
    peft_model.save_pretrained(tmp_path)
    ours, metadata = parse(adapter_files(peft_model, BASE)[WEIGHTS_FILE])
    assert metadata == {"format": "pt"}
    with safe_open(tmp_path / WEIGHTS_FILE, framework="np") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, tensor in ours.items():
            assert np.array_equal(tensor.to_numpy(), theirs.get_tensor(name)), name


def test_the_bytes_are_a_copy() -> None:
    peft_model = _add(FAMILIES["llama"]())
    files = adapter_files(peft_model, BASE)
    before = bytes(files[WEIGHTS_FILE])
    _moved(peft_model)
    assert files[WEIGHTS_FILE] == before


# ---- read by PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_peft_gives_the_same_logits(family: str, variant: str, tmp_path: Path) -> None:
    peft_model = _moved(_add(FAMILIES[family](), **VARIANTS[variant]))
    expected = _logits(peft_model)
    _write(adapter_files(peft_model, BASE), tmp_path)
    assert torch.equal(_logits(PeftModel.from_pretrained(FAMILIES[family](), tmp_path)), expected)


@pytest.mark.slow
def test_peft_gives_the_same_logits_in_a_process_without_us(tmp_path: Path) -> None:
    network = FAMILIES["llama"]()
    with quiet_library():
        network.save_pretrained(tmp_path / "base")
    peft_model = _moved(_add(network, use_rslora=True))
    expected = _logits(peft_model)
    _write(adapter_files(peft_model, ModelFolder(tmp_path, str(tmp_path / "base"), "folder")), tmp_path / "adapter")
    script = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM; from safetensors.torch import save_file\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r}, dtype=torch.float32).eval()\n"
        "with torch.no_grad(): logits = model(torch.arange(3, 19)[None]).logits\n"
        f"save_file({{'logits': logits}}, {str(tmp_path / 'logits.safetensors')!r})\n"
        "assert not any(name.startswith('trietune') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "logits.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("logits"), expected)


# ---- read by us --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_written_is_read_back(variant: str, tmp_path: Path) -> None:
    peft_model = _moved(_add(FAMILIES["qwen2"](), **VARIANTS[variant]))
    files = adapter_files(peft_model, BASE)
    again = load_adapter(FAMILIES["qwen2"](), _write(files, tmp_path))
    assert torch.equal(_logits(again), _logits(peft_model))
    assert adapter_files(again, BASE) == files


def test_an_adapter_that_peft_wrote_is_read(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = _moved(get_peft_model(FAMILIES["llama"](), config))
    theirs.save_pretrained(tmp_path)
    assert torch.equal(_logits(load_adapter(FAMILIES["llama"](), tmp_path)), _logits(theirs))


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r"^(?!.*layers\.0\.).*(q_proj|down_proj)$"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    ],
)
def test_an_adapter_that_says_no_task_and_brings_its_own_targets_is_read(more: dict[str, Any], tmp_path: Path) -> None:
    theirs = _moved(get_peft_model(FAMILIES["llama"](), LoraConfig(r=4, lora_alpha=8, task_type=None, **more)))
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["task_type"] is None
    assert written["auto_mapping"]["parent_library"]
    assert torch.equal(_logits(load_adapter(FAMILIES["llama"](), tmp_path)), _logits(theirs))
    keys = keys_of(tmp_path)
    ours = _add(
        FAMILIES["llama"](), r=keys["lora_r"], alpha=keys["lora_alpha"], target_modules=keys["lora_target_modules"]
    )
    start_from(ours, tmp_path)
    assert torch.equal(_logits(ours), _logits(theirs))


def test_nothing_is_trained_unless_asked(tmp_path: Path) -> None:
    files = adapter_files(_add(FAMILIES["llama"]()), BASE)
    still = load_adapter_files(FAMILIES["llama"](), files, where="here")
    assert not any(parameter.requires_grad for parameter in still.parameters())
    in_bfloat16 = load_adapter_files(FAMILIES["llama"]().bfloat16(), files, where="here")
    assert {tensor.dtype for tensor in adapter_tensors(in_bfloat16).values()} == {torch.float32}
    moving = load_adapter_files(FAMILIES["llama"](), files, where="here", is_trainable=True)
    assert sum(parameter.requires_grad for parameter in moving.parameters()) == 2 * 7 * 2


def _tensors(files: dict[str, bytes]) -> dict[str, RawTensor]:
    return parse(files[WEIGHTS_FILE])[0]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return adapter_files(_moved(_add(FAMILIES["llama"]())), BASE)


def _error(files: dict[str, bytes], **config: Any) -> str:
    document = {**json.loads(files[CONFIG_FILE]), **config}
    changed = {**files, CONFIG_FILE: json.dumps(document).encode()}
    with pytest.raises(UserError) as caught:
        load_adapter_files(FAMILIES["llama"](), changed, where="runs/x/adapter")
    return str(caught.value)


def test_a_missing_tensor(files: dict[str, bytes]) -> None:
    tensors = _tensors(files)
    name = sorted(tensors)[0]
    del tensors[name]
    error = _error({**files, WEIGHTS_FILE: serialize(tensors)})
    assert f"1 missing: `{name}`" in error
    assert f"runs/x/adapter/{WEIGHTS_FILE}" in error


def test_an_unexpected_tensor(files: dict[str, bytes]) -> None:
    tensors = {**_tensors(files), "base_model.model.score.weight": from_numpy(np.zeros((2, 2), np.float32))}
    error = _error({**files, WEIGHTS_FILE: serialize(tensors)})
    assert "1 unexpected: `base_model.model.score.weight`" in error


def test_a_tensor_of_another_shape(files: dict[str, bytes]) -> None:
    tensors = _tensors(files)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    tensors[name] = from_numpy(np.zeros((40, 4), np.float32))
    error = _error({**files, WEIGHTS_FILE: serialize(tensors)})
    assert f"`{name}` has the shape [40, 4], this model's has [48, 4]" in error


@pytest.mark.parametrize("r", [8, 4096])
def test_a_rank_that_the_tensors_do_not_have(files: dict[str, bytes], r: int) -> None:
    assert f"says rank {r}, and {WEIGHTS_FILE} holds matrices of rank 4" in _error(files, r=r)


def _sparse(path: Path, header: bytes, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size_bytes)


HUGE = 12 * 2**30
CLAIMS = {
    "a header of a terabyte": (10**12, b"{}"),
    "a tensor of twelve gigabytes": (
        None,
        json.dumps({"x": {"dtype": "F32", "shape": [3, 2**30], "data_offsets": [0, HUGE]}}).encode(),
    ),
    "nothing in twelve gigabytes": (None, b"{}"),
    "a shape of text": (None, b'{"x": {"dtype": "F32", "shape": "33", "data_offsets": [0, 4]}}'),
    "a list": (None, b"[]"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_that_claims_the_world_is_not_read(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    length, header = CLAIMS[name]
    (tmp_path / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    _sparse(tmp_path / WEIGHTS_FILE, header, 8 + len(header) + HUGE)
    if length is not None:
        with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
    network = FAMILIES["llama"]()
    before, started = _peak_bytes(), time.perf_counter()
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(network, tmp_path)
    assert time.perf_counter() - started < 1.0
    assert _peak_bytes() - before < 64 * 2**20


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_tensor_of_whole_numbers(files: dict[str, bytes]) -> None:
    tensors = _tensors(files)
    name = sorted(tensors)[0]
    tensors[name] = from_numpy(np.zeros(tensors[name].shape, np.int32))
    assert "not floating-point numbers" in _error({**files, WEIGHTS_FILE: serialize(tensors)})


def test_an_adapter_of_another_model(files: dict[str, bytes]) -> None:
    with pytest.raises(UserError) as caught:
        load_adapter_files(FAMILIES["gemma2"](), files, where="runs/x/adapter")
    assert "does not fit" in str(caught.value)
    assert "load it onto the base model that it was trained on" in str(caught.value)


def test_no_adapter_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter: adapter_config.json is missing"):
        load_adapter(FAMILIES["llama"](), tmp_path)


def test_a_pipe_is_not_waited_for(files: dict[str, bytes], tmp_path: Path) -> None:
    import os

    (tmp_path / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="is not a plain file"):
        load_adapter(FAMILIES["llama"](), tmp_path)


# ---- configurations that nobody should trust ---------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "megatron": ({"megatron_config": {}, "megatron_core": "os"}, "sets `megatron_config`"),
    "another core": ({"megatron_core": "antigravity"}, "sets `megatron_core` to antigravity"),
    "a start that rewrites the base": ({"init_lora_weights": "pissa"}, "sets `init_lora_weights` to pissa"),
    "other models to load": ({"arrow_config": {"router": "x"}}, "sets `arrow_config`"),
    "layers again": ({"layer_replication": [[0, 2], [0, 2]]}, "sets `layer_replication`"),
    "an unknown key": ({"__reduce__": "os.system"}, "has the key `__reduce__`"),
    "another kind": ({"peft_type": "PROMPT_TUNING"}, "`peft_type`"),
    "another task": ({"task_type": "SEQ_CLS"}, "`task_type`"),
    "a rank of a billion": ({"r": 10**9}, "`r`"),
    "a rank that is a flag": ({"r": True}, "`r`"),
    "no rank at all": ({"r": 0}, "`r`"),
    "a scale that is text": ({"lora_alpha": "16"}, "`lora_alpha`"),
    "a scale without end": ({"lora_alpha": 1e300}, "`lora_alpha`"),
    "always dropped": ({"lora_dropout": 1.0}, "`lora_dropout`"),
    "targets that are no names": ({"target_modules": [["q_proj"]]}, "`target_modules`"),
    "no targets": ({"target_modules": []}, "neither `target_modules` nor `target_parameters`"),
    "parameters that are no names": ({"target_parameters": [["gate_up_proj"]]}, "`target_parameters`"),
    "parameters that are text": ({"target_parameters": ".*"}, "`target_parameters`"),
    "a pattern that never ends": ({"target_modules": "(a+)+$"}, "`target_modules`"),
    "a pattern of patterns": ({"target_modules": ".*.*.*.*.*.*.*.*x"}, "`target_modules`"),
    "a pattern in the ranks": ({"rank_pattern": {"(.*)*x(": 8}}, "`rank_pattern`"),
    "a name that is a pattern": ({"modules_to_save": ["(.|.)*X"]}, "`modules_to_save`"),
    "a pattern of 2,000 letters": ({"target_modules": "(" * 1000 + ")" * 1000}, "`target_modules`"),
    "a rank in the patterns": ({"rank_pattern": {"q_proj": 10**9}}, "`rank_pattern`"),
    "layers that are no numbers": ({"layers_to_transform": ["0"]}, "`layers_to_transform`"),
    "a very long name": ({"base_model_name_or_path": "x" * 10_000}, "`base_model_name_or_path`"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_by_name(name: str, files: dict[str, bytes]) -> None:
    changes, expected = HOSTILE[name]
    modules = set(sys.modules)
    started = time.perf_counter()
    error = _error(files, **changes)
    assert time.perf_counter() - started < 1.0
    assert expected in error
    assert len(error) < 600
    assert not {"antigravity", "megatron"} & (set(sys.modules) - modules)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"r": NaN}', b'{"r": 1, "r": 2}', b"[" * 100_000, b"\xff\xfe", b"null"]
)
def test_a_configuration_that_is_none(data: bytes, files: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_adapter_files(FAMILIES["llama"](), {**files, CONFIG_FILE: data}, where="x")


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_configuration_without_what_it_needs(key: str, files: dict[str, bytes]) -> None:
    document = json.loads(files[CONFIG_FILE])
    del document[key]
    with pytest.raises(UserError, match=f"`{key}` is missing"):
        load_adapter_files(FAMILIES["llama"](), {**files, CONFIG_FILE: json.dumps(document).encode()}, where="x")


def test_every_key_of_the_installed_peft_is_known() -> None:
    """A new version of PEFT brings new keys; each must be looked at once, and honored or named as off."""
    from trietune.model.adapter import config as adapter_config

    assert set(LoraConfig().to_dict()) - set(adapter_config._HONORED) - set(adapter_config._OFF) == {
        *adapter_config._READ_OVER
    }
