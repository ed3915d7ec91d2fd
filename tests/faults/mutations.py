"""The tests are tested: each safeguard is taken out of a copy of the source, and a named test must then fail.

    python tests/faults/mutations.py [NAME ...]        prints one line a mutation; exit code 1 if any survives

A mutation is a text that stands once in a file and what replaces it, so a change of the source that moves it is
noticed. Each copy is proven to be the one that is tested: the tests run on the unmutated copy first and must pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CRASHES = "tests/faults/test_crash_states.py"
TRAINER = "tests/faults/test_trainer.py"
BIT_EQUAL = f"{TRAINER}::test_a_signal_saves_the_step_and_the_resume_is_bit_equal[15]"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `src/trietune/<file>`; pytest, given `tests`, must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs: str = ""


MUTATIONS = [
    Mutation(
        "flush of a file left out", "io/files.py",
        "            write(descriptor, piece)\n        flush(descriptor)\n", "            write(descriptor, piece)\n",
        (f"{CRASHES}::test_a_sample_of_the_states_after_a_power_cut",),
    ),
    Mutation(
        "flush that does nothing", "io/files.py",
        "    else:\n        os.fsync(descriptor)\n", "    else:\n        return\n",
        ("tests/faults/test_power_cuts.py::test_a_power_cut_never_loses_what_was_acknowledged[ext4]",), needs="root",
    ),
    Mutation(
        "flush that does nothing, seen by the kernel's trace", "io/files.py",
        "    else:\n        os.fsync(descriptor)\n", "    else:\n        return\n",
        ("tests/faults/test_system_calls.py::test_the_recording_is_what_the_kernel_saw",), needs="strace",
    ),
    Mutation(
        "flush of the folder after the rename left out", "io/directory.py",
        "    files.flush_folder(target.parent)\n    if moved_aside", "    if moved_aside",
        (f"{CRASHES}::test_a_sample_of_the_states_after_a_power_cut",),
    ),
    Mutation(
        "flush of the staged folder left out", "io/directory.py",
        "        files.flush_folder(staging)\n        moved_aside =", "        moved_aside =",
        (f"{CRASHES}::test_a_sample_of_the_states_after_a_power_cut",),
    ),
    Mutation(
        "of a streamed file, the first piece alone hashed", "io/directory.py",
        "            digest.update(piece)\n            size +=",
        "            if not size:\n                digest.update(piece)\n            size +=",
        ("tests/io/test_directory.py",),
    ),
    Mutation(
        "of a streamed file, the size not compared with the promise", "io/directory.py",
        "    if size != _size_of(content):\n", "    if False:\n", ("tests/io/test_directory.py",),
    ),
    Mutation(
        "no staging: written under its final name", "io/directory.py",
        '    staging = files.hidden_sibling("staging", target)\n    try:\n        files.make_folder(staging)\n        entries',  # noqa: E501
        "    staging = target\n    try:\n        files.make_folder(staging)\n        entries",
        (f"{CRASHES}::test_a_sample_of_the_states_after_a_power_cut", "tests/io/test_directory.py"),
    ),
    Mutation(
        "removal without hiding first", "io/directory.py",
        "    try:\n        files.rename(directory, hidden)\n",
        "    files.remove_tree(directory)\n    return\n    try:\n        files.rename(directory, hidden)\n",
        (f"{CRASHES}::test_a_sample_of_the_states_after_a_power_cut",),
    ),
    Mutation(
        "removal without a flush after hiding", "io/directory.py",
        "    files.flush_folder(directory.parent)\n    files.remove_tree(hidden)\n",
        "    files.remove_tree(hidden)\n",
        (f"{CRASHES}::test_no_state_after_a_power_cut_breaks_a_promise[three_saves_with_retention]",),
    ),
    Mutation(
        "SHA-256 not compared", "io/directory.py",
        "    if sha256 != entry.sha256:\n", "    if False:\n",
        ("tests/faults/test_damage.py::test_damages_are_noticed",),
    ),
    Mutation(
        "the manifest's own digest not compared", "io/manifest.py",
        '    if _with_digest({**document, "digest": ""}) != data:\n', "    if False:\n",
        ("tests/io/test_directory.py::test_every_flipped_bit_of_a_manifest_is_damage",),
    ),
    Mutation(
        "links followed", "io/directory.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK",
        ("tests/faults/test_hostile_files.py",),
    ),
    Mutation(
        "the lock not taken", "checkpoints/lock.py",
        "            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            pass\n",
        ("tests/checkpoints/test_lock.py",),
    ),
    Mutation(
        "the folder not locked", "checkpoints/lock.py",
        "            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            pass\n",
        ("tests/checkpoints/test_lock.py",),
    ),
    Mutation(
        "the lock file opened through links", "io/files.py",
        "os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW", "os.O_RDWR | os.O_CREAT | os.O_CLOEXEC",
        ("tests/checkpoints/test_lock.py",),
    ),
    Mutation(
        "a failed flush swallowed", "io/files.py",
        "            write(descriptor, piece)\n        flush(descriptor)\n",
        "            write(descriptor, piece)\n        try:\n            flush(descriptor)\n"
        "        except OSError:\n            pass\n",
        ("tests/io/test_directory.py", "tests/checkpoints/test_store.py"),
    ),
    Mutation(
        "a failed flush tried again", "io/files.py",
        "            write(descriptor, piece)\n        flush(descriptor)\n",
        "            write(descriptor, piece)\n        try:\n            flush(descriptor)\n"
        "        except OSError:\n            flush(descriptor)\n",
        ("tests/io/test_directory.py",),
    ),
    Mutation(
        "the last whole one may go", "checkpoints/retention.py",
        "    return {*last, *best} or set(whole[-1:])\n", "    return {*last, *best}\n",
        ("tests/checkpoints/test_retention.py", "tests/checkpoints/test_store.py"),
    ),
    Mutation(
        "NaN may be best", "checkpoints/retention.py",
        "item.value is not None and math.isfinite(item.value)", "item.value is not None",
        ("tests/checkpoints/test_retention.py",),
    ),
    Mutation(
        "pins not honored", "checkpoints/retention.py",
        "item.step not in kept | set(pinned)", "item.step not in kept",
        ("tests/checkpoints/test_retention.py", "tests/checkpoints/test_remote.py"),
    ),
    Mutation(
        "an upload does not pin", "checkpoints/remote/uploads.py",
        "        with store.pinned(checkpoint.step) as is_there:\n",
        "        for is_there in (True,):\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "kept ones not read before others go", "checkpoints/store.py",
        "and not kept & self._known_whole and not self._prove_whole(max(kept)):", "and False:",
        ("tests/checkpoints/test_store.py",),
    ),
    Mutation(
        "all damaged is a fresh start", "checkpoints/store.py",
        "        raise messages.all_damaged(self.folder, damages)\n", "        return None\n",
        ("tests/checkpoints/test_store.py",),
    ),
    Mutation(
        "another run's checkpoints taken for ours", "checkpoints/store.py",
        "        if info.run_id != self.run_id:\n", "        if False:\n", ("tests/checkpoints/test_store.py",),
    ),
    Mutation(
        "lines beyond the checkpoint left in the log", "checkpoints/resume.py",
        'is_beyond = event is not None and isinstance(step := event.get("step"), int) and step > after_step\n',
        "is_beyond = False\n",
        ("tests/checkpoints/test_resume.py",),
    ),
    Mutation(
        "unknown differences only warn", "checkpoints/resume.py",
        '            verdict = "allowed" if key in allowed else "refuse"\n', '            verdict = "allowed"\n',
        ("tests/checkpoints/test_resume.py",),
    ),
    Mutation(
        "manifest uploaded before the payload", "checkpoints/remote/copies.py",
        "        for source in payload:\n",
        "        self._try(lambda: self.storage.put([(key, path / MANIFEST_NAME)]))\n        for source in payload:\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "old manifest left while the payload changes", "checkpoints/remote/copies.py",
        "            self._try(lambda: self.storage.delete([key]))\n", "            pass\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "remote removal takes the payload first", "checkpoints/remote/copies.py",
        "key=lambda key: (key != first, key)", "key=lambda key: (key == first, key)",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "a foreign run's copies overwritten", "checkpoints/remote/copies.py",
        "            if copy.manifest and copy.manifest.info.run_id != run_id:\n", "            if False:\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "a permanent refusal tried again", "checkpoints/remote/retry.py",
        "            return status in _TRANSIENT_STATUS or 500 <= status < 600\n", "            return True\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "no limit of attempts", "checkpoints/remote/retry.py",
        "            if number >= policy.num_attempts or not is_transient(error):\n",
        "            if number >= 50 or not is_transient(error):\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "downloads not verified", "checkpoints/remote/copies.py",
        "            if len(data) == entry.size and hashlib.sha256(data).hexdigest() == entry.sha256:\n",
        "            if True:\n",
        ("tests/checkpoints/test_remote.py",),
    ),
    Mutation(
        "optimizer not restored", "run/saving.py",
        "            restore_optimizer(optimizer, bytes_to_tensors(resumed.take(OPTIMIZER_FILE)))\n",
        "            pass\n",
        (BIT_EQUAL,),
    ),
    Mutation(
        "a damaged optimizer left out without being asked", "run/resuming.py",
        "{OPTIMIZER_FILE} if OPTIMIZER_STATE in allowed_changes else set()", "{OPTIMIZER_FILE}",
        (f"{TRAINER}::test_a_damaged_optimizer_is_done_without_only_when_allowed",),
    ),
    Mutation(
        "another optimizer's state restored", "run/resuming.py",
        "kinds <= SAME_STATE else", "True else",
        (f"{TRAINER}::test_another_optimizer_that_was_allowed_begins_with_its_own_state",),
    ),
    Mutation(
        "a base model in a folder not looked into", "run/environment.py",
        "prepared.base.digest or sampled_digest(prepared.base.path)", "prepared.base.digest",
        (f"{TRAINER}::test_a_base_model_changed_in_its_place_is_refused",),
    ),
    Mutation(
        "a large file made in memory at once", "model/adapter/tensors.py",
        "    if num_bytes <= STREAMED_ABOVE_BYTES:\n", "    if True:\n", ("tests/checkpoints/test_memory.py",),
    ),
    Mutation(
        "what a resume has read held on", "checkpoints/store.py",
        "        return self.contents.pop(name)\n", "        return self.contents[name]\n",
        ("tests/checkpoints/test_memory.py",),
    ),
    Mutation(
        "adapter not restored", "run/saving.py",
        "        set_adapter_tensors(peft_model, resumed.take(WEIGHTS_FILE), where=str(resumed.path))\n", "",
        (BIT_EQUAL,),
    ),
    Mutation(
        "randomness of a step not tied to the step", "training/loop.py",
        "        self.device.seed(step_seed(self.seed, layout.number, self.ranks))\n", "", (BIT_EQUAL,),
    ),
    Mutation(
        "schedule begins anew", "training/loop.py",
        "self.step_range.learning_rate(number)", "self.step_range.learning_rate(number - self.step_range.first_step)",
        (BIT_EQUAL,),
    ),
    Mutation(
        "data order begins anew", "training/loop.py",
        "divmod(number, steps_per_epoch)", "divmod(number - step_range.first_step, steps_per_epoch)", (BIT_EQUAL,),
    ),
    Mutation(
        "signals not polled in evaluation", "run/evaluating.py",
        '"check_stop": (lambda: None) if built.is_sharded else self.stop.check,', '"check_stop": lambda: None,',
        (f"{TRAINER}::test_a_signal_in_evaluation_stops_it_and_saves",),
    ),
    Mutation(
        "a run without checkpoints never has finished", "run/resuming.py",
        "    if trained < record.prepared.plan.num_steps and not _was_stopped_early(record, info):\n",
        "    if not record.store.has_traces():\n",
        ("tests/run/test_finished.py",),
    ),
    Mutation(
        "the best weights stay in the model after a stop", "run/best_weights.py",
        "        overwrite_tensors(live, last)\n", "        pass\n", ("tests/run/test_best_weights.py",),
    ),
    Mutation(
        "ranked across other validation data", "checkpoints/retention.py",
        "    chosen = [item for item in ranked if item.measured_on == measured_on]\n", "    chosen = ranked\n",
        ("tests/checkpoints/test_retention.py",),
    ),
    Mutation(
        "a lost .run-id replaced by a new one", "checkpoints/resume.py",
        "        if found := ids_in_manifests(run_directory):\n", "        if found := []:\n",
        ("tests/run/test_lost_folder.py",),
    ),
    Mutation(
        "a longer plan without a checkpoint begins again", "run/resuming.py",
        "    if not record.store.has_traces():\n        _check_no_adapter(record)\n", "",
        ("tests/run/test_finished.py",),
    ),
    Mutation(
        "the last step's weights not copied before the best ones are put in", "run/best_weights.py",
        'tensor.detach().to("cpu", copy=True)', "tensor.detach()", ("tests/run/test_best_weights.py",),
    ),
    Mutation(
        "the best kept of the newest validation data only", "checkpoints/retention.py",
        "for measured_on in {item.measured_on for item in _with_value(checkpoints)}",
        "for measured_on in [item.measured_on for item in _with_value(checkpoints)[-1:]]",
        ("tests/checkpoints/test_retention.py",),
    ),
    Mutation(
        "a live run's folder that went away not missed", "checkpoints/lock.py",
        "        except FileNotFoundError:\n            return False\n",
        "        except FileNotFoundError:\n            return True\n",
        ("tests/run/test_lost_folder.py",),
    ),
    Mutation(
        "gaps between tensors allowed", "io/safetensors.py",
        "    _check_no_gaps(entries, num_data_bytes)\n", "", ("tests/io/test_tensors.py",),
    ),
    Mutation(
        "a key may stand twice", "io/strict_json.py",
        "    if len(result) != len(pairs):\n", "    if False:\n", ("tests/faults/test_hostile_files.py",),
    ),
]  # fmt: skip


def run_tests(source: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether pytest passes on the package in `source`, and the end of what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1) or (done.returncode == 0 and " passed" not in done.stdout):
        raise RuntimeError(f"pytest itself failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-1000:]}")
    return done.returncode == 0, done.stdout


def mutate(mutation: Mutation, source: Path) -> None:
    """Change the copy in `source`. Raises ValueError unless the text stands there exactly once."""
    path = source / "trietune" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"`{mutation.name}`: its text stands {text.count(mutation.old)} times in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new))


def why_skipped(mutation: Mutation) -> str | None:
    """None when this machine can run the mutation's tests."""
    if mutation.needs == "root" and os.geteuid() != 0:
        return "needs root"
    if mutation.needs == "strace" and shutil.which("strace") is None:
        return "needs strace"
    return None


def is_caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether a test fails without the safeguard, and which."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        mutate(mutation, source)
        passed, output = run_tests(source, mutation.tests)
    failed = [line.partition(" - ")[0].removeprefix("FAILED ") for line in output.splitlines() if "FAILED " in line]
    return not passed, failed[0].rpartition("::")[2] if failed else ""


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    width = max(len(mutation.name) for mutation in chosen)
    num_survivors = 0
    for mutation in chosen:
        begun = time.monotonic()
        if reason := why_skipped(mutation):
            verdict, detail = "skipped", reason
        else:
            caught, detail = is_caught(mutation)
            num_survivors += not caught
            verdict = "caught" if caught else "SURVIVED"
        line = f"{mutation.name.ljust(width)}  {verdict:8}  {detail}  ({time.monotonic() - begun:.0f} s)"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} mutations, {num_survivors} survived\n")
    return 1 if num_survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
