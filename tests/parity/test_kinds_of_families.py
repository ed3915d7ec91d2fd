"""Losses and gradients on a trie are those of one row an example, for each kind of family beside the seven tested ones.

In fp64 nothing but a fault is larger than the bound. Each way is assembled and proven as a run does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_types.small_models import small_network
from model.test_proof import batch, plain_gradients
from parity.test_gradients import gradients, relative_error, run_backward
from states.state_families import in_double
from trietune.device import choose_device
from trietune.model.adapter.adapter import add_adapter
from trietune.model.architecture import check_architecture, why_whole_rows
from trietune.model.assemble import assemble
from trietune.model.base.folder import ModelFolder
from trietune.model.base.randomness import silence_rates
from trietune.model.causal_lm import TrieModel
from trietune.model.proof import prove, random_forests
from trietune.trie import make_micro_batches

FP64_TOLERANCE, FP32_TOLERANCE = 1e-10, 2e-5
# The delta rule solves a triangular system in each chunk; plain rows in fp32 are as far from plain rows in fp64.
FP32_TOLERANCE_OF_DELTA_RULES = 2e-4

KINDS = {
    "text beside images": ("mistral3", "qwen3_vl", "internvl"),
    "shapes by layer": (
        "deepseek_v3", "smollm3", "gpt_oss", "llama4_text", "glm4_moe", "gemma4_text", "bloom", "roberta",
    ),
    "a state along the sequence": ("lfm2", "qwen3_5_text", "granitemoehybrid", "jamba"),
    "experts": ("mixtral", "qwen3_moe", "olmoe"),
}  # fmt: skip
# The others take some seconds each.
IN_MAKE_TEST = ("gpt_oss", "mixtral")
# How tries attend, and whether layers are fused.
WAYS: list[tuple[Any, bool]] = [("rows", True), ("rows", False), ("mask", False), (None, True)]
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def adapted(model_type: str, dtype: torch.dtype) -> Any:
    """A small network with random adapters, the same ones each time."""
    network = small_network(model_type)
    # Grouped products of experts know no fp64.
    if dtype == torch.float64 and hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("eager")
    network.to(dtype)
    silence_rates(network)
    add_adapter(network, r=4, alpha=8, base=ModelFolder(Path("x"), "x", "folder"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1).to(parameter.dtype)
    return network.eval()


def proven(network: Any, way: Any, *, is_fused: bool) -> TrieModel:
    assert check_architecture(network) is None
    model = assemble(
        network, choose_device("cpu", use_tt=False), attention=way, fused_layers=is_fused,
        why_whole_rows=None if way is None else why_whole_rows(network),
    )  # fmt: skip
    forests = random_forests(model.vocabulary_size, 70, device=CPU)
    prove(model, *forests, family=str(network.config.model_type))
    return model


def on_batch(model: TrieModel, batching: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = run_backward(model, make_micro_batches(batch(), np.arange(7), batching=batching, max_positions=10_000))
    return loss, gradients(model.network)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    with in_double() if dtype == torch.float64 else contextlib.nullcontext():
        yield


def tolerance(model_type: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FP64_TOLERANCE
    return FP32_TOLERANCE_OF_DELTA_RULES if model_type == "qwen3_5_text" else FP32_TOLERANCE


TYPES = [
    pytest.param(name, id=f"{kind}: {name}", marks=[] if name in IN_MAKE_TEST else [pytest.mark.slow])
    for kind, names in KINDS.items()
    for name in names
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_way_has_the_gradients_of_one_row_an_example(model_type: str, dtype: torch.dtype) -> None:
    # Built before casts are lifted: angles stay as they were made.
    plain, *networks = (adapted(model_type, dtype) for _ in range(1 + len(WAYS)))
    with precision(dtype):
        loss, expected = plain_gradients(plain, batch(), attention=None)
        for (way, is_fused), network in zip(WAYS, networks, strict=True):
            model = proven(network, way, is_fused=is_fused)
            ours, found = on_batch(model, "padded" if way is None else "trie")
            told = f"{way}, {'fused' if is_fused else 'not fused'}"
            assert abs(ours - loss) / loss < tolerance(model_type, dtype), f"{told}: loss {ours} instead of {loss}"
            error = relative_error(found, {name: grad.double() for name, grad in expected.items()})
            assert error < tolerance(model_type, dtype), f"{told}: relative error {error:.1e}"


@pytest.mark.parametrize("model_type", ["mixtral"])
def test_a_node_is_sent_to_the_experts_that_each_of_its_rows_is_sent_to(model_type: str) -> None:
    chosen: list[torch.Tensor] = []

    def watch(network: Any) -> None:
        for name, module in network.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda module, args, output: chosen.append(output[-1].reshape(-1, 2)))

    network, sequences = adapted(model_type, torch.float32), batch()
    watch(network)
    plain_gradients(network, sequences, attention=None)
    layers = int(network.config.num_hidden_layers)
    of_rows = [torch.cat(chosen[layer::layers]) for layer in range(layers)]
    # No pruning of the last layer, so that every node is routed.
    model = proven(adapted(model_type, torch.float32), "rows", is_fused=False)
    watch(model.network)
    chosen.clear()
    [micro_batch] = make_micro_batches(sequences, np.arange(7), batching="trie", max_positions=10_000)
    model.label_losses(micro_batch)
    trie = micro_batch.trie
    assert trie is not None
    node_of = _node_of_positions(trie, sequences)
    for layer in range(layers):
        real = node_of >= 0
        ours = chosen[layer][torch.from_numpy(node_of[real])]
        assert torch.equal(ours.sort().values, of_rows[layer][torch.from_numpy(real)].sort().values)
        assert len(set(map(tuple, of_rows[layer].sort().values.tolist()))) > 1, "some nodes are sent elsewhere"


def _node_of_positions(trie: Any, sequences: Any) -> np.ndarray:
    """The node of each token of the sequences; -1 for a last token, which is a label only."""
    paths = {}
    for row in range(trie.num_rows):
        path = trie.row_path[trie.row_path_start[row] : trie.row_path_start[row + 1]]
        for depth in range(len(path)):
            paths[tuple(trie.input_ids[path[: depth + 1]].tolist())] = int(path[depth])
    found = []
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        tokens = sequences.input_ids[begin:end].tolist()
        found += [paths.get(tuple(tokens[: depth + 1]), -1) for depth in range(len(tokens))]
    return np.array(found)
