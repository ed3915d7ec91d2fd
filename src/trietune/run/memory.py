"""What memory does to a training: how much is computed at once, less once memory ran out, the same when resumed.

max_positions 8192    memory ran out at 8192    4096 from here on, and the step is taken again
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trietune.errors import UserError
from trietune.model.fast.frozen_weight import pack_frozen_weights

if TYPE_CHECKING:
    from trietune.model.causal_lm import TrieModel
    from trietune.ranks.ranks import Ranks
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker
    from trietune.training.gradients import MicroBatchTooLargeError


class MicroBatchBound:
    """How many positions are computed at once, and how many weights are kept packed for it.

    Attributes:
        max_positions: of a micro-batch, in training and validation.
    """

    def __init__(self, prepared: Prepared, tracker: Tracker, ranks: Ranks) -> None:
        self.max_positions = prepared.plan.max_positions
        self._settings = prepared.settings
        self._plan = prepared.plan
        self._tracker = tracker
        self._ranks = ranks
        self._is_sharded = prepared.settings.parallelism_strategy == "fsdp"

    def take_over(self, state: Mapping[str, object], model: TrieModel) -> None:
        """Cut batches and pack weights as before, whatever memory is free now, so that the numbers are the same.

        Args:
            state: of the checkpoint that is resumed.
        """
        before, packed = state.get("max_positions"), state.get("packed_bytes")
        if self._settings.max_tokens_per_micro_batch == "auto" and isinstance(before, int):
            if self.max_positions < before:
                self._tracker.info(
                    f"less memory is free than before: micro-batches of at most {self.max_positions:,} tokens instead "
                    f"of {before:,}; a batch that is cut differently has the same gradients up to rounding"
                )
            self.max_positions = min(self.max_positions, before)
        if self._is_sharded or self._settings.pack_weights != "auto" or not isinstance(packed, int):
            return
        if packed != model.packed_bytes:
            model.packed_bytes = pack_frozen_weights(model.network, most_bytes=min(packed, model.packed_bytes))
            if model.packed_bytes != packed:
                self._tracker.info(
                    "less memory is free than before, so fewer weights are packed: the same numbers up to rounding, "
                    "not the same bits"
                )

    def state(self, model: TrieModel) -> dict[str, object]:
        """For a checkpoint."""
        return {"max_positions": self.max_positions, "packed_bytes": model.packed_bytes}

    def halve(self, error: MicroBatchTooLargeError, number: int, model: TrieModel) -> None:
        """Memory ran out in step `number`: half as much at once from here on, in validations too.

        Raises:
            UserError: one example alone is too long, or the layers of a sharded model cannot be computed again.
        """
        self._write_snapshot()
        where = f"step {number}, on {self._plan.device.name}; checkpoints of earlier steps are whole"
        if self._is_sharded:
            raise UserError(
                f"memory ran out at a micro-batch of {error.num_positions:,} tokens",
                where=where,
                next_step=f"`--resume --set max_tokens_per_micro_batch={max(error.num_positions // 2, error.longest)}`",
            ) from error
        if error.num_positions <= error.longest:
            self._ranks.once(lambda: self._raise_too_long(error, where))
        self.max_positions = max(error.num_positions // 2, error.longest)
        if model.most_cells is not None:
            model.most_cells = max(model.most_cells // 2, error.longest)
        draws = self._settings.lora_dropout or self._settings.base_dropout
        redrawn = "; dropout draws new masks" if draws else ""
        self._tracker.warn(
            f"memory ran out at a micro-batch of {error.num_positions:,} tokens: at most {self.max_positions:,} from "
            f"here on, and step {number:,} begins again{redrawn}"
        )

    def _raise_too_long(self, error: MicroBatchTooLargeError, where: str) -> None:
        raise UserError(
            f"not enough memory for one example of {error.longest:,} tokens",
            where=where,
            next_step="`--set gradient_checkpointing=True`"
            if not self._settings.gradient_checkpointing
            else f"drop longer examples with `--set max_length={max(error.longest // 2, 1)}`, or use a smaller "
            "base model",
        ) from error

    def _write_snapshot(self) -> None:
        """What took memory until it ran out, the first time."""
        path = self._plan.directory / "memory_snapshot.pickle"

        def write() -> None:
            try:
                if not path.exists() and self._plan.device.write_memory_snapshot(path):
                    self._tracker.info(f"{path} shows what used the memory; open it at https://pytorch.org/memory_viz")
            except OSError as error:
                self._tracker.warn(f"no memory snapshot: {error}")

        self._ranks.on_first(write)
