"""The seam between a training and the processes that share it: what a loop may know of them, and no more.

    deal = deal_step(...)                        the same function on every rank
    part = ranks.mine(deal.parts)                what is computed here
    loss, sums = ranks.add_up(parameters, ...)   gradients summed in place, a few numbers with them: a message per step
    value = ranks.once(write)                    rank 0 writes; all get what it returned, or end as it did

A rank is one of the processes of a training, numbered from 0. `ALONE` is a training in one process: each method is the
identity, so that no number changes by a bit. Nobody outside this folder asks for a rank's number; what one rank knows
and the others need is passed through a method here, which all ranks call or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """One process; the base of several.

    Attributes:
        count: processes of this training.
        has_equal_passes: whether all ranks must compute as many passes, because they hold parts of one model.
        waiting_share: share of the last step that a rank spent waiting for the others, on average.
    """

    count = 1
    has_equal_passes = False
    waiting_share = 0.0

    def mine(self, parts: Sequence[T]) -> T:
        """Of one part a rank, this rank's."""
        return parts[0]

    def seed_words(self, words: Sequence[int]) -> list[int]:
        """Entropy of what is random within a step: every rank draws its own, rank 0 what one process would."""
        return list(words)

    def add_up(
        self, parameters: Sequence[nn.Parameter], loss: Tensor, numbers: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        """Sum the gradients of `parameters` over all ranks, in place, and `loss` and `numbers` with them.

        A parameter without a gradient on every rank keeps none; one with a gradient anywhere gets one everywhere. All
        ranks have the same bits afterwards.

        Returns:
            The summed loss, on the device that it was on, and the summed numbers.
        """
        return loss, list(numbers)

    def add_arrays(self, values: np.ndarray) -> np.ndarray:
        """Sum a float64 array of one length over all ranks; all get the same bits."""
        return values

    def level(self, items: Sequence[T], filler: T | None) -> Sequence[T]:
        """`items`, and `filler` after them until every rank has as many, where ranks must compute equal passes."""
        return items

    def once(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; every rank gets what it returned, or raises what it raised.

        The value is made of what JSON knows, bytes and paths; other ranks see lists for tuples.
        """
        return function()

    def on_first(self, function: Callable[[], object]) -> None:
        """Call `function` on rank 0; nobody waits for it, and what it raises is its own affair."""
        function()

    def first_of(self, first: Callable[[], T], others: Callable[[], T]) -> T:
        """What rank 0 makes with `first` and every other rank with `others`; nothing is exchanged."""
        return first()

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; where one fails, all end with that one error, said once."""
        return function()

    def in_turn(self, function: Callable[[], T]) -> T:
        """As `together`, but one rank on each machine goes first, so that caches are made once."""
        return function()

    def stop_together(self, check: Callable[[], None], num_stopping: float) -> None:
        """Call `check`, which raises `StopRequested` where this rank should stop; all stop if one should.

        Args:
            num_stopping: ranks that wanted to stop when the step's numbers were added up. At 0 nothing is asked, so
                that a wish that one rank has had since waits for the next step.
        """
        check()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in order."""
        return [value]

    def agree(self, values: Mapping[str, object]) -> None:
        """Make sure that all ranks hold the same values, by name.

        Raises:
            UserError: they do not; it names the first value that differs and the ranks that hold it.
        """

    def at(self, phase: str, step: int) -> None:
        """Tell the others where this rank is, in case they wait for it: `computing`, `evaluating`, `saving`."""

    def saved(self, where: str) -> None:
        """Note the newest checkpoint, for the message that a rank was lost."""

    def close(self) -> None:
        """Leave the others, in good order."""


ALONE = Ranks()
