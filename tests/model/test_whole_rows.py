"""Tries on whole rows: the network as it is, its products once a node, and the numbers of plain rows."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from causal_types.small_models import small_network
from model.test_proof import CPU, PARITY, batch, plain_gradients, proof_of
from strategies import batches, flat
from trietune.device import choose_device
from trietune.errors import UserError
from trietune.model.adapter.adapter import add_adapter
from trietune.model.architecture import why_whole_rows
from trietune.model.assemble import assemble
from trietune.model.base.folder import ModelFolder
from trietune.model.base.randomness import silence_rates
from trietune.model.causal_lm import TrieModel
from trietune.model.proof.ladder import BY_ROWS
from trietune.model.rows import products
from trietune.model.rows.grid import RowGrid, num_cells
from trietune.model.rows.pieces import cut_by_cells
from trietune.trie import MicroBatch, make_micro_batches, total_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# A bias by distance that is made of a mask; positions by index; a state and no attention; attention under a mask of its
# own; a convolution beside attention.
TYPES: dict[str, dict[str, Any]] = {
    "bloom": {},
    "opt": {},
    "rwkv": {},
    "axk2": {},
    "roberta": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def network_of(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    network = small_network(model_type, **TYPES[model_type])
    silence_rates(network)
    network = network.to(dtype)
    add_adapter(network, r=2, alpha=4, base=ModelFolder(Path("x"), "x", "folder"))
    return network


def model_of(network: Any, **more: Any) -> TrieModel:
    device = choose_device("cpu", use_tt=False)
    return assemble(network, device, attention="rows", fused_layers=True, why_whole_rows="a test", **more)


def losses_of(model: TrieModel, micro_batches: list[MicroBatch]) -> float:
    ours = 0.0
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        part = (losses * torch.from_numpy(micro_batch.label_weight).float()).sum() / total_weight(micro_batches)
        part.backward()
        ours += part.item()
    return ours


@cache
def expected_of(model_type: str) -> tuple[float, dict[str, torch.Tensor]]:
    network = network_of(model_type)
    return plain_gradients(network, batch())


def difference_of(network: Any, expected: dict[str, torch.Tensor]) -> float:
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    difference = sum(float((found[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
    return difference / sum(float(g.square().sum()) for g in expected.values()) ** 0.5


@pytest.mark.parametrize(
    ("model_type", "checkpointing", "most_cells"),
    [("lfm2", False, None), ("lfm2", True, 150), *((name, name == "opt", None) for name in TYPES if name != "lfm2")],
)
def test_loss_and_gradients_are_those_of_plain_rows(
    model_type: str, checkpointing: bool, most_cells: int | None
) -> None:
    loss, expected = expected_of(model_type)
    network = network_of(model_type)
    model = model_of(network, gradient_checkpointing=checkpointing)
    network.train(checkpointing)
    model.most_cells = most_cells
    micro_batches = model.pad_to_shapes(
        make_micro_batches(batch(), np.arange(7), batching="trie", max_positions=10_000)
    )
    assert (len(micro_batches) > 1) == (most_cells is not None)
    assert abs(losses_of(model, list(micro_batches)) - loss) / loss < PARITY
    assert difference_of(network, expected) < PARITY


def test_what_the_proof_finds_it_computes_on_whole_rows_and_says_why() -> None:
    network = network_of("roberta")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = TrieModel(network, device=CPU)
    proof = proof_of(model)
    assert proof.on_whole_rows
    assert model.whole_rows is not None
    assert any(
        line.startswith("tries run on whole rows") and "what enters its first layer" in line for line in proof.lines
    ), proof.lines
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())


def test_products_run_once_a_node() -> None:
    network = network_of("lfm2")
    counted: Counter[str] = Counter()
    model = TrieModel(network, device=CPU, why_whole_rows="a test")
    for name, module in network.named_modules():
        if type(module) is torch.nn.Linear and "lora" not in name and "lm_head" not in name:
            module.register_forward_pre_hook(
                lambda m, args, name=name: counted.update({name: args[0].shape[:-1].numel()})
            )
    (micro_batch,) = make_micro_batches(batch(), np.arange(7), batching="trie", max_positions=10_000)
    assert micro_batch.trie is not None
    model.label_losses(micro_batch)
    assert num_cells(micro_batch.trie) > 2 * micro_batch.trie.num_nodes
    assert set(counted.values()) == {micro_batch.trie.num_nodes}, counted


def test_a_part_that_mixes_positions_is_not_shared() -> None:
    """Its trial says so, although it is given hidden states and nothing else, like an MLP."""

    class Mixes(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.cumsum(-2))

    x = torch.randn(3, 5, 8)
    assert not products._is_pointwise(Mixes(8, 4), x, (3, 5))
    assert products._is_pointwise(torch.nn.Linear(8, 4), x, (3, 5))


def test_copies_that_lose_their_gradient_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state's values are right and its gradients are not: what the proof must see."""
    monkeypatch.setattr(RowGrid, "to_rows", lambda grid, x: x.index_select(0, grid._node_of).detach())
    proof = proof_of(model_of(network_of("lfm2")))
    assert set(proof.rungs.values()) == {BY_ROWS}, "each row computes what it repeats, too"


def test_a_network_that_sees_tokens_to_come_is_called_no_causal_model() -> None:
    network = small_network("bert", is_decoder=False)
    with pytest.raises(UserError, match="is not a causal language model: tokens change the logits of those before"):
        proof_of(TrieModel(network, device=CPU, why_whole_rows=why_whole_rows(network)))


def test_a_network_that_mixes_outside_of_its_layers_is_asked_whether_it_sees_tokens_to_come() -> None:
    """XLM's largest list of modules is its MLPs, so that no part that is compared sees another position."""
    network = small_network("xlm", causal=False)
    with pytest.raises(UserError, match="is not a causal language model") as refused:
        proof_of(TrieModel(network, device=CPU, why_whole_rows=why_whole_rows(network)))
    assert '"causal": true' in str(refused.value.next_step)


def test_a_network_that_mixes_outside_of_its_layers_is_compared_with_each_row_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = small_network("xlm")
    assert proof_of(TrieModel(network, device=CPU, why_whole_rows=why_whole_rows(network))).on_whole_rows
    right, wrong = type(network.base_model).forward, []

    def forward(self: Any, input_ids: torch.Tensor, attention_mask: Any = None, **how: Any) -> Any:
        output = right(self, input_ids=input_ids, attention_mask=attention_mask, **how)
        if len(input_ids) > 1:
            wrong.append("the rows beside it")
            output.last_hidden_state = output.last_hidden_state + 0.1 * output.last_hidden_state.mean(0, keepdim=True)
        return output

    monkeypatch.setattr(type(network.base_model), "forward", forward)
    network = small_network("xlm")
    with pytest.raises(UserError, match="depends on the length of its row, or on other rows"):
        proof_of(TrieModel(network, device=CPU, why_whole_rows=why_whole_rows(network)))
    assert wrong


@settings(max_examples=60, deadline=None)
@given(batches())
def test_cuts_by_positions_keep_every_label(drawn: tuple[list[list[int]], list[list[int]]]) -> None:
    sequences = flat(*drawn)
    whole = make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=10_000)
    pieces = cut_by_cells(whole, 12)
    assert _labels(pieces) == _labels(whole)
    for piece in pieces:
        assert piece.trie is not None
        assert num_cells(piece.trie) <= 12 or piece.trie.num_rows == 1


def _labels(micro_batches: list[MicroBatch]) -> Counter[tuple[Any, ...]]:
    """Of every label: its sequence, the tokens before it, itself, in the order of the sequence."""
    found: Counter[tuple[Any, ...]] = Counter()
    for mb in micro_batches:
        trie = mb.trie
        assert trie is not None
        row = np.searchsorted(trie.row_start, np.arange(trie.num_nodes), side="right") - 1
        for pair, sequence in zip(mb.pair_of_label, mb.sequence_of_label, strict=True):
            node = mb.label_index[pair]
            begin = trie.row_path_start[row[node]]
            path = trie.input_ids[trie.row_path[begin : begin + trie.position_ids[node] + 1]]
            found[int(mb.sequence_indices[sequence]), tuple(path.tolist()), int(mb.labels[pair])] += 1
    return found
