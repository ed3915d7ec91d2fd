"""A causal language model that takes micro-batches: tries, packed sequences or padded rows.

    micro-batch -> decoder over all positions -> hidden states at label positions -> head -> losses

The network stays the library's own: with a trie, only its attention is told what each node sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trietune.model.attention import register
from trietune.model.loss import label_losses
from trietune.model.trie_layout import AttentionKind, TrieLayout
from trietune.trie import MicroBatch, Trie, pad_trie


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What attention layouts are made for."""

    num_heads: int
    num_key_heads: int


class TrieModel:
    """`network` as a function from micro-batches to the loss of each label.

    Args:
        network: a causal language model of transformers, on `device`, its adapter layers in place.
        attention: how tries attend; None leaves the library's attention alone, for padded rows only.
        prunes_last: whether the network's last layer computes the needed positions alone (`fuse_trie_layers`).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        attention: AttentionKind | None = "rows",
        prunes_last: bool = False,
    ) -> None:
        import os
        self._multiple = int(os.environ.get("MULT", "1"))
        self._prunes_last = prunes_last and attention == "rows"
        self.network = network
        self.device = device
        self.attention = attention
        self.config = network.config.get_text_config()  # type: ignore[union-attr, operator]  # transformers is untyped
        self.heads = HeadShape(
            self.config.num_attention_heads,
            getattr(self.config, "num_key_value_heads", self.config.num_attention_heads),
        )
        if attention is not None:
            network.set_attn_implementation(register())  # type: ignore[operator]

    @property
    def vocabulary_size(self) -> int:
        return int(self.config.vocab_size)

    def label_losses(self, micro_batch: MicroBatch) -> Tensor:
        """`-log p(label)` of each (position, label) pair of the micro-batch: [N], fp32 or fp64, with gradients."""
        places = micro_batch.label_index
        needed = None
        if self._prunes_last and micro_batch.trie is not None:
            needed, places = np.unique(micro_batch.label_index, return_inverse=True)
        hidden = self.hidden_states(micro_batch, needed)
        at_labels = hidden.flatten(0, 1).index_select(0, self._tensor(places))
        return label_losses(at_labels, self._tensor(micro_batch.labels), self.project, self.vocabulary_size)

    def hidden_states(self, micro_batch: MicroBatch, needed: np.ndarray | None = None) -> Tensor:
        """Hidden states after the final norm: [S, W, D] in the model's dtype, or [1, N, D] of the `needed` nodes."""
        decoder = self.network.get_decoder()  # type: ignore[operator]
        if micro_batch.trie is None:
            mask = self._tensor(np.ascontiguousarray(micro_batch.attention_mask))
            output = decoder(
                input_ids=self._tensor(micro_batch.input_ids),
                position_ids=self._tensor(micro_batch.position_ids),
                attention_mask=mask.long(),
                use_cache=False,
            )
        else:
            trie = pad_trie(micro_batch.trie, -(-micro_batch.num_positions // self._multiple) * self._multiple)
            # A mask with four axes is passed through by the library as it is, so that it builds none of its own and
            # does not guess packed sequences from positions that fall back; the layout says what is seen.
            passed_through = torch.zeros(1, 1, 1, 1, device=self.device)
            output = decoder(
                input_ids=self._tensor(trie.input_ids[None]),
                position_ids=self._tensor(trie.position_ids[None]),
                attention_mask=passed_through,
                use_cache=False,
                trie_layout=self.layout(trie, needed),
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def layout(self, trie: Trie, needed: np.ndarray | None = None) -> TrieLayout:
        """How this model's layers attend on `trie`; of the last layer, only `needed` nodes are wanted."""
        if self.attention is None:
            raise ValueError("this model was prepared for padded rows only")
        return TrieLayout(
            trie,
            kind=self.attention,
            num_heads=self.heads.num_heads,
            num_key_heads=self.heads.num_key_heads,
            device=self.device,
            needed=None if needed is None else needed.astype(np.int64),
        )

    def project(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], scaled and soft-capped where the model does so."""
        logits: Tensor = self.network.get_output_embeddings()(hidden_ND)  # type: ignore[operator]
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
            if (scale := getattr(self.config, name, None)) not in (None, 1):
                logits = logits * scale
        if (divisor := getattr(self.config, "logits_scaling", None)) not in (None, 1):  # Granite
            logits = logits / divisor
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2, RecurrentGemma
            softcap = getattr(self.config, name, None)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
        return logits

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if tensor.dtype == torch.int32:
            tensor = tensor.long()
        return tensor.to(self.device, non_blocking=True)
