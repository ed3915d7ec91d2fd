"""Connect the processes that a launcher started."""

from __future__ import annotations

from collections.abc import Callable

from trietune.errors import UserError
from trietune.ranks.launched import read_launched
from trietune.ranks.ranks import ALONE, Ranks


def open_ranks(
    *,
    may_use_cuda: bool = True,
    on_lost: Callable[[UserError], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Ranks:
    """The ranks of this training, connected; `ALONE` if this is the one process. No torch is loaded for that.

    Args:
        may_use_cuda: whether CUDA devices are used where there are some; each process then uses its own.
        on_lost: told which rank was lost, and ends this process; by default the sentence is printed.
        check: called while the others are waited for; raises to leave.

    Raises:
        UserError: the launcher's variables are wrong or incomplete, the others cannot be reached, or there are fewer
            GPUs than processes on this machine.
    """
    launched = read_launched()
    if launched.count == 1:
        return ALONE
    from trietune.ranks.together import Together

    return Together(launched, may_use_cuda=may_use_cuda, on_lost=on_lost, check=check)
