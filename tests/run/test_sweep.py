"""A grid of trainings: checked first, resumable, a failed trial named while the others go on, and compared."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from trietune.cli.app import main
from trietune.errors import UserError
from trietune.run.sweep import (
    Outcome,
    SweepStopped,
    comparison_table,
    outcome_of,
    plan_sweep,
    run_trials,
    split_values,
    write_comparison,
)


def sets(settings: dict[str, object]) -> list[str]:
    kept = {key: value for key, value in settings.items() if key not in ("learning_rate", "lora_r")}
    return [f"{key}={value}" for key, value in kept.items()]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("don't,do", ["don't", "do"]),
        ("{a: 1, b: 2}", ["{a: 1, b: 2}"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_separate_values_but_within_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_every_combination_is_a_run_of_its_own(overrides: dict[str, object]) -> None:
    sweep = plan_sweep(None, ["learning_rate=1e-3,1e-2", "lora_r=2,4"], sets(overrides))
    assert [trial.name for trial in sweep.trials] == [
        "learning_rate=1e-3,lora_r=2", "learning_rate=1e-3,lora_r=4",
        "learning_rate=1e-2,lora_r=2", "learning_rate=1e-2,lora_r=4",
    ]  # fmt: skip
    assert sweep.directory == Path(str(overrides["project_dir"])) / "run-sweep"
    assert all("--resume" in trial.command for trial in sweep.trials)
    assert not sweep.directory.exists()


def test_a_value_that_is_no_folders_name_gets_a_digest_that_stays(overrides: dict[str, object]) -> None:
    first, second = (
        plan_sweep(None, ["lora_target_modules=[q_proj, v_proj],all-linear"], sets(overrides)) for _ in range(2)
    )
    assert first.trials[0].name.startswith("trial-")
    assert first.trials[0].name == second.trials[0].name
    assert first.trials[1].name == "lora_target_modules=all-linear"


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ([], "needs values"),
        (["learning_rate"], "has no `=`"),
        (["learning_rate=1,1"], "a value twice"),
        (["learning_rate=1,"], "an empty value"),
        (["lora_r=2", "lora_r=4"], "given twice"),
        (["batch_size=2,4"], "both set for all trials"),
        (["project_dir=a,b"], "where a run lies"),
        (["wandb_run_name=a,b"], "where a run lies"),
        (["lora_r=2,minus"], "trial `lora_r=minus`"),
        (["learning_rate=1e-3,2e-3,0.001"], "trials `learning_rate=1e-3` and `learning_rate=0.001` have the same"),
        (["=1,2"], "has no key"),
        (["lora_rr=2,4"], "lora_rr"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_starts(
    over: list[str], text: str, overrides: dict[str, object]
) -> None:
    with pytest.raises(UserError, match=text):
        plan_sweep(None, over, sets(overrides))
    assert not Path(str(overrides["project_dir"])).exists()


def test_what_an_exit_code_says_of_a_trial(overrides: dict[str, object]) -> None:
    trial = plan_sweep(None, ["lora_r=2,4"], sets(overrides)).trials[0]
    assert outcome_of(trial, 0) == Outcome(trial, 0)
    assert outcome_of(trial, 3).is_trained
    killed = outcome_of(trial, -9)
    assert (killed.exit_code, killed.is_trained) == (137, False)
    assert "SIGKILL" in str(killed.sentence)
    assert "exit code 5" in str(outcome_of(trial, 5).sentence)


@pytest.mark.slow
def test_a_failed_trial_is_named_and_the_others_are_compared(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    grid = ["sweep", "--over", "lora_target_modules=[q_proj],[no_such_layer],[v_proj]"]
    command = [*grid, *(f"--set={one}" for one in sets({**overrides, "max_steps": 3, "save_strategy": "no"}))]
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert "trial `lora_target_modules=[no_such_layer]` ended with exit code 2" in err
    rows = [line.split() for line in out.splitlines() if line.startswith("[")]
    assert [row[0] for row in rows] == ["[q_proj]", "[no_such_layer]", "[v_proj]"]
    assert rows[1][1] == "-"
    assert sum("best loss" in line for line in out.splitlines()) == 1
    page = Path(str(overrides["project_dir"])) / "run-sweep" / "comparison.html"
    assert page.read_text().count("trial-") > 2
    # Again: what has finished is not trained twice, what failed is tried again.
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert err.count("nothing was changed") == 2


def fake_run(directory: Path, loss: float) -> None:
    """What a finished run leaves for a report."""
    directory.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"event": "start", "name": directory.name, "num_steps": 2, "first_step": 0, "time": 0.0},
        {"event": "evaluation", "when": "after", "step": 2, "epoch": 1.0, "num_examples": 8, "eval/loss": loss,
         "intervals": {}, "time": 1.0},
        {"event": "end", "status": "finished", "step": 2, "seconds": 61.0, "time": 2.0},
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_best_trial_is_marked_by_the_metric_that_ranks_checkpoints(overrides: dict[str, object]) -> None:
    settings = {**overrides, "checkpoint_metric": "eval/loss"}
    sweep = plan_sweep(None, ["lora_r=2,4,8"], sets(settings))
    for trial, loss in zip(sweep.trials, (0.5, 0.25, 0.75), strict=True):
        fake_run(trial.directory, loss)
    outcomes = [Outcome(sweep.trials[0], 0), Outcome(sweep.trials[1], 3), Outcome(sweep.trials[2], 2, "wrong")]
    table = comparison_table(sweep, outcomes)
    assert table[0] == ("lora_r", "loss", "time", "")
    assert table[1] == ("2", "0.5000", "1:01", "")
    assert table[2] == ("4", "0.2500", "1:01", "best loss, exit code 3")
    assert table[3] == ("8", "-", "-", "exit code 2")
    assert write_comparison(sweep, outcomes[2:]) is None
    assert write_comparison(sweep, outcomes) == sweep.directory / "comparison.html"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_trial_of_a_cluster_ends_with_the_worker_that_trains_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    trial = (sys.executable, "-c", f"import os, pathlib, time; pathlib.Path({str(mark)!r}).mkdir(); time.sleep(600)")
    worker = f"from trietune.run.sweep_on_ray import train_trial; train_trial({trial!r}, {str(tmp_path)!r})"
    started = subprocess.Popen([sys.executable, "-c", worker])
    while not mark.exists():
        assert started.poll() is None
        time.sleep(0.05)
    (training,) = psutil.Process(started.pid).children()
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs([training], timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_sweep_that_a_signal_ends_after_a_trial_has_the_code_of_the_signal(overrides: dict[str, object]) -> None:
    sweep = plan_sweep(None, ["lora_r=2,4"], sets(overrides))
    # The command's process is asked to stop while the trial is on its way out.
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(1)"
    )
    trials = tuple(dataclasses.replace(trial, command=(sys.executable, "-c", code)) for trial in sweep.trials)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # in case it comes too soon: not the end of all tests
    try:
        with pytest.raises(SweepStopped) as stopped:
            run_trials(dataclasses.replace(sweep, trials=trials), print)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stopped.value.exit_code, stopped.value.num_done) == (143, 1)


@pytest.mark.slow
def test_a_trial_that_is_killed_is_no_end_of_the_sweep(overrides: dict[str, object]) -> None:
    sweep = plan_sweep(None, ["lora_r=2,4"], sets(overrides))
    kill = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    fine = (sys.executable, "-c", "pass")
    trials = tuple(dataclasses.replace(t, command=c) for t, c in zip(sweep.trials, (kill, fine), strict=True))
    said: list[str] = []
    outcomes = run_trials(dataclasses.replace(sweep, trials=trials), said.append)
    assert [outcome.exit_code for outcome in outcomes] == [137, 0]
    assert any("was killed by SIGKILL" in text for text in said)
