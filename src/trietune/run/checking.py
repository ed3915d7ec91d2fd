"""The model of a training, proven before its first step: what it computes is what plain rows would give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trietune.model.self_check import check_against_rows
from trietune.run.proving import positions_on_rows, positions_under_masks, prove_training

if TYPE_CHECKING:
    from trietune.model.causal_lm import TrieModel
    from trietune.ranks.ranks import Ranks
    from trietune.run.build import Built
    from trietune.run.memory import MicroBatchBound
    from trietune.run.objective import Learning
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker


def check_built(
    prepared: Prepared, built: Built, learning: Learning, bound: MicroBatchBound, ranks: Ranks, tracker: Tracker
) -> None:
    """Prove the built model, unless `self_check` is off; bounds micro-batches where layers attend under masks.

    Raises:
        UserError: the model cannot be computed as it would be here.
    """
    settings, plan = prepared.settings, prepared.plan
    if not settings.self_check or plan.num_steps == 0:
        _bound_rows(prepared, built.model, ranks)
        return
    if not plan.device.has_static_shapes:
        # Every rank proves what it will compute, on rows of one length; all end if one fails.
        free_bytes = min(ranks.gather(plan.device.free_memory_bytes()))
        ranks.together(lambda: _prove_and_bound(prepared, built.model, bound, free_bytes, tracker))
        bound.max_positions = min(ranks.gather(bound.max_positions))
        _bound_rows(prepared, built.model, ranks)
        return
    checked = check_against_rows(
        built.model,
        learning.rows,
        learning.rows.sequences_of(built.sampler.batch(0, 0)),
        batching=plan.batching,
        family=str(built.model.config.model_type),
    )
    if checked is not None:
        tracker.info(
            f"self-check: {checked.num_examples} examples have a loss of {checked.loss:.5f}, "
            f"{checked.loss_of_rows:.5f} on plain rows through transformers, both on the device"
        )


def _prove_and_bound(
    prepared: Prepared, model: TrieModel, bound: MicroBatchBound, free_bytes: int, tracker: Tracker
) -> None:
    proof = prove_training(prepared, model, free_bytes, tracker)
    if proof is None or not proof.needs_masks:
        return
    plan = prepared.plan
    under_masks = positions_under_masks(
        prepared.settings, model.config, plan.dtype, plan.device.free_memory_bytes(), trains=True
    )
    if under_masks < bound.max_positions:
        tracker.info(f"masks grow with the square of their length: micro-batches of at most {under_masks:,} tokens")
        bound.max_positions = under_masks


def _bound_rows(prepared: Prepared, model: TrieModel, ranks: Ranks) -> None:
    """Where tries run on whole rows, what is computed at once is counted in their positions."""
    if model.whole_rows is None:
        return
    settings, free_bytes = prepared.settings, prepared.plan.device.free_memory_bytes()
    bound = positions_on_rows(settings, model, free_bytes, gradient_checkpointing=settings.gradient_checkpointing)
    model.most_cells = min(ranks.gather(bound))
