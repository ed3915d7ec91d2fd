"""What a person types: commands, exit codes, streams; the original experiment's command; what loads torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trietune.cli.app import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "blacksmith/experiments/torch/gemma11/test_gemma11_finetuning.py"


def as_set(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def finished(overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run that `trietune train` has just finished."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(overrides))
    assert main(["train", str(config)]) == 0
    capfd.readouterr()
    return Path(str(overrides["project_dir"])) / "run"


def test_train_prints_the_result_on_stdout_and_the_rest_on_stderr(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**overrides, "print_examples": True}))
    assert main(["train", str(config)]) == 0
    out, err = capfd.readouterr()
    for part in ("before", "after", "accuracy", "adapter", "what the model says now", "trietune predict"):
        assert part in out
    for part in ("self-check", "step 1/6", "label tokens"):
        assert part in err
    assert "\r" not in err


def test_dry_run_prints_the_plan_and_writes_no_run(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(overrides))
    assert main(["train", str(config), "--dry-run"]) == 0
    out, _ = capfd.readouterr()
    assert "6 steps of 8 examples (0.75 epochs)" in out
    assert re.search(r"memory +\d+(\.\d)? kB for model and optimizer", out)
    assert "sharing" in out
    assert not Path(str(overrides["project_dir"])).exists()
    assert main(["train", str(config), "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_steps"] == 6


def test_evaluate_predict_export_and_report_work_on_a_run(
    finished: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, reviews: Path
) -> None:
    assert main(["evaluate", str(finished), "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line.get("when") == "after"][-1]
    assert measured["num_examples"] == 20
    assert measured["metrics"]["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-4)

    assert main(["evaluate", str(finished / "adapter"), "--dataset", str(reviews / "dev.tsv")]) == 0
    assert "accuracy" in capfd.readouterr().out
    assert main(["evaluate", str(finished), "--require", "accuracy>=1.01"]) == 4
    capfd.readouterr()

    assert main(["predict", str(finished), "--text", "a great film", "--json"]) == 0
    [answer] = json.loads(capfd.readouterr().out)["predictions"]
    assert answer["label"] in ("positive", "negative")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    texts = tmp_path / "texts.txt"
    texts.write_text("a fine plot\nbad music\n")
    assert main(["predict", str(finished), "--input", str(texts), "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2

    assert main(["export", str(finished), str(tmp_path / "plain"), "--plain"]) == 0
    assert main(["export", str(finished), str(tmp_path / "merged"), "--merge"]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert main(["export", str(finished), str(tmp_path / "merged")]) == 2
    capfd.readouterr()

    assert main(["report", str(finished), "--text"]) == 0
    assert "accuracy" in capfd.readouterr().out
    assert main(["report", str(finished), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_checkpoints_and_verify_tell_whole_from_damaged(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(finished), "--json"]) == 0
    [row] = json.loads(capfd.readouterr().out)["checkpoints"]
    assert (row["step"], row["damage"], row["is_best"]) == (6, None, True)
    assert main(["verify", str(finished)]) == 0
    weights = finished / "checkpoints" / "step-00000006" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["verify", str(finished)]) == 1
    assert "adapter_model.safetensors" in capfd.readouterr().out
    assert main(["checkpoints", str(finished)]) == 0
    assert "damaged" in capfd.readouterr().out


def test_what_follows_a_finished_or_stopped_run_is_said_as_it_is(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    capfd.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert "has no manifest.json to prove it by" in said
    assert "damaged" not in said
    (finished / "adapter" / "manifest.json").rename(tmp_path / "manifest.json")
    assert main(["verify", str(finished / "adapter")]) == 1  # there it is damaged: it had one
    assert main(["sync", str(finished)]) == 2
    said = capfd.readouterr().err
    assert f"write `storage_backend` and `remote_path` there, then `trietune sync {finished}`" in said
    (finished / "adapter").rename(tmp_path / "adapter")
    for command in (["export", str(finished), str(tmp_path / "other")], ["predict", str(finished), "fine"]):
        assert main(command) == 2
        assert f"(step-00000006): {finished}/checkpoints/step-00000006" in capfd.readouterr().err


@pytest.mark.parametrize("key", ["train_file", "validation_file", "dataset_id"])
def test_a_missing_file_is_noticed_before_the_model_is_looked_for(
    key: str, overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = {"dataset_id": None, "train_file": overrides["train_file"], key: str(tmp_path / "missing.jsonl")}
    if key == "dataset_id":
        del missing["train_file"]
    config = tmp_path / "config.yaml"
    files = {k: v for k, v in overrides.items() if not k.endswith("_file")}
    config.write_text(json.dumps({**files, **missing, "model_name": str(tmp_path / "no-model")}))
    assert main(["train", str(config), "--dry-run"]) == 2
    said = capfd.readouterr().err
    assert "missing.jsonl" in said
    assert "no-model" not in said


def test_copies_go_to_a_folder_and_an_empty_machine_goes_on(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    settings = {**overrides, "remote_path": str(tmp_path / "mirror"), "sync_to_storage": True, "save_optim": True}
    config.write_text(json.dumps({**settings, "max_steps": 4}))
    assert main(["train", str(config)]) == 0
    run_folder = Path(str(overrides["project_dir"])) / "run"
    copied = sorted(path.name for path in (tmp_path / "mirror" / "run" / "checkpoints").iterdir())
    assert copied == ["step-00000004"]
    assert main(["checkpoints", str(run_folder)]) == 0
    assert "both" in capfd.readouterr().out
    assert main(["sync", str(run_folder)]) == 0
    run_folder.rename(tmp_path / "lost")
    config.write_text(json.dumps({**settings, "max_steps": 6, "load_from_storage": True}))
    assert main(["train", str(config), "--resume"]) == 0
    assert "resuming from step 4" in capfd.readouterr().err
    assert (run_folder / "adapter" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "nowhere.yaml"], 2, "no file"),
        (["train", "--set", "lora_rank=4"], 2, "lora_r"),
        (["train", "--nonsense"], 2, "--nonsense"),
        (["frobnicate"], 2, "frobnicate"),
        (["evaluate", "runs/nowhere"], 2, "runs/nowhere"),
        (["predict", "runs/nowhere", "--text", "x"], 2, "runs/nowhere"),
        (["export", "runs/nowhere", "out"], 2, "does not exist"),
        (["report", "runs/nowhere"], 2, "runs/nowhere"),
        (["checkpoints", "runs/nowhere"], 2, "no config.yaml"),
        (["verify", "runs/nowhere"], 2, "not a folder"),
        (["sync", "runs/nowhere"], 2, "no config.yaml"),
        (["init", "poem"], 2, "poem"),
        (["evaluate", ".", "--require", "accuracy"], 2, "not a threshold"),
    ],
)
def test_mistakes_get_one_message_and_code_2(
    arguments: list[str],
    code: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert words in err
    assert "Traceback" not in out + err


def test_init_writes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune import load_config

    monkeypatch.chdir(tmp_path)
    for kind in ("sst2", "squad", "chat", "jsonl"):
        assert main(["init", kind]) == 0
        load_config(tmp_path / f"{kind}.yaml")
    assert main(["init", "sst2"]) == 2


@pytest.mark.slow
def test_doctor_speaks_and_keeps_secrets(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_value")
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "HF_TOKEN" in out
    assert "canary" not in out
    assert main(["doctor", "--json"]) == 0
    assert {"device", "torch", "cache"} <= {f["topic"] for f in json.loads(capfd.readouterr().out)["findings"]}


def test_import_and_help_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, trietune\nfrom trietune.cli.app import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoints" in done.stdout


def test_bug_leaves_its_traceback_in_a_file(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune import config

    monkeypatch.setattr(config, "load_config", lambda *a: 1 / 0)
    assert main(["train"]) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    path = next(word for word in err.split() if word.endswith(".txt"))
    assert "1 / 0" in Path(path).read_text()


def test_the_original_command_trains(overrides: dict[str, object], tmp_path: Path) -> None:
    """`python3 .../test_gemma11_finetuning.py` with its default file; model and data are local, the steps few."""
    changed = {
        key: overrides[key] for key in ("model_name", "train_file", "validation_file", "project_dir", "use_wandb")
    }
    arguments = as_set({**changed, "max_steps": 3, "max_length": 128})
    dry = run(str(SCRIPT.relative_to(ROOT)), "--dry-run", *arguments, cwd=ROOT, TRIETUNE_CACHE=str(tmp_path / "c"))
    assert dry.returncode == 0, dry.stderr
    assert "3 steps of 4 examples" in dry.stdout
    done = run(str(SCRIPT.relative_to(ROOT)), *arguments, cwd=ROOT, TRIETUNE_CACHE=str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "no Tenstorrent plug-in" in done.stderr
    assert (tmp_path / "runs" / "tt-gemma11-sst2" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_second_process_on_one_run_is_refused(overrides: dict[str, object], tmp_path: Path) -> None:
    from trietune.checkpoints.lock import RunLock

    folder = Path(str(overrides["project_dir"])) / "run"
    folder.mkdir(parents=True)
    with RunLock(folder):
        done = run("-m", "trietune", "train", *as_set({**overrides, "resume_from_checkpoint": "auto"}), cwd=tmp_path)
    assert done.returncode == 2
    assert "another process is writing" in done.stderr
    assert f"process {os.getpid()}" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("in.jsonl", '{"sentence": "a"}\n{"sentence": "a", "sentence": "b"}\n', "in.jsonl:2: duplicate key"),
        ("in.ndjson", '{"sentence": {"a": 1, "a": 2}}\n', "in.ndjson:1: duplicate key `a`"),
        ("in.jsonl", '{"sentence": "a"} {"sentence": "b"}\n', "in.jsonl:1: not JSON: Extra data"),
    ],
)
def test_inputs_of_which_a_part_would_be_dropped_are_refused(
    name: str, text: str, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["predict", "nowhere", "--input", str(tmp_path / name)]) == 2
    assert message in capfd.readouterr().err


def test_one_line_of_input_is_one_input_whatever_separators_are_in_it(tmp_path: Path) -> None:
    from trietune.data.inputs import read_inputs

    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffa fine\u2028film\r\n\nbad\x85music".encode())
    assert [given for _, given in read_inputs(path)] == ["a fine\u2028film", "", "bad\x85music"]


def test_a_second_list_in_a_file_is_an_error_and_not_dropped(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"film {n}", "completion": "good"}) for n in range(20)]
    whole = f"[{','.join(rows)}]\n"
    (tmp_path / "train.json").write_text(whole * 2)
    config = tmp_path / "config.yaml"
    own = {"dataset_id": None, "train_file": str(tmp_path / "train.json"), "validation_file": None}
    config.write_text(json.dumps({**overrides, **own}))
    assert main(["train", str(config), "--dry-run"]) == 2
    assert "train.json:2" in (error := capfd.readouterr().err)
    assert "the list has ended" in error
    (tmp_path / "train.json").write_text(whole)
    assert main(["train", str(config), "--dry-run"]) == 0
