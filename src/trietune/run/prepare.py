"""From settings to what a run needs: the device first, then, with transformers, everything else.

Nothing is written but caches. Of several processes one prepares first, and the others follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.data.sources import check_local
from trietune.errors import UserError
from trietune.run.environment import PACKAGES, installed_version, sampled_digest, start_adapter
from trietune.run.opening import open_machine
from trietune.run.prepared import Chosen, Prepared

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.device import Device
    from trietune.ranks.ranks import Ranks
    from trietune.tracking.tracker import Tracker


def prepare_together(settings: Settings, tracker: Tracker, check_stop: Callable[[], None], ranks: Ranks) -> Prepared:
    """`prepare` on every rank: rank 0 first, which makes caches and chooses; then one on each other machine; then all.

    Raises:
        UserError: on every rank, if one fails; and where ranks would not train the same thing.
    """
    first: list[Prepared] = []

    def choose() -> list[str]:
        first.append(prepare(settings, tracker, check_stop, num_processes=ranks.count))
        plan = first[0].plan
        return [str(plan.directory), str(plan.dtype).removeprefix("torch.")]

    directory, dtype = ranks.once(choose)
    chosen = Chosen(Path(directory), dtype)

    def follow() -> Prepared:
        if first:
            return first[0]
        return prepare(settings, tracker, check_stop, num_processes=ranks.count, chosen=chosen)

    prepared = ranks.in_turn(follow)
    plan = prepared.plan
    if ranks.count > 1:
        ranks.agree(
            {
                **{f"`{key}`": value for key, value in settings.dump_public().items()},
                "the training data": prepared.data.train_fingerprint,
                "the validation data": prepared.data.validation_fingerprint,
                "the base model": prepared.base.digest or sampled_digest(prepared.base.path),
                "the converted base model": prepared.base.weights_digest,
                "the initial adapter": start_adapter(prepared),
                "the kind of device": plan.device.kind,
                "the number of steps": plan.num_steps,
                "the grouping of examples": plan.is_grouped,
                **{f"the version of {name}": installed_version(name) for name in PACKAGES},
            }
        )
    return replace(prepared, plan=replace(plan, max_positions=min(ranks.gather(plan.max_positions))))


def prepare(
    settings: Settings,
    tracker: Tracker,
    check_stop: Callable[[], None],
    *,
    num_processes: int = 1,
    chosen: Chosen | None = None,
    device: Device | None = None,
) -> Prepared:
    """Find the model, read the data, choose device and layout; writes nothing but caches.

    Args:
        num_processes: processes that will share the training.
        chosen: by another process, for this one too.
        device: to plan for, which need not be here; None chooses it by the settings.
    """
    if settings.dataset_id is None and settings.train_file is None:
        raise UserError(
            "nothing says what to train on: `train_file` and `dataset_id` are not set",
            next_step="write `train_file: data.jsonl`, or type `--data data.jsonl` (or a hub id)",
        )
    check_local(settings)
    machine = open_machine(settings, tracker, num_processes=num_processes, device=device)
    # Now that the device has been chosen: transformers starts XLA devices when it is imported.
    from trietune.run.planning import plan_run

    return plan_run(machine, settings, tracker, check_stop, num_processes=num_processes, chosen=chosen)
