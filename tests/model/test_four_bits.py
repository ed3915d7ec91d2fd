"""A base in 4 bits: refused where it cannot run, loaded as asked, left alone by what replaces layers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.families import FAMILIES
from strategies import question_batch
from tiny_model import write_tiny_model
from trietune.device.cpu import describe_cpu
from trietune.errors import UserError
from trietune.io.directory import write_directory
from trietune.io.manifest import ManifestInfo
from trietune.model.adapter.adapter import adapter_files, add_adapter
from trietune.model.adapter.export import export_adapter
from trietune.model.base import load
from trietune.model.base.folder import ModelFolder
from trietune.model.base.four_bits import BYTES_PER_WEIGHT, check_four_bits, is_quantized
from trietune.model.base.load import load_network
from trietune.model.base.locate import locate_model
from trietune.model.base.shape import describe_network
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = torch.device("cpu")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")


class Linear4bit(nn.Linear):
    """What replaces a linear layer: a kind of its own, whose weight is bytes and makes numbers of them when it runs."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.scale = float(original.weight.detach().abs().max()) / 127
        packed = (original.weight.detach() / self.scale).round().to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(torch.int8).to(x.dtype) * self.scale, self.bias)


def quantized(family: str) -> Any:
    network = FAMILIES[family]()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Linear4bit(module))
    network.requires_grad_(False)
    return network


def adapted(family: str, **changes: Any) -> Any:
    base = ModelFolder(Path(), "base", "folder")
    return add_adapter(quantized(family), base=base, r=3, alpha=7, **changes)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        check_four_bits(replace(describe_cpu(), name="CPU, 2 threads"), where="sst2.yaml, line 4")
    assert str(refused.value) == (
        "error: `load_in_4bit: True` needs a CUDA device, and this run is on CPU, 2 threads\n"
        "       sst2.yaml, line 4\n"
        "next:  `--set load_in_4bit=False`, which holds the base model in `dtype`"
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        check_four_bits(replace(describe_cpu(), runs_bitsandbytes=True), where="load_in_4bit")
    assert refused.value.what == "`load_in_4bit: True` needs bitsandbytes, which is not installed"
    assert refused.value.next_step is not None
    assert refused.value.next_step.startswith("pip install bitsandbytes, or ")


def test_the_library_is_asked_for_double_nf4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: dict[str, Any] = {}
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **options: options)
    original = load.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path: Path, **options: Any) -> Any:
        asked.update(options)
        del options["quantization_config"], options["device_map"]
        return original(path, **options)

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_network(locate_model(str(write_tiny_model(tmp_path))), dtype=torch.bfloat16, device=CPU, load_in_4bit=True)
    assert asked["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    assert asked["device_map"] == {"": CPU}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_four_bits_keep_the_librarys_code(family: str) -> None:
    """A replacement that multiplied by their bytes would be fast and wrong."""
    model = adapted(family)
    network = model.get_base_model()
    wrapped = {name for name, module in network.named_modules() if isinstance(module, LoraLinear)}
    assert wrapped
    layers = fuse_network(network)
    assert layers.attentions == 0
    assert not layers.prunes_last
    for name in wrapped:
        assert "forward" not in vars(network.get_submodule(name)), f"{name} was replaced"
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    losses = []
    for batching, attention in (("trie", "rows"), ("padded", None)):
        trie_model = TrieModel(network, device=CPU, attention=attention)  # type: ignore[arg-type]
        micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=10_000)  # type: ignore[arg-type]
        total = sum(
            torch.dot(trie_model.label_losses(mb), torch.from_numpy(mb.label_weight).float()) for mb in micro_batches
        )
        network.zero_grad()
        total.backward()  # type: ignore[union-attr]
        grad = network.get_submodule(sorted(wrapped)[0]).lora_B["default"].weight.grad
        assert grad is not None
        assert grad.dtype == torch.float32
        losses.append(float(total.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_modules_in_four_bits_are_not_trained_whole() -> None:
    with pytest.raises(UserError) as refused:
        adapted("llama", modules_to_save=["down_proj"])
    assert "down_proj` whole, and it is held in 4 bits" in refused.value.what


def test_memory_counts_layers_in_four_bits_and_the_rest_whole(tmp_path: Path) -> None:
    base = locate_model(str(write_tiny_model(tmp_path)))
    shape = describe_network(base, dtype=torch.bfloat16, adapter={"r": 2, "alpha": 4})
    in_layers = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert shape.num_in_layers == in_layers
    whole = shape.num_bytes(torch.bfloat16)
    assert whole == 2 * shape.num_parameters
    saved = whole - shape.num_bytes(torch.bfloat16, load_in_4bit=True)
    assert saved == pytest.approx((2 - BYTES_PER_WEIGHT) * in_layers, abs=1)
    # As the headers of the files say it.
    found = load._needed_bytes(base.path, torch.bfloat16, True)
    assert found == pytest.approx(shape.num_bytes(torch.bfloat16, load_in_4bit=True), rel=0.01)


def test_embeddings_norms_and_head_stay_whole() -> None:
    assert is_quantized("model.layers.0.mlp.up_proj.weight", (64, 32))
    for name, shape in (
        ("model.embed_tokens.weight", (99, 32)),
        ("lm_head.weight", (99, 32)),
        ("model.norm.weight", (32,)),
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
    ):
        assert not is_quantized(name, shape)


@needs_bitsandbytes
def test_a_real_base_in_four_bits_trains(tmp_path: Path) -> None:
    """bitsandbytes has a slow form of its kernels for the CPU."""
    import bitsandbytes

    config = LlamaConfig(
        vocab_size=99, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    base = ModelFolder(tmp_path, "base", "folder")
    network = load_network(base, dtype=torch.float32, device=CPU, load_in_4bit=True)
    kinds = {type(module) for module in network.modules() if isinstance(module, nn.Linear)}
    assert kinds == {bitsandbytes.nn.Linear4bit, nn.Linear}
    add_adapter(network, base=base, r=3, alpha=7)
    fuse_network(network)
    batch = question_batch(np.random.default_rng(3), vocabulary=90)
    [micro_batch] = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=10_000)
    model = TrieModel(network, device=CPU)
    parameters = [p for p in network.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.label_losses(micro_batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("was_in_4bit", [False, True])
def test_a_merge_says_that_the_base_is_not_quite_the_trained_one(tmp_path: Path, was_in_4bit: bool) -> None:
    base = locate_model(str(write_tiny_model(tmp_path / "base")))
    network = load_network(base, dtype=torch.float32, device=CPU)
    contents = adapter_files(add_adapter(network, base=base, r=2, alpha=4), base)
    info = ManifestInfo("run", 1, {}, kind="adapter", details={"load_in_4bit": was_in_4bit})
    write_directory(tmp_path / "adapter", contents, info=info)
    said: list[str] = []
    export_adapter(tmp_path / "adapter", tmp_path / "out", merge=True, base=base, report=said.append)
    assert any("trained on its base in 4 bits" in line for line in said) == was_in_4bit
