"""Compare a few examples of the first batch on the trie with plain rows through transformers only.

A mask that is wrong by one position changes the loss by far more than rounding does, so this stops a model whose code
does not take our attention as we think, before it trains on nonsense.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trietune.data.examples import IGNORED_LABEL
from trietune.errors import UserError
from trietune.model.causal_lm import TrieModel
from trietune.trie import UNBOUNDED, Batching, Sequences, make_micro_batches

# Difference of the mean loss, relative to 1 + loss. fp32 sums in another order; bf16 has 8 bits, and a few dozen layers
# of it leave about 1% of a loss.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
NUM_CHECKED = 4
MAX_LOGITS_PER_ROW = 200_000_000


@dataclass(frozen=True, slots=True)
class Checked:
    """Both losses, and how many examples they are the mean of."""

    loss: float
    loss_of_rows: float
    num_examples: int


def check_against_rows(
    model: TrieModel, sequences: Sequences, indices: np.ndarray, *, batching: Batching, family: str
) -> Checked | None:
    """Raise `UserError` if the loss of some of `sequences[indices]` is not that of plain rows.

    Neighbors in sorted order are taken, so that they share what there is to share. Returns None if no example has a
    label or all are too long for full logits.
    """
    lengths = np.diff(np.asarray(sequences.offsets))[indices]
    fitting = indices[lengths * model.vocabulary_size <= MAX_LOGITS_PER_ROW]
    chosen = _neighbors(sequences, fitting)
    micro_batches = model.pad_to_shapes(
        make_micro_batches(sequences, chosen, batching=batching, max_positions=UNBOUNDED)
    )
    if not micro_batches:
        return None
    was_training = model.network.training
    model.network.eval()
    try:
        with torch.no_grad():
            total = sum(
                float(torch.dot(model.label_losses(mb).cpu().double(), torch.from_numpy(mb.label_weight)))
                for mb in micro_batches
            )
            weight = sum(mb.total_weight for mb in micro_batches)
            rows = sum(_row_loss(model, sequences, index) for index in chosen)
    finally:
        model.network.train(was_training)
    checked = Checked(total / weight, rows / weight, len(chosen))
    dtype = next(model.network.parameters()).dtype
    difference = abs(checked.loss - checked.loss_of_rows) / (1 + abs(checked.loss_of_rows))
    if not difference <= TOLERANCES[dtype]:
        raise UserError(
            f"as `{batching}` batches, `{family}` has a loss of {checked.loss:.6g}; on plain rows through "
            f"transformers, {checked.loss_of_rows:.6g}",
            where=f"self-check of {len(chosen)} examples with attention `{model.attention}`; "
            f"relative difference {difference:.1e}, allowed {TOLERANCES[dtype]:.0e} in {dtype}",
            next_step="please report the family"
            if batching == "padded"
            else "`--set batching=padded` trains this model on plain rows; please report the family",
        )
    return checked


def _neighbors(sequences: Sequences, indices: np.ndarray) -> np.ndarray:
    """A few of `indices` that share as much as possible: the first one's neighbors by their tokens."""
    offsets = np.asarray(sequences.offsets)
    by_tokens = sorted(
        indices.tolist(), key=lambda i: np.asarray(sequences.input_ids[offsets[i] : offsets[i + 1]]).tolist()
    )
    return np.array(by_tokens[:NUM_CHECKED], np.int64)


def _row_loss(model: TrieModel, sequences: Sequences, index: int) -> float:
    """Summed loss of one example, through transformers' own attention and head."""
    begin, end = (int(x) for x in np.asarray(sequences.offsets)[index : index + 2])
    labels = np.array(sequences.labels[begin:end], np.int64)[1:]
    if end - begin < 2 or bool((labels == IGNORED_LABEL).all()):
        return 0.0
    # Padding at the end: a causal model does not see it from any label.
    width = end - begin if model.shapes is None else model.shapes.holding(end - begin, 1).num_positions
    tokens = np.zeros((1, width), np.int64)
    tokens[0, : end - begin] = sequences.input_ids[begin:end]
    padded_labels = np.full(width - 1, IGNORED_LABEL, np.int64)
    padded_labels[: end - begin - 1] = labels
    logits = model.network(input_ids=torch.from_numpy(tokens).to(model.device), use_cache=False).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        torch.from_numpy(padded_labels).to(model.device),
        reduction="sum",
        ignore_index=IGNORED_LABEL,
    )
    return float(losses)
