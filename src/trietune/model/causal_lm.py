"""A causal language model that takes micro-batches: tries, packed sequences or padded rows.

    micro-batch -> decoder over all positions -> hidden states at label positions -> head -> losses

The network stays transformers' own: with a trie, only its attention is told what each node sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trietune.device.device import recompute
from trietune.model.attention.attend import register
from trietune.model.attention.explicit_mask import explicit_masks
from trietune.model.attention.layout import AttentionKind, ForcedRows, TrieLayout
from trietune.model.attention.static_layout import StaticLayout
from trietune.model.decoder_layers import decoder_of
from trietune.model.fast.frozen_weight import Whole
from trietune.model.head import Head
from trietune.model.loss import label_losses
from trietune.model.rows.pieces import cut_by_cells
from trietune.model.rows.products import SharedProducts
from trietune.model.states import carry_states
from trietune.trie import MicroBatch, Trie, pad_trie
from trietune.trie.static_shapes import StaticShapes


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What attention layouts are made for."""

    num_heads: int
    num_key_heads: int


class TrieModel:
    """`network` as a function from micro-batches to the loss of each label.

    Args:
        network: a causal language model of transformers, on `device`, its adapter layers in place.
        attention: how tries attend; None leaves transformers' attention alone, for padded rows only.
        prunes_last: whether the network's last layer computes only `query_nodes` (`fuse_trie_layers`).
        shapes: what micro-batches are padded to, on a device that compiles a program for each shape.
        to_device: takes what belongs to the rows of a micro-batch to the device; first axis: rows.
        recompute: runs a function that is computed again in the backward pass (`Device.recompute`).
        multiple_of: tries are padded to such a number of positions. Matrix products of odd sizes are slower, by a third
            at worst, and new sizes cost oneDNN time and memory.
        packed_bytes: what blocked copies of frozen weights may take (`pack_frozen_weights`).
        whole: a context in which all weights of a module are here, for a network that is sharded over processes.
        why_whole_rows: the reason why tries run on whole rows from the start, see `whole_rows`; None if they need not.

    Attributes:
        prunes_last: see above; a proof that fails takes it back.
        needs_masks: some layers attend in transformers' own way under a mask, so the decoder is given one.
        can_decode: generation may keep keys and values from token to token (`evaluation.decoding`).
        library_attention: the attention of transformers that the network came with.
        whole_rows: where it is set, the network runs on the rows of a trie, laid out whole, and its products once a
            node: no layer is told what a node sees.
        why_whole_rows: the reason, for people.
        most_cells: positions of such rows, padding included, that are computed at once.
        may_lay_out_rows: whether a proof may turn to whole rows; not on devices of static shapes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        attention: AttentionKind | None = "rows",
        prunes_last: bool = False,
        shapes: StaticShapes | None = None,
        to_device: Callable[[Tensor], Tensor] | None = None,
        recompute: Callable[..., object] = recompute,
        multiple_of: int = 16,
        packed_bytes: int = 0,
        whole: Whole = nullcontext,
        why_whole_rows: str | None = None,
    ) -> None:
        self._multiple_of = multiple_of
        self.prunes_last = prunes_last and attention not in (None, "mask")
        self.needs_masks = False
        self.can_decode = True
        self.shapes = shapes
        self.to_device = to_device or (lambda tensor: tensor.to(device, non_blocking=True))
        self._recompute = recompute
        self.packed_bytes = packed_bytes
        self.whole = whole
        self.network = network
        self.device = device
        self.attention = attention
        self.config = network.config.get_text_config()  # type: ignore[union-attr, operator]  # transformers is untyped
        # Rows through transformers ask for none, and some models have no heads at all.
        num_heads = getattr(self.config, "num_attention_heads", 1)
        self.heads = HeadShape(num_heads, getattr(self.config, "num_key_value_heads", num_heads))
        self.library_attention = str(network.config._attn_implementation)  # type: ignore[union-attr]
        self._head = Head(network)
        self.whole_rows: SharedProducts | None = None
        self.why_whole_rows = why_whole_rows
        self.most_cells: int | None = None
        self.may_lay_out_rows = attention is not None and shapes is None
        if attention is not None and why_whole_rows is not None:
            self.compute_whole_rows(why_whole_rows)
        elif attention is not None:
            network.set_attn_implementation(register())  # type: ignore[operator]
            carry_states(network)

    def compute_whole_rows(self, why: str) -> None:
        """Let the network run on whole rows from now on, with the attention that it came with."""
        network: Any = self.network
        self.why_whole_rows, self.may_lay_out_rows = why, False
        if network.config._attn_implementation != self.library_attention:
            network.set_attn_implementation(self.library_attention)
        self.prunes_last = self.needs_masks = self.can_decode = False
        self.whole_rows = SharedProducts(network)

    @property
    def vocabulary_size(self) -> int:
        return int(self.config.vocab_size)

    def pad_to_shapes(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The micro-batches in the shapes that this device computes; what they mean stays."""
        if self.shapes is not None:
            return self.shapes.pad_to_shapes(micro_batches)
        if self.whole_rows is not None and self.most_cells is not None:
            return cut_by_cells(micro_batches, self.most_cells)
        return micro_batches

    def label_losses(self, micro_batch: MicroBatch) -> Tensor:
        """`-log p(label)` of each (position, label) pair of the micro-batch: [N], fp32 or fp64, with gradients."""
        labels = self.tensor(micro_batch.labels)
        return label_losses(self._at_labels(micro_batch), labels, self.project, self.vocabulary_size, self._recompute)

    def likeliest(self, micro_batch: MicroBatch) -> Tensor:
        """The most likely token at each (position, label) pair, whatever the label: int64 [N]."""
        return self.project(self._at_labels(micro_batch)).argmax(dim=-1)

    def _at_labels(self, micro_batch: MicroBatch) -> Tensor:
        """Hidden states [N, D] where labels are predicted."""
        places = micro_batch.label_index
        query_nodes = None
        if self.prunes_last and micro_batch.trie is not None:
            query_nodes, places = np.unique(micro_batch.label_index, return_inverse=True)
        hidden_SWD = self.hidden_states(micro_batch, query_nodes)
        num_rows, width, _ = hidden_SWD.shape
        if self.shapes is None or num_rows == 1:
            return hidden_SWD.flatten(0, 1).index_select(0, self.tensor(places))
        # Row by row, so that each device of a mesh looks into its own rows.
        in_row = places.reshape(num_rows, -1) - width * np.arange(num_rows)[:, None]
        index = self.tensor(in_row)[:, :, None].expand(-1, -1, hidden_SWD.shape[2])
        return hidden_SWD.gather(1, index).flatten(0, 1)

    def hidden_states(self, micro_batch: MicroBatch, query_nodes: np.ndarray | None = None) -> Tensor:
        """Hidden states after the final norm: [S, W, D] in the model's dtype, or [1, Q, D] of `query_nodes`."""
        trie, input_ids, position_ids = micro_batch.trie, micro_batch.input_ids, micro_batch.position_ids
        if trie is not None and self.whole_rows is not None:
            return self.whole_rows.hidden_states(trie, self.to_device)
        if trie is not None and self.shapes is None:
            trie = pad_trie(trie, -(-trie.num_nodes // self._multiple_of) * self._multiple_of)
            input_ids, position_ids = trie.input_ids[None], trie.position_ids[None]
        if trie is None:
            mask = self.tensor(np.ascontiguousarray(micro_batch.attention_mask)).long()
            # Plain rows have the positions that the model gives them itself: RoBERTa's do not begin at 0.
            return self.decode(input_ids, None, mask, None)
        layout = self._layout_of(trie, query_nodes)
        return self.decode(input_ids, position_ids, self.mask_of(layout), layout)

    def decode(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray | None,
        mask: Tensor | dict[str, Tensor | None],
        layout: TrieLayout | StaticLayout | None,
    ) -> Tensor:
        """Hidden states [S, W, D] of tokens and positions [S, W]; `layout` says what is seen, or else `mask`."""
        inputs: dict[str, object] = {} if layout is None else {"trie_layout": layout}
        if position_ids is not None:
            inputs["position_ids"] = self.tensor(position_ids)
        output = decoder_of(self.network)(
            input_ids=self.tensor(input_ids),
            attention_mask=mask,
            use_cache=False,
            **inputs,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def mask_of(self, layout: TrieLayout | StaticLayout) -> Tensor | dict[str, Tensor | None]:
        """What the decoder is given as its mask next to `layout`."""
        if self.needs_masks:
            return explicit_masks(self.config, layout, self.network.dtype)  # type: ignore[arg-type]
        # A mask with four axes is passed through by transformers as it is, so that it builds none of its own and does
        # not guess packed sequences from positions that fall back; the layout says what is seen.
        return torch.zeros(1, 1, 1, 1, device=self.device)

    def _layout_of(self, trie: Trie, query_nodes: np.ndarray | None) -> TrieLayout | StaticLayout:
        if self.shapes is None:
            return self.layout(trie, query_nodes)
        return StaticLayout(trie, num_rows=self.shapes.num_rows, deepest=self.shapes.deepest, to_device=self.to_device)

    def layout(
        self,
        trie: Trie,
        query_nodes: np.ndarray | None = None,
        *,
        kind: AttentionKind | None = None,
        forced: ForcedRows | None = None,
    ) -> TrieLayout:
        """How this model's layers attend on `trie`; of the last layer, only `query_nodes` are wanted.

        Args:
            kind: another way to attend than the model's; `forced`: how its rows are cut. For proofs.
        """
        if self.attention is None:
            raise ValueError("this model was prepared for padded rows only")
        return TrieLayout(
            trie,
            kind=kind or self.attention,
            num_heads=self.heads.num_heads,
            num_key_heads=self.heads.num_key_heads,
            device=self.device,
            query_nodes=None if query_nodes is None else query_nodes.astype(np.int64),
            to_device=self.to_device,
            forced=forced,
        )

    def project(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], as the model's own forward makes them of its decoder's."""
        return self._head(hidden_ND)

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array of a micro-batch on the device; indices as int64."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if tensor.dtype == torch.int32:
            tensor = tensor.long()
        return self.to_device(tensor)
