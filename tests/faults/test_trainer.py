"""The real trainer, killed and signalled in mid-epoch: it goes on, and what it ends with is the same to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer import (
    Forge,
    Life,
    assert_equal_runs,
    kill,
    log_of,
    open_forge,
    steps_on_disk,
    wait_for,
    write_config,
    write_inputs,
    write_wide_model,
)

from fault_table import Tally
from trietune.io import safetensors as tensors
from trietune.io.directory import read_directory, verify_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONG = {"num_epochs": 30}
NUM_LONG_STEPS = 360
WEIGHTS = "adapter_model.safetensors"
# Other thread counts and other cuts into micro-batches add the same numbers in another order, in float32.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def forge(place: Path) -> Iterator[Forge]:
    with open_forge(place) as forge:
        yield forge


@pytest.fixture(scope="module")
def reference(forge: Forge, place: Path) -> Path:
    """A run that nothing interrupted."""
    life = forge.run("train", write_config(place, place / "reference"))
    assert life.exit_code == 0, life.text
    return place / "reference" / "run"


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_and_reach(forge: Forge, config: Path, step: int) -> tuple[Life, Path]:
    """A life that has taken `step` steps of a fresh run."""
    run = config.parent / "run"
    life = forge.start("train", config)
    wait_for(lambda: num_lines(run / "batches.jsonl") >= step)
    return life, run


def finish(forge: Forge, config: Path, *more: object) -> Life:
    life = forge.run("train", config, "--resume", *more)
    assert life.exit_code == 0, life.text
    return life


def test_thirty_kills_in_mid_epoch_and_the_end_is_bit_equal(forge: Forge, place: Path, tally: Tally) -> None:
    whole = forge.run("train", write_config(place, place / "long", **LONG))
    assert whole.exit_code == 0, whole.text
    config = write_config(place, place / "killed", **LONG)
    run = config.parent / "run"
    randomness = random.Random(9)
    num_kills, steps = 0, []
    while num_kills < 30:
        life = forge.start("train", config, "--set", "resume_from_checkpoint=auto")
        before = num_lines(run / "batches.jsonl")
        if num_kills == 0:
            wait_for(lambda: steps_on_disk(run))
        elif num_kills % 6:
            wait_for(lambda before=before: num_lines(run / "batches.jsonl") not in (0, before))
            time.sleep(randomness.uniform(0, 0.12))
        else:
            time.sleep(randomness.uniform(0, 1.0))
        kill(life, signal.SIGKILL)
        assert os.WTERMSIG(forge.wait(life).status or 0) == signal.SIGKILL, f"it had ended: {life.text}"
        num_kills += 1
        assert steps_on_disk(run) or not steps, "a checkpoint was lost"
        steps += steps_on_disk(run)[-1:]
        assert steps == sorted(steps), "the newest checkpoint is older than it was"
    assert not (run / "adapter").exists(), "the kills came after the end"
    finish(forge, config)
    assert_equal_runs(run, place / "long" / "run", NUM_LONG_STEPS)
    tally("SIGKILL of the real trainer, dropout and warm-up on", num_kills, num_kills)


def test_a_kill_before_the_first_checkpoint_leaves_no_lines_to_the_next_start(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path, steps_freq=2)
    run = tmp_path / "run"
    life = forge.start("train", config)
    wait_for(lambda: num_lines(run / "batches.jsonl") >= 1)
    kill(life, signal.SIGKILL)
    forge.wait(life)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    life = forge.run("train", config, "--set", "resume_from_checkpoint=auto")
    assert life.exit_code == 0, life.text
    assert_equal_runs(run, reference)
    assert list(run.glob("batches.abandoned-1.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_the_resume_is_bit_equal(
    number: signal.Signals, forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path)
    life, run = start_and_reach(forge, config, 7)
    begun = time.monotonic()
    kill(life, number)
    assert forge.wait(life).exit_code == 128 + number, life.text
    assert time.monotonic() - begun < 5
    assert not (run / "adapter").exists()
    stopped_at = num_lines(run / "batches.jsonl")
    assert steps_on_disk(run)[-1] == stopped_at
    finish(forge, config)
    assert_equal_runs(run, reference, cut_evaluation=stopped_at)


def test_a_signal_while_a_checkpoint_is_written_lets_it_finish(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path)
    run = tmp_path / "run"
    for _ in range(10):
        life = forge.start("train", config)
        wait_for(lambda: is_staging(run), every_s=0.0002)
        kill(life, signal.SIGTERM)
        hit = is_staging(run)
        assert forge.wait(life).exit_code == 143, life.text
        assert steps_on_disk(run)
        assert not list(run.glob("checkpoints/.staging*"))
        if hit:
            break
        shutil.rmtree(run)
    assert hit, "no signal fell into a save"
    stopped_at = num_lines(run / "batches.jsonl")
    finish(forge, config)
    assert_equal_runs(run, reference, cut_evaluation=stopped_at)


def is_staging(run: Path) -> bool:
    try:
        return any(path.name.startswith(".staging-step-") for path in (run / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def test_a_second_signal_leaves_at_once_and_harms_nothing(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path)
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    kill(life, signal.SIGTERM)
    kill(life, signal.SIGINT)
    assert forge.wait(life).exit_code in (130, 143), life.text
    steps_on_disk(run)
    finish(forge, config)
    assert_equal_runs(run, reference)


def test_a_signal_in_evaluation_stops_it_and_saves(forge: Forge, place: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    # All different from the first letter on: equal prefixes would be computed once, and it would end in no time.
    rows = [{"prompt": f"{n * 7919 % 100_003} is: ", "completion": str(n)} for n in range(6000)]
    many.write_text("\n".join(map(json.dumps, rows)))
    changes = {"validation_file": str(many), "eval_max_examples": 6000, "eval_batch_size": 1, "self_check": False}
    config = write_config(place, tmp_path, **changes, val_steps_freq=3, steps_freq=50)
    life, run = start_and_reach(forge, config, 3)
    time.sleep(0.3)
    assert num_lines(run / "batches.jsonl") == 3, "it is not in the evaluation after step 3"
    begun = time.monotonic()
    kill(life, signal.SIGTERM)
    assert forge.wait(life).exit_code == 143, life.text
    assert time.monotonic() - begun < 5
    assert steps_on_disk(run) == [3]
    assert not [event for event in log_of(run) if event.get("event") == "evaluation" and event["step"] == 3]


def test_a_signal_while_tokenizing_stops_it(forge: Forge, place: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    line = (place / "train.jsonl").read_text().splitlines()[0]
    big.write_text("\n".join(json.dumps({**json.loads(line), "n": n}) for n in range(150_000)))
    config = write_config(place, tmp_path, train_file=str(big))
    life = forge.start("train", config)
    time.sleep(1.0)
    begun = time.monotonic()
    kill(life, signal.SIGTERM)
    assert forge.wait(life).exit_code == 143, life.text
    assert time.monotonic() - begun < 10
    assert num_lines(tmp_path / "run" / "batches.jsonl") == 0, "it was past tokenizing"


def test_a_signal_while_the_last_copies_are_sent_leaves_within_seconds(
    forge: Forge, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with silent_store() as url:
        environment = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        changes = {"storage_backend": "s3", "remote_path": "bucket/runs", "sync_to_storage": True, "num_epochs": 1}
        config = write_config(place, tmp_path, **changes)
        life = forge.start("train", config, environment=environment)
        wait_for(lambda: (tmp_path / "run" / "adapter" / "manifest.json").exists(), timeout_s=120)
        time.sleep(1)
        begun = time.monotonic()
        kill(life, signal.SIGTERM)
        forge.wait(life)
        assert time.monotonic() - begun < 10
        assert life.exit_code in (3, 143), life.text
        verify_directory(tmp_path / "run" / "adapter")
        assert steps_on_disk(tmp_path / "run")
        assert "trietune sync" in life.text


class silent_store:  # noqa: N801  (used like a function)
    """A port that takes connections and never answers."""

    def __enter__(self) -> str:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.listener.close()


def weights_of(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = tensors.parse(read_directory(run / "adapter")[1][WEIGHTS])[0]
    return {name: tensor.to_numpy() for name, tensor in found.items()}


def difference(run: Path, reference: Path) -> float:
    """The largest difference between two adapters, as a share of the largest weight."""
    found, expected = weights_of(run), weights_of(reference)
    assert set(found) == set(expected)
    largest = max(float(np.abs(value).max()) for value in expected.values())
    return max(float(np.abs(found[name] - value).max()) for name, value in expected.items()) / largest


def num_micro_batches(run: Path) -> list[int]:
    return [event["num_micro_batches"] for event in log_of(run) if event["event"] == "step"]


def test_other_micro_batches_keep_the_order_and_differ_by_rounding(forge: Forge, place: Path, tmp_path: Path) -> None:
    # Without dropout: which number is dropped is drawn a micro-batch, so another cut is another draw.
    changes = {"batch_size": 8, "lora_dropout": 0.0}
    assert forge.run("train", write_config(place, tmp_path / "whole", **changes)).exit_code == 0
    whole = tmp_path / "whole" / "run"
    config = write_config(place, tmp_path / "cut", **changes)
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    stopped_at = num_lines(run / "batches.jsonl")
    resumed = finish(forge, config, "--set", "max_tokens_per_micro_batch=48")
    assert "max_tokens_per_micro_batch" in resumed.text
    assert "dropout" not in resumed.text
    assert set(num_micro_batches(whole)) == {1}
    assert min(num_micro_batches(run)[stopped_at:]) >= 2, "it was not cut otherwise"
    assert (run / "batches.jsonl").read_text() == (whole / "batches.jsonl").read_text()
    assert difference(run, whole) < ROUNDING


def test_other_micro_batches_with_dropout_are_said_to_be_another_draw(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    run = copy_of_half_a_run(forge, place, tmp_path)
    resumed = finish(forge, write_config(place, tmp_path), "--set", "max_tokens_per_micro_batch=48")
    assert "dropout draws different masks" in resumed.text
    assert (run / "batches.jsonl").read_text() == (reference / "batches.jsonl").read_text()


def test_another_thread_count_warns_and_differs_by_rounding(forge: Forge, place: Path, tmp_path: Path) -> None:
    wide = {"model_name": str(write_wide_model(tmp_path / "wide")), "batch_size": 16}
    assert forge.run("train", write_config(place, tmp_path / "whole", **wide)).exit_code == 0
    config = write_config(place, tmp_path / "halves", **wide)
    life, run = start_and_reach(forge, config, 4)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    resumed = forge.wait(forge.start("train", config, "--resume", num_threads=2))
    assert resumed.exit_code == 0, resumed.text
    assert re.search(r"num_threads +1 +2 +the same numbers up to rounding", resumed.text), resumed.text
    whole = tmp_path / "whole" / "run"
    assert (run / "batches.jsonl").read_text() == (whole / "batches.jsonl").read_text()
    assert difference(run, whole) < ROUNDING


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"learning_rate": 0.02}, "learning_rate"),
    "batch size": ({"batch_size": 8}, "batch_size"),
    "rank": ({"lora_r": 8}, "lora_r"),
    "seed": ({"seed": 12}, "seed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_training_is_refused_and_named(
    name: str, forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    changes, key = CHANGES[name]
    run = copy_of_half_a_run(forge, place, tmp_path)
    before = snapshot(run)
    config = write_config(place, tmp_path, **changes)
    life = forge.run("train", config, "--resume")
    assert life.exit_code == 6, life.text
    assert key in life.text
    assert f"--allow-change {key}" in life.text
    assert "Traceback" not in life.text
    assert snapshot(run) == before, "something was changed"


def copy_of_half_a_run(forge: Forge, place: Path, folder: Path) -> Path:
    """A run that was stopped half-way; made once, then copied."""
    half = place / "half"
    if not (half / "run").exists():
        life, _ = start_and_reach(forge, write_config(place, half), 7)
        kill(life, signal.SIGTERM)
        forge.wait(life)
    shutil.copytree(half / "run", folder / "run")
    return folder / "run"


def snapshot(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }  # fmt: skip


def test_changed_data_and_another_base_model_are_refused(forge: Forge, place: Path, tmp_path: Path) -> None:
    copy_of_half_a_run(forge, place, tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text((place / "train.jsonl").read_text().replace("the 1", "the one"))
    life = forge.run("train", write_config(place, tmp_path, train_file=str(other)), "--resume")
    assert life.exit_code == 6, life.text
    original = (place / "train.jsonl").read_text()
    try:
        (place / "train.jsonl").write_text(original.replace("the 1", "the one"))
        life = forge.run("train", write_config(place, tmp_path), "--resume")
        assert life.exit_code == 6, f"the same file with other lines: {life.text}"
    finally:
        (place / "train.jsonl").write_text(original)
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    life = forge.run("train", write_config(place, tmp_path, model_name=str(tmp_path / "tiny")), "--resume")
    assert life.exit_code == 6, life.text


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_base_model_changed_in_its_place_is_refused(file: str, forge: Forge, place: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "tiny", model)
    config = write_config(place, tmp_path, model_name=str(model))
    life, run = start_and_reach(forge, config, 3)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    before = snapshot(run)
    if file == "config.json":
        values = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    else:
        data = bytearray((model / file).read_bytes())
        data[-4096:] = bytes(4096)
        (model / file).write_bytes(data)
    life = forge.run("train", config, "--resume")
    assert life.exit_code == 6, life.text
    assert "--allow-change base_digest" in life.text
    assert snapshot(run) == before


def test_a_changed_tokenizer_is_refused_by_name_and_accepted_by_name(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "tiny", model)
    config = write_config(place, tmp_path, model_name=str(model))
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    stopped_at = num_lines(run / "batches.jsonl")
    before = snapshot(run)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["{"], vocabulary["}"] = vocabulary["}"], vocabulary["{"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = forge.run("train", config, "--resume")
    assert refused.exit_code == 6, refused.text
    assert re.search(r"^ +tokenizer +[0-9a-f.]+ +[0-9a-f.]+ +training differs from here on", refused.text, re.MULTILINE)
    allowed = re.findall(r"--allow-change \w+", refused.text)
    assert allowed == ["--allow-change data_fingerprint", "--allow-change tokenizer"]
    assert snapshot(run) == before, "something was changed"
    half_allowed = forge.run("train", config, "--resume", "--allow-change", "tokenizer")
    assert half_allowed.exit_code == 6, half_allowed.text
    finish(forge, config, *" ".join(allowed).split())
    # No example has a brace, so every id is what it was.
    assert_equal_runs(run, reference, cut_evaluation=stopped_at)


def test_resume_of_a_finished_run_says_so_and_touches_nothing(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    life = forge.run("train", write_config(place, tmp_path), "--resume")
    assert life.exit_code == 0, life.text
    assert "has already finished" in life.text
    assert snapshot(tmp_path / "run") == before


def test_a_finished_run_whose_last_step_was_no_checkpoint_is_finished_too(
    forge: Forge, place: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path, steps_freq=10, val_steps_freq=10, num_epochs=1)
    assert forge.run("train", config).exit_code == 0
    before = snapshot(tmp_path / "run")
    life = forge.run("train", config, "--resume")
    assert life.exit_code == 0, life.text
    assert snapshot(tmp_path / "run") == before, life.text


def test_without_the_optimizer_the_resume_says_what_restarts(forge: Forge, place: Path, tmp_path: Path) -> None:
    config = write_config(place, tmp_path, save_optim=False)
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    assert not list(run.glob("checkpoints/*/optimizer.safetensors"))
    resumed = finish(forge, config)
    assert "moments start from zero" in resumed.text


def test_a_damaged_optimizer_is_done_without_only_when_allowed(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    run = copy_of_half_a_run(forge, place, tmp_path)
    *older, newest = sorted((run / "checkpoints").glob("step-*"))
    for path in older:
        shutil.rmtree(path)
    os.truncate(newest / "optimizer.safetensors", 100)
    before = snapshot(run)
    config = write_config(place, tmp_path)
    refused = forge.run("train", config, "--resume")
    assert refused.exit_code == 6, refused.text
    assert "--allow-change optimizer_state" in refused.text
    assert snapshot(run) == before, "something was changed"
    resumed = finish(forge, config, "--allow-change", "optimizer_state")
    assert "the optimizer's moments start from zero (their file is damaged)" in resumed.text
    assert (run / "batches.jsonl").read_text() == (reference / "batches.jsonl").read_text()
    assert difference(run, reference) > 0


def test_another_optimizer_that_was_allowed_begins_with_its_own_state(
    forge: Forge, place: Path, tmp_path: Path
) -> None:
    copy_of_half_a_run(forge, place, tmp_path)
    config = write_config(place, tmp_path, optim="adagrad")
    resumed = finish(forge, config, "--allow-change", "optim")
    assert "the optimizer's moments start from zero (another `optim` keeps others)" in resumed.text
    shutil.rmtree(tmp_path / "run")
    copy_of_half_a_run(forge, place, tmp_path)
    resumed = finish(forge, write_config(place, tmp_path, optim="adamw_torch"), "--allow-change", "optim")
    assert "with the optimizer's state, as if it had never stopped" in resumed.text


def test_a_damaged_newest_falls_back_is_said_and_the_end_is_bit_equal(
    forge: Forge, place: Path, reference: Path, tmp_path: Path
) -> None:
    run = copy_of_half_a_run(forge, place, tmp_path)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    os.truncate(newest / WEIGHTS, 100)
    life = finish(forge, write_config(place, tmp_path))
    assert f"{newest.name} is not whole" in life.text
    assert_equal_runs(run, reference)


def test_all_damaged_refuses_and_first_starts_are_fresh(forge: Forge, place: Path, tmp_path: Path) -> None:
    run = copy_of_half_a_run(forge, place, tmp_path)
    for path in (run / "checkpoints").glob("step-*"):
        os.truncate(path / "manifest.json", 10)
    before = snapshot(run)
    for choice in ("auto", True):
        life = forge.run("train", write_config(place, tmp_path, resume_from_checkpoint=choice))
        assert life.exit_code == 6, life.text
        assert "is whole" in life.text
        assert snapshot(run) == before
    fresh = write_config(place, tmp_path / "fresh", resume_from_checkpoint="auto", num_epochs=1)
    life = forge.run("train", fresh)
    assert life.exit_code == 0, life.text


def test_a_read_only_run_directory_is_named(forge: Forge, place: Path, tmp_path: Path) -> None:
    run = copy_of_half_a_run(forge, place, tmp_path)
    if subprocess.run(["mount", "--bind", str(run), str(run)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
        life = forge.run("train", write_config(place, tmp_path), "--resume")
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert life.exit_code == 2, life.text
    assert f"checkpoints cannot be kept in {run}: Read-only file system" in life.text
    assert "Traceback" not in life.text


def test_odd_paths_are_paths(forge: Forge, place: Path, reference: Path, tmp_path: Path) -> None:
    real = tmp_path / "ein Ordner, ÄÖ 目录"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    config = write_config(place, link)
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    forge.wait(life)
    stopped_at = num_lines(run / "batches.jsonl")
    finish(forge, config)
    assert_equal_runs(real / "run", reference, cut_evaluation=stopped_at)


def test_two_runs_in_one_directory_the_second_is_told_who_the_first_is(
    forge: Forge, place: Path, tmp_path: Path
) -> None:
    config = write_config(place, tmp_path, **LONG)
    life, run = start_and_reach(forge, config, 3)
    second = forge.run("train", config, "--set", "resume_from_checkpoint=auto")
    assert second.exit_code == 2, second.text
    assert f"process {life.pid}" in second.text
    kill(life, signal.SIGKILL)
    forge.wait(life)
    steps_on_disk(run)


def test_a_clock_that_goes_back_changes_nothing(forge: Forge, place: Path, reference: Path, tmp_path: Path) -> None:
    config = write_config(place, tmp_path)
    life = forge.start("train", config, clock="back")
    wait_for(lambda: num_lines(tmp_path / "run" / "batches.jsonl") >= 9)
    kill(life, signal.SIGKILL)
    forge.wait(life)
    times = [json.loads(line)["time"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert times != sorted(times), "the clock did not go back"
    life = forge.wait(forge.start("train", config, "--resume", clock="back"))
    assert life.exit_code == 0, life.text
    assert_equal_runs(tmp_path / "run", reference)


def test_a_full_disk_is_said_and_training_goes_on(forge: Forge, place: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        life = forge.run("train", write_config(place, disk, num_epochs=1, keep_last_n=50))
        assert "was not saved: No space left on device" in life.text, life.text
        assert "a bug" not in life.text
        assert life.exit_code in (0, 2), life.text
        assert steps_on_disk(disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_time_runs_out_in_time_to_save(forge: Forge, place: Path, tmp_path: Path) -> None:
    config = write_config(place, tmp_path, **LONG, max_time=10)
    begun = time.monotonic()
    life = forge.run("train", config)
    assert time.monotonic() - begun < 15
    assert life.exit_code == 0, life.text
    run = tmp_path / "run"
    assert steps_on_disk(run)[-1] == num_lines(run / "batches.jsonl") < NUM_LONG_STEPS
    assert not (run / "adapter").exists()


def test_a_mirror_folder_serves_an_empty_machine(forge: Forge, place: Path, reference: Path, tmp_path: Path) -> None:
    storage = {
        "storage_backend": "local", "remote_path": str(tmp_path / "mirror"), "sync_to_storage": True,
        "load_from_storage": True,
    }  # fmt: skip
    config = write_config(place, tmp_path / "first", **storage)
    life, run = start_and_reach(forge, config, 7)
    kill(life, signal.SIGTERM)
    assert forge.wait(life).exit_code == 143, life.text
    shutil.rmtree(run)
    second = write_config(place, tmp_path / "second", **storage)
    life = finish(forge, second)
    assert "was copied from" in life.text
    found = read_directory(tmp_path / "second" / "run" / "adapter")[1][WEIGHTS]
    assert found == read_directory(reference / "adapter")[1][WEIGHTS]
    verify_directory(tmp_path / "mirror" / "run" / "adapter")
