"""What a user sees when one process of three is lost, and what is left: a whole checkpoint for any number of them.

TRIETUNE_TABLE=FILE writes what was seen as a table.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks.pool import Pool
from ranks.test_parity import check

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TABLE = os.environ.get("TRIETUNE_TABLE")
COUNT, STEPS, FAULT_STEP, LIMIT_S = 3, 24, 10, 500
# What is said, and within how many seconds; a machine that others use too is slower to start and to end processes.
SENTENCES = {
    "kill": r"rank 1 (of 3 \(process \d+\) was killed by SIGKILL|\(.*\) has (not been heard of|ended))|connection to",
    # It has spoken last up to two seconds before, and steps are short.
    "stop": r"rank 1 \(.*\) has not been heard of for \d+ s; it was (preparing|computing step \d+|waiting for others)",
    "sleep": r"rank 1 \(.*\) has been computing step (9|10) for \d+ s; the others wait for it",
    "raise": r"a bug in one process",
    "fill": r"No space left on device|disk",
}
WITHIN_S = {"kill": 60, "stop": 90, "sleep": 180, "raise": 60, "fill": 60}
# As many processes repeat every bit; others add up in another order, in fp32.
OTHER_NUMBER_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Seen:
    code: int
    text: str
    seconds: float


def given(settings: dict[str, object]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


@pytest.fixture
def settings(overrides: dict[str, object]) -> dict[str, object]:
    return {**overrides, "max_steps": STEPS, "num_epochs": 100, "steps_freq": 4, "save_strategy": "step",
            "save_optim": True, "val_steps_freq": 100_000, "on_save_error": "stop"}  # fmt: skip


def environment(**more: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **{name: str(value) for name, value in more.items()}}


def disturbed(launcher: str, fault: str, settings: dict[str, object], folder: Path) -> Seen:
    """A training of three with one fault, as its user sees it; seconds from the fault to the end of everything."""
    mark = folder / "mark"
    arguments = [str(HERE / "faulty.py"), "train", *given(settings)]
    if launcher == "--nproc":
        launch = (
            "import sys, time; from trietune.ranks.launch import launch; "
            f"sys.exit(launch([sys.executable, *sys.argv[1:]], {COUNT}, say=lambda text: print(text, file=sys.stderr)))"
        )
        command = [sys.executable, "-c", launch, *arguments]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(COUNT), "--standalone",
                   *arguments]  # fmt: skip
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment(
            FAULTY_FAULT=fault, FAULTY_MARK=mark, FAULTY_STEP=FAULT_STEP,
            FAULTY_RANK=0 if fault == "fill" else 1, FAULTY_DISK=settings["project_dir"],
        ),
    )  # fmt: skip
    try:
        text, _ = child.communicate(timeout=LIMIT_S)
        ended = time.time()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert mark.exists(), f"the fault did not happen\n{text}"
    return Seen(child.returncode, text, ended - float(mark.read_text()))


def run(count: int, settings: dict[str, object], *more: str) -> None:
    processes = ["--nproc", str(count)] if count > 1 else []
    ended = subprocess.run(
        [sys.executable, "-m", "trietune", "train", *processes, *given(settings), *more],
        capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def adapter(run_folder: Path) -> np.ndarray:
    tensors = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def differ(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The adapter of a run of three that nothing disturbs, made by the first test."""
    return {}


def reference(undisturbed: dict[str, np.ndarray], settings: dict[str, object], folder: Path) -> np.ndarray:
    if "adapter" not in undisturbed:
        own = {**settings, "project_dir": folder / "undisturbed"}
        run(COUNT, own)
        undisturbed["adapter"] = adapter(folder / "undisturbed" / "run")
    return undisturbed["adapter"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes: a save wants one to spare."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a disk of its own needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
@pytest.mark.parametrize("fault", list(SENTENCES))
def test_a_lost_process_is_named_and_any_number_goes_on(
    fault: str,
    launcher: str,
    settings: dict[str, object],
    undisturbed: dict[str, np.ndarray],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    whole = reference(undisturbed, settings, tmp_path)
    if fault == "fill":
        settings = {**settings, "project_dir": request.getfixturevalue("small_disk") / "runs"}
        Path(str(settings["project_dir"])).mkdir()
    seen = disturbed(launcher, fault, settings, tmp_path)
    folder = Path(str(settings["project_dir"])) / "run"
    saved = sorted(int(path.name.partition("-")[2]) for path in (folder / "checkpoints").glob("step-*"))
    (folder.parent / "filler").unlink(missing_ok=True)
    said = re.search(SENTENCES[fault], seen.text)
    assert said, seen.text
    assert "frame #" not in seen.text, seen.text
    assert seen.seconds < WITHIN_S[fault], seen.text
    assert saved[-1] == 8, seen.text
    assert seen.code != 0
    if launcher == "--nproc":
        assert seen.code == {"raise": 1, "fill": 2}.get(fault, 7), seen.text
    differences = {}
    # The other numbers of processes once: what a checkpoint holds does not depend on how its run ended.
    for count in (1, COUNT, 4) if (fault, launcher) == ("kill", "--nproc") else (COUNT,):
        copy = tmp_path / f"on-{count}"
        shutil.copytree(folder, copy / "run")
        run(count, {**settings, "project_dir": copy}, "--resume")
        differences[count] = differ(adapter(copy / "run"), whole)
    assert differences[COUNT] == 0
    assert max(differences.values()) < OTHER_NUMBER_TOLERANCE
    tell(fault, launcher, seen, saved[-1], differences)


def tell(fault: str, launcher: str, seen: Seen, saved: int, differences: dict[int, float]) -> None:
    if TABLE is None:
        return
    lines = [line.strip() for line in seen.text.splitlines() if re.search(SENTENCES[fault], line)]
    sentence = (lines or [""])[0].replace("|", "/")[:200]
    resumed = "; ".join(f"{count}: {value:.1e}" if value else f"{count}: 0" for count, value in differences.items())
    with Path(TABLE).open("a") as file:
        file.write(f"| {fault} | {launcher} | {sentence} | {seen.seconds:.0f} | {seen.code} | {saved} | {resumed} |\n")


def test_eight_processes_train_what_one_does() -> None:
    pool = Pool(8)
    try:
        check(pool, 8, num_steps=30)
    finally:
        pool.close()
