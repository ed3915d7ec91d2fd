"""The proof of every layer: right computations pass, wrong ones are caught and run on a lower rung, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_types.mutations import Mutate, counts_on_after_a_branch, drops_windows, rotates_every_layer
from causal_types.small_models import small_network
from model import families
from model.odd_families import LONG_WINDOW, in_dtype, odd
from strategies import FlatSequences
from trietune.errors import UserError
from trietune.model import head
from trietune.model.adapter.adapter import add_adapter
from trietune.model.attention import attend as attention
from trietune.model.attention import layout as trie_layout
from trietune.model.attention import rows as row_attention
from trietune.model.base.folder import ModelFolder
from trietune.model.base.randomness import silence_rates
from trietune.model.causal_lm import TrieModel
from trietune.model.fast import attention_layer as trie_layers
from trietune.model.fast import norms_and_mlps as fused
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.model.proof import Proof, prove, random_forests
from trietune.model.proof.bounds import BOUND
from trietune.model.proof.ladder import AS_IT_IS, BY_ROWS, UNDER_A_MASK
from trietune.trie import make_micro_batches, total_weight

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
# fp32 sums of a few hundred terms in another order, through four layers.
PARITY = 2e-4

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def known_family(family: str, dtype: torch.dtype) -> Any:
    return in_dtype(families.FAMILIES[family], dtype)


def model_of(network: Any, way: Any = "rows", *, is_fused: bool = True) -> TrieModel:
    prunes_last = fuse_network(network).prunes_last if is_fused else False
    return TrieModel(network, device=CPU, attention=way, prunes_last=prunes_last)


def proof_of(model: TrieModel, longest: int = 70) -> Proof:
    short, long = random_forests(families.VOCAB_SIZE, longest, device=CPU)
    return prove(model, short, long, family=str(model.config.model_type))


def bytes_of(network: Any) -> dict[str, tuple[int, int, torch.dtype, bytes]]:
    return {
        name: (p.data_ptr(), p._version, p.dtype, p.detach().flatten().view(torch.uint8).numpy().tobytes())
        for name, p in (*network.named_parameters(), *network.named_buffers())
    }


@pytest.mark.parametrize("way", ["rows", "mask", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_right_computations_pass_as_they_are(family: str, dtype: torch.dtype, way: Any) -> None:
    proof = proof_of(model_of(known_family(family, dtype), way))
    assert set(proof.rungs.values()) == {AS_IT_IS}
    assert 0 < proof.worst < BOUND / 10
    assert proof.lines[0].startswith("self-check: ")


def test_no_parameter_is_another_bit_afterwards() -> None:
    network = known_family("gemma2", torch.bfloat16)
    # A new adapter's B, which is random while the proof runs.
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    model = model_of(network)
    before = bytes_of(network)
    proof_of(model)
    assert bytes_of(network) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.bfloat16, {"use_dora": True}),
        (torch.bfloat16, {"dropout": 0.1}),
        (torch.bfloat16, {"modules_to_save": ["norm", "mlp", "lm_head"]}),
        (torch.float32, {"bias": "all"}),
        (torch.float16, {}),
    ],
)
def test_adapters_of_every_kind_are_proven(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    network = families.FAMILIES["qwen2"]()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.config.dtype = dtype
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "modules_to_save" in changes else "all-linear"
    add_adapter(network, r=3, alpha=7, target_modules=targets, base=ModelFolder(Path(), "base", "folder"), **changes)
    proof = proof_of(model_of(network))
    assert set(proof.rungs.values()) == {AS_IT_IS}, proof.lines
    assert proof.worst < BOUND / 10


def sees_siblings(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    def visibility(trie: Any, window: int | None = None) -> np.ndarray:
        happened.append("siblings")
        node = np.arange(trie.num_nodes)
        return np.asarray(node[None] <= node[:, None])

    patch.setattr(trie_layout, "visibility", visibility)


def forgets_soft_capping(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    right = attention.attend

    def attend(*args: Any, softcap: float | None, **how: Any) -> Any:
        if softcap is not None:
            happened.append("softcap")
        return right(*args, softcap=None, **how)

    patch.setattr(attention, "attend", attend)
    patch.setattr(trie_layers, "attend", attend)


def forgets_sinks(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    def check_known(module: Any, told: dict[str, Any]) -> None:
        if told.get("s_aux") is not None:
            happened.append("sink")

    patch.setattr(attention, "check_known", check_known)


def halves_gradients_of_values(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    right = row_attention.RowAttention.backward

    def backward(context: Any, grad: Any) -> Any:
        happened.append("backward")
        grad_q, grad_k, grad_v, *rest = right(context, grad)
        return grad_q, grad_k, grad_v / 2, *rest  # type: ignore[operator]  # a tensor

    patch.setattr(row_attention.RowAttention, "backward", staticmethod(backward))


def forgets_the_activations_slope(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    def backward(grad: Any, gate: Any, activation: Any, *, out: Any) -> None:
        happened.append("slope")
        out.copy_(grad)

    patch.setattr(fused, "_act_backward", backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mutate", "family", "way", "rung"),
    [
        (sees_siblings, "llama", "mask", None),
        (counts_on_after_a_branch, "llama", "rows", None),
        (drops_windows, "mistral", "rows", None),
        (forgets_soft_capping, "gemma2", "rows", UNDER_A_MASK),
        (halves_gradients_of_values, "llama", "rows", UNDER_A_MASK),
        (forgets_the_activations_slope, "llama", "rows", BY_ROWS),
    ],
)
def test_a_wrong_computation_is_caught(
    mutate: Mutate, family: str, way: str, rung: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(known_family(family, dtype), way)
    happened: list[str] = []
    mutate(monkeypatch, happened)
    if rung is None:
        # Whole rows are another computation, of transformers alone.
        proof = proof_of(model)
        assert proof.on_whole_rows
        assert any("node: layer 0" in line for line in proof.lines)
    else:
        assert set(proof_of(model).rungs.values()) == {rung}
    assert happened


@pytest.mark.parametrize("model_type", ["gpt2", "ctrl"])
def test_positions_that_are_added_before_a_dropout_of_the_embeddings_are_caught(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_network(model_type)
    silence_rates(network)
    happened: list[str] = []
    counts_on_after_a_branch(monkeypatch, happened)
    proof = proof_of(model_of(network))
    assert proof.on_whole_rows
    assert any("what enters its first layer differs" in line for line in proof.lines), proof.lines
    assert happened


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_rotates_though_it_must_not_runs_unfused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    rotates_every_layer(monkeypatch, happened)
    proof = proof_of(model_of(in_dtype(lambda: odd("smollm3"), dtype)))
    assert proof.rungs == {"0": AS_IT_IS, "1": BY_ROWS, "2": AS_IT_IS, "3": BY_ROWS}
    assert proof.lines[1].startswith("layers 1, 3 run unfused")
    assert len(happened) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_that_are_dropped_are_caught(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    forgets_sinks(monkeypatch, happened)
    proof = proof_of(model_of(in_dtype(lambda: odd("gpt_oss"), dtype)))
    assert set(proof.rungs.values()) == {UNDER_A_MASK}
    assert happened


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_in_the_mask_alone_shows_on_an_example_that_exceeds_it(dtype: torch.dtype) -> None:
    short = proof_of(model_of(in_dtype(lambda: odd("qwen2_moe"), dtype)), longest=LONG_WINDOW - 10)
    assert set(short.rungs.values()) == {AS_IT_IS}
    proof = proof_of(model_of(in_dtype(lambda: odd("qwen2_moe"), dtype)), longest=LONG_WINDOW + 30)
    kinds = odd("qwen2_moe").config.layer_types
    expected = [UNDER_A_MASK if kind == "sliding_attention" else AS_IT_IS for kind in kinds]
    assert list(proof.rungs.values()) == expected
    assert UNDER_A_MASK in expected


def test_a_head_that_forgets_its_soft_capping_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(known_family("gemma2", torch.float32))
    monkeypatch.setattr(head.Head, "__call__", lambda self, hidden: self._network.get_output_embeddings()(hidden))
    with pytest.raises(UserError, match="its head gives other logits"):
        proof_of(model)


def test_where_whole_rows_are_not_to_be_had_a_state_is_refused_and_padded_rows_are_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trietune.model.causal_lm.carry_states", lambda network: 0)
    monkeypatch.setattr("trietune.model.proof.ladder.carry_states", lambda network, layer: 0)
    model = model_of(in_dtype(lambda: odd("lfm2"), torch.float32))
    model.may_lay_out_rows = False
    with pytest.raises(UserError, match="cannot be computed as a trie: layer 0") as refused:
        proof_of(model)
    assert refused.value.exit_code == 2
    assert str(refused.value.next_step).startswith("`--set batching=padded`, which has passed")
    monkeypatch.undo()
    padded = proof_of(model_of(in_dtype(lambda: odd("lfm2"), torch.float32), None))
    assert set(padded.rungs.values()) == {AS_IT_IS}


def batch() -> FlatSequences:
    """Seven sequences of up to 70 tokens: two roots, branches at several depths; labels at their ends."""
    generator = np.random.default_rng(5)

    def draw(number: int) -> list[int]:
        return [int(x) for x in generator.integers(4, 100, number)]

    a, b = draw(24), draw(9)
    stem = a + draw(20)
    rows = [stem + draw(26), stem + draw(7), a + draw(30), a + draw(5), a[:3] + draw(20), b + draw(12), b + draw(15)]
    labels = [[-100] * (len(row) - 2) + row[-2:] for row in rows]
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    return FlatSequences(np.concatenate(rows).astype(np.int32), np.concatenate(labels).astype(np.int32), offsets)


def plain_gradients(
    network: Any, sequences: FlatSequences, attention: str | None = "eager"
) -> tuple[float, dict[str, torch.Tensor]]:
    """A row an example, through transformers alone; `attention` None leaves the one that the network came with."""
    if attention is not None:
        network.set_attn_implementation(attention)
    total, weight = torch.zeros(()), 0
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        tokens = torch.from_numpy(sequences.input_ids[begin:end].astype(np.int64))[None]
        labels = torch.from_numpy(sequences.labels[begin:end].astype(np.int64))[1:]
        logits = network(input_ids=tokens, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        weight += int((labels != -100).sum())
    (total / weight).backward()
    return total.item() / weight, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", ["smollm3", "exaone4", "doge", "qwen2_moe", "phimoe", "gpt_oss", "cohere", "granite", "olmo2"]
)
def test_what_is_proven_has_the_gradients_of_plain_rows(family: str) -> None:
    sequences = batch()
    loss, expected = plain_gradients(in_dtype(lambda: odd(family), torch.float32), sequences)
    network = in_dtype(lambda: odd(family), torch.float32)
    model = model_of(network)
    proof_of(model)
    micro_batches = make_micro_batches(sequences, np.arange(7), batching="trie", max_positions=10_000)
    ours = 0.0
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        part = (losses * torch.from_numpy(micro_batch.label_weight).float()).sum() / total_weight(micro_batches)
        part.backward()
        ours += part.item()
    assert abs(ours - loss) / loss < PARITY
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    difference = sum(float((found[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
    size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert difference / size < PARITY, f"{family}: {difference / size:.1e}"
