"""Whether examples with a common prefix share a batch, and what a few batches then hold.

The groups of a large data set are kept in the cache beside its tokens: finding them sorts everything.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trietune.data.answers import AnswerSets
from trietune.data.cache import make_key
from trietune.io.cache_folder import mark_used
from trietune.run.plan import ProcessesPlan, Sharing
from trietune.training.sampler import Sampler
from trietune.trie import UNBOUNDED, make_micro_batches
from trietune.trie.batch_stats import measure_work
from trietune.trie.dealing import deal_step
from trietune.trie.groups import SHARED_PART, SHORT_RUN, PrefixGroups, find_prefix_groups

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.data.loaded_data import Data
    from trietune.run.objective import Rows
    from trietune.tracking.tracker import Tracker
    from trietune.trie.batch_stats import Work
    from trietune.trie.dealing import Deal
    from trietune.trie.groups import PrefixGroups

# Grouping pays if it saves this much of the positions that plain shuffling computes.
GROUPING_SAVES = 0.25
# Batches that are laid out to measure what is shared and how much memory they take.
SAMPLED_BATCHES = 8
# Below this part of the processes' number, a larger batch is suggested.
GOOD_SHARE = 0.75
# Groups of fewer examples are found in less than a second.
KEPT_FROM_EXAMPLES = 200_000


def choose_groups(
    settings: Settings, data: Data, sequences: Rows, cache_folder: Path, tracker: Tracker
) -> tuple[PrefixGroups | None, Work]:
    """Prefix groups if `group_by_prefix` asks for them, or, with `auto`, if they save much; and a few batches' work."""
    if settings.group_by_prefix is False or settings.batching != "trie":
        return None, measure_batches(settings, sequences, None, UNBOUNDED)
    if settings.batch_size * settings.gradient_accumulation_steps == 1:
        groups = find_groups(data, sequences, 32, cache_folder)
        if groups.num_distinct < (1 - GROUPING_SAVES) * groups.num_tokens:
            tracker.info(
                "`batch_size: 1` computes each example on its own; the examples share "
                f"{1 - groups.num_distinct / groups.num_tokens:.0%} of their tokens. `--set batch_size=32` computes "
                "shared prefixes once (adjust the learning rate: docs/batches.md)"
            )
        return None, measure_batches(settings, sequences, None, UNBOUNDED)
    groups = find_groups(data, sequences, settings.batch_size, cache_folder)
    grouped = measure_batches(settings, sequences, groups, UNBOUNDED)
    if settings.group_by_prefix is True:
        return groups, grouped
    shuffled = measure_batches(settings, sequences, None, UNBOUNDED)
    saves_much = grouped.num_positions < (1 - GROUPING_SAVES) * shuffled.num_positions
    return (groups, grouped) if saves_much else (None, shuffled)


def find_groups(data: Data, sequences: Rows, batch_size: int, cache_folder: Path) -> PrefixGroups:
    """The prefix groups of the training data, from the cache if it is large and they are there."""
    if isinstance(sequences, AnswerSets):
        return find_prefix_groups(sequences.first_answers, batch_size=batch_size)
    if len(data.train) < KEPT_FROM_EXAMPLES:
        return find_prefix_groups(data.train, batch_size=batch_size)
    key = make_key(train=data.train_fingerprint, batch_size=batch_size, rules=[SHARED_PART, SHORT_RUN])
    path = cache_folder / "groups" / f"{key}.npz"
    groups = _read(path, len(data.train))
    mark_used(path)
    if groups is None:
        groups = find_prefix_groups(data.train, batch_size=batch_size)
        _write(path, groups)
    return groups


def measure_batches(settings: Settings, sequences: Rows, groups: PrefixGroups | None, max_positions: int) -> Work:
    """What a few batches of the first epoch hold, laid out as training will."""
    sampler = Sampler(sequences.num_rows, batch_size=settings.batch_size, seed=settings.seed, groups=groups)
    return measure_work(
        [
            micro_batch
            for number in range(min(SAMPLED_BATCHES, sampler.batches_per_epoch))
            for part in sequences.parts_of(sampler.batch(0, number))
            for micro_batch in make_micro_batches(
                sequences, part, batching=settings.batching, max_positions=max_positions
            )
        ]
    )


def num_sampled_of(settings: Settings, num_train: int) -> int:
    """Examples that `measure_batches` looks at."""
    return min(SAMPLED_BATCHES * settings.batch_size, num_train)


def sharing_of(work: Work, num_examples: int) -> Sharing:
    """What the `work` of `measure_batches`, which looked at `num_examples`, says about an example."""
    return Sharing(work.num_tokens / num_examples, work.num_positions / num_examples)


def plan_processes(
    settings: Settings, rows: Rows, groups: PrefixGroups | None, count: int, label_cost: float, max_positions: int
) -> tuple[ProcessesPlan, Work, int]:
    """How `count` processes share a few steps of the first epoch, and whether a larger batch would share better; what
    all of them compute together, and of how many examples."""
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    deals, num_examples = _deals(settings, rows, groups, count, label_cost, settings.batch_size)
    speed_up = _speed_up(deals)
    suggestion = None
    if speed_up < GOOD_SHARE * count:
        larger = 4 * settings.batch_size
        if larger * settings.gradient_accumulation_steps <= rows.num_rows:
            better = _speed_up(_deals(settings, rows, groups, count, label_cost, larger)[0])
            suggestion = (larger, better) if better > speed_up else None
    work = measure_work(
        [
            micro_batch
            for deal in deals
            for part in deal.parts
            for apart in rows.apart(part)
            for micro_batch in make_micro_batches(rows, apart, batching=settings.batching, max_positions=max_positions)
        ]
    )
    shares = np.array([deal.costs / max(float(deal.costs.sum()), 1e-9) for deal in deals])
    plan = ProcessesPlan(
        count=count,
        examples_per_step=min(per_step, rows.num_rows),
        speed_up=speed_up,
        positions_per_example=work.num_positions / max(num_examples, 1),
        smallest_part=float(shares.min(1).mean()),
        largest_part=float(shares.max(1).mean()),
        repeated=sum(float(deal.costs.sum()) for deal in deals) / max(sum(d.cost_of_whole for d in deals), 1e-9) - 1,
        suggestion=suggestion,
    )
    return plan, work, num_examples


def _deals(
    settings: Settings,
    rows: Rows,
    groups: PrefixGroups | None,
    count: int,
    label_cost: float,
    batch_size: int,
) -> tuple[list[Deal], int]:
    sampler = Sampler(rows.num_rows, batch_size=batch_size, seed=settings.seed, groups=groups)
    batches = [sampler.batch(0, number) for number in range(sampler.batches_per_epoch)]
    per_step = settings.gradient_accumulation_steps
    steps = [np.concatenate(batches[at : at + per_step]) for at in range(0, len(batches), per_step)][:SAMPLED_BATCHES]
    # The last, smaller step of an epoch would count as much as a whole one.
    steps = [step for step in steps if len(step) == len(steps[0])]
    deals = [
        deal_step(rows, rows.sequences_of(step), count, batching=settings.batching, label_cost=label_cost)
        for step in steps
    ]
    return deals, sum(len(step) for step in steps)


def _speed_up(deals: list[Deal]) -> float:
    return sum(deal.cost_of_whole for deal in deals) / max(sum(float(deal.costs.max()) for deal in deals), 1e-9)


def _read(path: Path, num_sequences: int) -> PrefixGroups | None:
    """Groups from the cache; None if there are none or they cannot be read. The archive checks its own sums."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            groups = PrefixGroups(
                archive["order"], archive["start"], int(archive["num_tokens"]), int(archive["num_distinct"])
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return groups if len(groups.order) == num_sequences else None


def _write(path: Path, groups: PrefixGroups) -> None:
    """Keep the groups, whole or not at all; a cache that cannot be written to costs only time."""
    staged = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".building-", delete=False) as file:
            staged = file.name
            np.savez(
                file,
                order=groups.order,
                start=groups.start,
                num_tokens=groups.num_tokens,
                num_distinct=groups.num_distinct,
            )
        Path(staged).replace(path)
    except OSError:
        if staged is not None:
            Path(staged).unlink(missing_ok=True)
