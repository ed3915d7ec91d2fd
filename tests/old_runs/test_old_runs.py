"""Runs that earlier versions wrote are opened, measured, asked, exported, checked, drawn and resumed by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from old_runs.write import ANSWER, HERE, PROMPT, copy_inputs, data_of, weights_of
from trietune.cli import main

# Losses are sums in fp32, and another processor or number of threads adds in another order.
TOLERANCE = 1e-5
VERSIONS = sorted(path.parent.name for path in HERE.glob("*/recorded.json"))
RECORDED = {version: json.loads((HERE / version / "recorded.json").read_text()) for version in VERSIONS}
RUNS = [(version, run) for version in VERSIONS for run in RECORDED[version]]
STOPPED = [(version, run) for version, run in RUNS if run.endswith("-stopped")]
FINISHED = [(version, run) for version, run in RUNS if not run.endswith("-stopped")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: base models and data, where the runs expect them."""
    copy_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def bring(world: Path, version: str, run: str) -> Path:
    """A copy of that run, as its configuration names it, relative to the current folder."""
    shutil.copytree(HERE / version / run, world / "runs" / run)
    return Path("runs") / run


def printed(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command says with `--json`."""
    capfd.readouterr()
    assert main([*arguments, "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


def close(value: Any) -> Any:
    """`value` with its numbers up to `TOLERANCE`."""
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    if isinstance(value, list):
        return [close(item) for item in value]
    return pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value


def lines_of(run: Path, event: str) -> dict[int, dict[str, Any]]:
    """The last line of each step in a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == event}


def test_there_are_runs_of_earlier_versions_finished_and_stopped() -> None:
    assert {"first", "before_house"} <= set(VERSIONS)
    for version in VERSIONS:
        assert {"reviews", "reviews-stopped"} <= RECORDED[version].keys()
    assert {"preferences", "preferences-stopped"} <= RECORDED["before_house"].keys()
    for version, run in STOPPED:
        assert not (HERE / version / run / "adapter").exists()
        assert (weights_of(HERE / version / run) / "optimizer.safetensors").is_file()


@pytest.mark.parametrize(("version", "run"), RUNS)
def test_an_old_run_measures_and_answers_as_when_it_was_written(
    version: str, run: str, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = str(weights_of(bring(world, version, run)))
    data = data_of(run) if run.endswith("-stopped") else ()
    recorded = RECORDED[version][run]
    assert printed(capfd, "evaluate", target, *data)["metrics"] == close(recorded["metrics"])
    said = printed(capfd, "predict", target, "--text", PROMPT, *ANSWER)["predictions"]
    assert said == close(recorded["predictions"])


@pytest.mark.parametrize(("version", "run"), STOPPED)
def test_an_old_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    version: str, run: str, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bring(world, version, run)
    assert lines_of(folder, "end")[5]["status"] == "stopped"
    for name in ("metrics.jsonl", "batches.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"step": 6, "lo')  # as a power cut leaves it
    assert main(["train", f"{folder}/config.yaml", "--resume"]) == 0, capfd.readouterr().err
    assert main(["verify", str(folder)]) == 0
    # The twin that was never stopped is of that version; what it did after step 5 is what this one has done now.
    twin = HERE / version / run.removesuffix("-stopped")
    for event, key in (("step", "train/loss"), ("step", "grad_norm"), ("evaluation", "eval/loss")):
        expected = {step: line[key] for step, line in lines_of(twin, event).items() if step > 5}
        taken = {step: line[key] for step, line in lines_of(folder, event).items() if step > 5}
        assert expected, event
        assert taken == close(expected)
    weights, expected_weights = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, twin))
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert (weights[name] - tensor).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), name


@pytest.mark.parametrize(("version", "run"), FINISHED)
def test_an_old_finished_run_has_nothing_left_to_do_and_loses_nothing(
    version: str, run: str, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bring(world, version, run)
    before = {path: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}
    assert main(["train", f"{folder}/config.yaml", "--resume"]) == 0
    assert {path: path.read_bytes() for path in sorted((folder / "adapter").iterdir())} == before


@pytest.mark.parametrize(("version", "run"), FINISHED)
def test_an_old_adapter_is_exported(version: str, run: str, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = bring(world, version, run)
    for form, name in (((), "copy"), (("--plain",), "plain"), (("--merge",), "merged")):
        assert main(["export", str(folder), name, *form]) == 0, capfd.readouterr().err
    tensors = load_file(world / "copy" / "adapter_model.safetensors")
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == kept.keys()
    assert all(tensors[name].equal(kept[name]) for name in kept)
    expected = close(RECORDED[version][run]["metrics"])
    if run == "reviews":
        assert printed(capfd, "evaluate", "merged", *data_of(run))["metrics"] == expected


@pytest.mark.parametrize(("version", "run"), RUNS)
def test_an_old_run_is_whole_and_is_drawn(
    version: str, run: str, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bring(world, version, run)
    proofs = printed(capfd, "verify", str(folder))["proofs"]
    assert proofs
    assert all(proof["damage"] is None for proof in proofs)
    rows = printed(capfd, "checkpoints", str(folder))["checkpoints"]
    assert [row["step"] for row in rows] == sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")
    )
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "eval/loss" in page
    assert run in page
