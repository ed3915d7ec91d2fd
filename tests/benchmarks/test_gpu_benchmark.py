"""The benchmark of a card, in small on the CPU: its ways that run there, correct next to the formula, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    folder = write_tiny_model(
        tmp_path / "tiny", ("Review: ", "\nOutput:", '{"label": "positive"}', '{"label": "negative"}')
    )
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    (data / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"w{i}\t{i % 2}\n" for i in range(300)))
    return [
        *("--device", "cpu", "--dtype", "float32", "--rounds", "1", "--model-folder", str(folder)),
        *("--data", str(data.parent), "--workloads", "sst2-grouped-4", "--out", str(tmp_path)),
    ]


def test_ways_are_timed_and_compared_with_the_formula(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    [result] = gpu.measure_kernels(gpu.parse([*arguments, "--heads", "64"]))
    assert result["heads"] == (9, 3, 64)
    assert "CPU" in result["ways"]["varlen"]["refused"]
    assert "refused" in result["ways"]["flex"]
    for way in ("rows", "mask"):
        found = result["ways"][way]
        assert len(found["milliseconds"]) == 1
        assert found["largest_error"] < 1e-5
    assert capsys.readouterr().out.startswith("sst2-grouped-4, ")


@pytest.mark.slow
def test_steps_are_timed_after_a_warm_up(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*arguments, "--models", "smollm2", "--step-workloads", "sst2-grouped-4"]
    [result] = gpu.measure_steps("smollm2", gpu.parse(asked))
    assert len(result["milliseconds"]) == 1
    assert result["examples_per_second"] == pytest.approx(4000 / result["milliseconds"][0])
    # Eight tokens at most in each of four rows, some of them shared.
    assert 4 < result["nodes"] <= 4 * 8
    assert capsys.readouterr().out.startswith("sst2-grouped-4: ")


def test_trietune_takes_turns_with_every_group() -> None:
    assert gpu.groups_of(["trietune", "a", "b", "c"], 3) == [["trietune", "a", "b"], ["trietune", "c"]]
    assert gpu.groups_of(["trietune"], 3) == [["trietune"]]


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_file(arguments: list[str], tmp_path: Path) -> None:
    command = [
        *arguments,
        "--heads",
        "64",
        "--models",
        "smollm2",
        "--step-workloads",
        "sst2-grouped-4",
        "--engines",
        "trietune",
        "trietune-mask",
        "strongest",
    ]
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "steps", "engine", "engine", "engine", "kernels"]
    losses = [line["first_loss"] for line in lines if line["kind"] == "engine"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
