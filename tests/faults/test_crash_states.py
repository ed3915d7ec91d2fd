"""No legal state after a power cut breaks a promise: thousands of them, each given to the real reader."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_states import Operation, Tree, World, crashes, lay_out, recording

from fault_table import Tally
from trietune.checkpoints import resume
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FolderStorage
from trietune.checkpoints.remote.uploads import synchronize
from trietune.checkpoints.store import CheckpointStore
from trietune.io import directory
from trietune.io.directory import DamagedDirectory, LazyContent, verify_directory, write_directory
from trietune.io.manifest import ManifestInfo

MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
NO_WAIT = RetryPolicy(sleep=lambda seconds: False, num_attempts=1)
LIMITS: dict[str, Any] = {"keep_last_n": 2, "keep_best_n": 0, "metric": "eval/loss", "mode": "min"}


def store_in(root: Path, **changes: Any) -> CheckpointStore:
    run = root / "run"
    run.mkdir(exist_ok=True)
    return CheckpointStore(run, **{"run_id": "run1", **LIMITS, **changes})


def remote_in(root: Path) -> RemoteRun:
    return RemoteRun(FolderStorage(root / "mirror"), "run", NO_WAIT)


def contents(step: int, salt: str = "") -> dict[str, Any]:
    big = (f"{salt}{step} ".encode() * 3000)[:9000]
    return {
        "adapter_config.json": b'{"r": 4}\n',
        "adapter_model.safetensors": big,
        "optimizer.safetensors": LazyContent(len(big), lambda: iter([big[:-3000:-1], big[-3000::-1]])),
        "trainer_state.json": f'{{"step": {step}}}\n'.encode(),
    }


@dataclass
class Script:
    """What a scenario does while it is recorded; `promise` marks the moment at which a call has returned."""

    root: Path
    operations: list[Operation]
    limits: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> CheckpointStore:
        return store_in(self.root, **self.limits)

    def promise(self, *what: Any) -> None:
        self.operations.append(Operation("ack", promise=what))

    def save(self, step: int, loss: float = 0.5, salt: str = "", store: CheckpointStore | None = None) -> None:
        before = len(self.operations)
        (store or self.store).save(step, contents(step, salt), metrics={"eval/loss": loss})
        renames = [
            n for n, operation in enumerate(self.operations)
            if n >= before and operation.target == f"run/checkpoints/step-{step:08d}"
        ]  # fmt: skip
        # `save` also removes old ones before it returns; what it promised holds from the flush after its rename.
        self.operations.insert(renames[-1] + 2, Operation("ack", promise=("saved", step)))
        for n in range(len(self.operations) - 1, renames[-1] + 2, -1):
            operation = self.operations[n]
            if operation.name == "rename" and "/.removed-" in operation.target:
                self.operations.insert(n, Operation("ack", promise=("removing", int(operation.path[-8:]))))


def three_saves_with_retention(script: Script) -> None:
    store = script.store
    for step in (50, 100, 150, 200):
        script.save(step, store=store)


def best_one_kept_and_the_newest_removed(script: Script) -> None:
    script.limits = {"keep_last_n": 0, "keep_best_n": 1}
    for step, loss in ((50, 0.2), (100, 0.4), (150, 0.1)):
        script.save(step, loss)


def save_over_a_damaged_one(script: Script) -> None:
    script.save(100)


def save_over_a_whole_one(script: Script) -> None:
    script.save(50, salt="new")
    script.save(100, salt="new")


def final_adapter_twice(script: Script) -> None:
    for salt in ("a", "b"):
        info = ManifestInfo(run_id="run1", step=200, kind="adapter")
        write_directory(script.root / "run" / "adapter", contents(200, salt), info=info)
        script.promise("adapter")


def clean_up_at_start(script: Script) -> None:
    script.store.clean_leftovers()
    script.promise("clean")
    script.save(150)


def go_back_and_on(script: Script) -> None:
    script.store.set_aside_newer(50)
    script.save(75)


def copies_with_retention(script: Script) -> None:
    store, remote = script.store, remote_in(script.root)
    for step in (50, 100, 150):
        store.save(step, contents(step))
        synchronize(store, remote)
        script.promise("copied", step)
    store.save(150, contents(150, "new"))
    synchronize(store, remote)


def logs_cut_back(script: Script) -> None:
    run = script.root / "run"
    resume.keep_run_id(run, resume.new_run_id())
    script.promise("run id")
    resume.abandon_lines(run / "metrics.jsonl", 2)
    script.promise("cut")


def prepare_nothing(root: Path) -> None:
    store_in(root)


def prepare_two(root: Path) -> None:
    for step in (50, 100):
        store_in(root).save(step, contents(step))


def prepare_two_one_damaged(root: Path) -> None:
    prepare_two(root)
    os.truncate(root / "run/checkpoints/step-00000100/adapter_model.safetensors", 5000)


def prepare_leftovers(root: Path) -> None:
    prepare_two(root)
    folder = root / "run/checkpoints"
    for name in (".staging-step-00000150-aaaaaaaaaaaa", ".removed-step-00000025-bbbbbbbbbbbb"):
        shutil.copytree(folder / "step-00000050", folder / name)
    (folder / ".removed-step-00000025-bbbbbbbbbbbb" / "manifest.json").unlink()
    (folder / "step-00000100").rename(folder / ".replaced-step-00000100-cccccccccccc")


def prepare_three(root: Path) -> None:
    for step in (50, 100, 150):
        store_in(root, keep_last_n=9).save(step, contents(step))


def prepare_logs(root: Path) -> None:
    run = store_in(root).run_directory
    lines = [f'{{"step": {n}, "text": "{"x" * 900}"}}\n' for n in range(1, 7)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "te')


def whole_steps(store: CheckpointStore) -> dict[int, bytes]:
    """Every visible `step-*` must be whole; their weights."""
    found = {}
    for item in store.scan():
        assert item.damage is None, f"a visible checkpoint is not whole: {item.damage}"
        found[item.step] = directory.read_directory(item.path)[1]["adapter_model.safetensors"]
    return found


def check_saves(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    store = store_in(root, **limits)
    whole_steps(store)
    store.clean_leftovers()
    found = whole_steps(store)
    assert store.clean_leftovers() == [], "cleaning up twice differs from once"
    promised = set(start)
    for promise in promises:
        if promise[0] == "saved":
            promised.add(promise[1])
        if promise[0] == "removing":
            promised.discard(promise[1])
    assert promised <= set(found), f"acknowledged {sorted(promised)}, found {sorted(found)}"
    if promised:
        loaded = store.load("last")
        assert loaded is not None
        assert loaded.step >= max(promised)
        assert loaded.contents["adapter_model.safetensors"] in (
            contents(loaded.step)["adapter_model.safetensors"],
            contents(loaded.step, "new")["adapter_model.safetensors"],
        )
    names = {entry.name for entry in store.folder.iterdir()} if store.folder.is_dir() else set()
    assert not [name for name in names if name.startswith((".staging-", ".removed-", ".replaced-"))]


def check_damaged_one_is_kept(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    store = store_in(root, **limits)
    store.clean_leftovers()
    folder = store.folder
    aside = [path for path in folder.iterdir() if directory.DAMAGED.fullmatch(path.name)]
    damaged = [item for item in store.scan() if item.damage is not None]
    assert len(aside) + len(damaged) == 1, "the damaged one was lost or doubled"
    loaded = store.load("last")
    assert loaded is not None
    assert loaded.step == (100 if ("saved", 100) in promises else loaded.step)


def check_adapter(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    import re

    run = root / "run"
    if (run / "adapter").exists():
        verify_directory(run / "adapter")
    directory.clean_leftovers(run, re.compile("adapter"))
    assert directory.clean_leftovers(run, re.compile("adapter")) == []
    if promises:
        verify_directory(run / "adapter")
    assert {entry.name for entry in run.iterdir()} <= {"adapter"}


def check_going_back(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    store = store_in(root, **limits)
    store.clean_leftovers()
    found = whole_steps(store)
    assert 50 in found
    for step in (100, 150):
        aside = store.folder / f"abandoned-1-step-{step:08d}"
        assert (step in found) != aside.is_dir(), f"step {step} is lost or doubled"
        if aside.is_dir():
            verify_directory(aside)
    if ("saved", 75) in promises:
        assert max(found) == 75


def check_copies(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    remote = remote_in(root)
    copies = {copy.step: copy for copy in remote.scan()}
    for copy in copies.values():
        assert copy.manifest is None or copy.damage is None, f"a manifest without its payload: {copy}"
        if copy.manifest is not None:
            remote.download(copy)
    whole = {step for step, copy in copies.items() if copy.manifest is not None}
    promised = [promise[1] for promise in promises]
    if promised and len(promised) < 3:
        assert promised[-1] in whole, "an acknowledged copy is gone"
    if promised:
        assert whole, "no whole copy is left"
    store = store_in(root)
    store.clean_leftovers()
    synchronize(store, remote)
    again = {copy.step for copy in remote.scan() if copy.damage is None}
    assert max((item.step for item in store.scan()), default=0) in again | {0}


def check_logs(root: Path, promises: list[Any], start: set[int], limits: dict[str, Any]) -> None:
    run = root / "run"
    before = range(1, 7)
    found = {path.name: path.read_bytes() for path in run.glob("metrics*.jsonl")}
    kept = found["metrics.jsonl"]
    moved = found.get("metrics.abandoned-1.jsonl", b"")
    assert all(f'"step": {n},'.encode() in kept + moved for n in before), "a line is lost"
    assert b'{"step": 7, "te' in kept + moved
    resume.abandon_lines(run / "metrics.jsonl", 2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [line[:10] for line in lines] == ['{"step": 1', '{"step": 2']
    assert len(list(run.glob("metrics.abandoned-*.jsonl"))) == 1
    if promises:
        assert (run / ".run-id").read_text().strip()


Check = Callable[[Path, list[Any], set[int], dict[str, Any]], None]
SCENARIOS: list[tuple[Callable[[Path], None], Callable[[Script], None], set[int], Check, int]] = [
    (prepare_nothing, three_saves_with_retention, set(), check_saves, 900),
    (prepare_nothing, best_one_kept_and_the_newest_removed, set(), check_saves, 750),
    (prepare_two_one_damaged, save_over_a_damaged_one, set(), check_damaged_one_is_kept, 140),
    (prepare_two, save_over_a_whole_one, {50, 100}, check_saves, 600),
    (prepare_nothing, final_adapter_twice, set(), check_adapter, 350),
    (prepare_leftovers, clean_up_at_start, {50, 100}, check_saves, 500),
    (prepare_three, go_back_and_on, set(), check_going_back, 140),
    (prepare_nothing, copies_with_retention, set(), check_copies, 2500),
    (prepare_logs, logs_cut_back, set(), check_logs, 15),
]


def run_scenario(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, take_every: int = 1
) -> tuple[int, list[str]]:
    """How many distinct states were looked at, and what was wrong with which."""
    prepare, act, start, check, _ = SCENARIOS[number]
    root = tmp_path / "recorded"
    root.mkdir()
    prepare(root)
    world = World(root)
    with recording(root, monkeypatch) as operations:
        script = Script(root, operations)
        act(script)
    num_states, violations = 0, []
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        for position, promises, tree in itertools.islice(_crashes(world, operations), 0, None, take_every):
            folder = Path(scratch) / str(num_states)
            folder.mkdir()
            lay_out(tree, folder)
            (folder / "run").mkdir(exist_ok=True)
            try:
                check(folder, promises, start, script.limits)
            except (AssertionError, DamagedDirectory, KeyError) as error:
                after = operations[position - 1] if position else "start"
                violations.append(f"{act.__name__} after {position} ({after}): {error}"[:400])
            num_states += 1
            shutil.rmtree(folder)
    return num_states, violations


def _crashes(world: World, operations: list[Operation]) -> Iterator[tuple[int, list[Any], Tree]]:
    return crashes(world, operations)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_power_cut_while_starting_again_breaks_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    root = tmp_path / "first"
    root.mkdir()
    prepare_nothing(root)
    world = World(root)
    with recording(root, monkeypatch) as operations:
        three_saves_with_retention(Script(root, operations))
    firsts = list(_crashes(world, operations))[::70]
    num_states, violations = 0, []
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        for index, (_, promises, tree) in enumerate(firsts):
            again = Path(scratch) / f"again-{index}"
            again.mkdir()
            lay_out(tree, again)
            (again / "run").mkdir(exist_ok=True)
            second_world = World(again)
            with recording(again, monkeypatch) as second:
                script = Script(again, second)
                script.store.clean_leftovers()
                script.save(250)
            for position, more, second_tree in _crashes(second_world, second):
                folder = Path(scratch) / "state"
                folder.mkdir()
                lay_out(second_tree, folder)
                (folder / "run").mkdir(exist_ok=True)
                try:
                    check_saves(folder, promises + more, set(), {})
                except (AssertionError, DamagedDirectory) as error:
                    violations.append(f"{index}, {position}: {error}"[:300])
                num_states += 1
                shutil.rmtree(folder)
            shutil.rmtree(again)
    tally("power cut, then another while starting again: states", num_states, num_states - len(violations))
    assert not violations, f"{len(violations)} of {num_states} states:\n" + "\n".join(violations[:5])
    assert num_states >= 2_000, f"only {num_states} distinct states"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=[act.__name__ for _, act, *_ in SCENARIOS])
def test_no_state_after_a_power_cut_breaks_a_promise(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    num_states, violations = run_scenario(number, tmp_path, monkeypatch)
    name = SCENARIOS[number][1].__name__.replace("_", " ")
    tally(f"power cut, {name}: states", num_states, num_states - len(violations))
    assert not violations, f"{len(violations)} of {num_states} states:\n" + "\n".join(violations[:5])
    assert num_states >= SCENARIOS[number][4], f"only {num_states} distinct states"


def test_the_scenarios_add_up_to_four_thousand_states() -> None:
    assert sum(expected for *_, expected in SCENARIOS) >= 4_000


@pytest.mark.parametrize("number", [0, 7], ids=["saves", "copies"])
def test_a_sample_of_the_states_after_a_power_cut(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_states, violations = run_scenario(number, tmp_path, monkeypatch, take_every=17)
    assert not violations, "\n".join(violations[:5])
    assert num_states > 20
