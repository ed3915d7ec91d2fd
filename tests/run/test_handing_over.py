"""Handing a run over from the command line: exports for other programs, the hub, predictions, comparisons, its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.fake_hub import FakeHub, fake_hub
from trietune.cli.app import main
from trietune.errors import UserError
from trietune.model.adapter.push import check_repository, push_folder


@pytest.fixture
def finished(overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run that `trietune train` has just finished."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(overrides))
    assert main(["train", str(config)]) == 0
    capfd.readouterr()
    return Path(str(overrides["project_dir"])) / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
        yield found


def test_a_run_is_exported_for_other_programs(
    finished: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", str(finished), str(tmp_path / "gguf"), "--to", "gguf", "--merge"]) == 0
    out = capfd.readouterr().out
    assert "20 of 20 first tokens of answers" in out
    assert "(bf16 by itself keeps" in out
    assert f"use it:  llama-cli -m {tmp_path}/gguf/model.gguf" in out
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model.gguf"]
    assert main(["export", str(finished), str(tmp_path / "merged"), "--merge"]) == 0
    assert "100.00% of" in capfd.readouterr().out
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_theta"] == 10_000.0
    # An adapter alone has no validation examples: shipped ones prove it.
    assert main(["export", str(finished / "adapter"), str(tmp_path / "vllm"), "--to", "vllm"]) == 0
    out, err = capfd.readouterr()
    assert "100.00% of" in out
    assert "20 built-in sentences check the export" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["OUT", "--to", "lmstudio"], "`--to lmstudio` is not known"),
        (["OUT", "--to", "gguf", "--quantize", "q2"], "`--quantize q2` is not known"),
        (["OUT", "--quantize", "q8_0"], "`--quantize` applies to GGUF files only"),
        (["OUT", "--to", "vllm", "--plain"], "`--plain` and `--to` do not go together"),
        (["OUT", "--merge", "--plain"], "`--plain` and `--merge` do not go together"),
        (["OUT", "--public"], "`--public` needs `--push`"),
        (["--push", "just-a-name"], "does not name a repository"),
        ([], "needs a folder to write to"),
    ],
)
def test_options_that_do_not_go_together_are_said(
    options: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = [option.replace("OUT", str(tmp_path / "out")) for option in options]
    assert main(["export", str(tmp_path / "run"), *written]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_goes_to_the_hub_in_one_private_commit(
    finished: Path, hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), "--push", "me/film-reviews"]) == 0
    assert f"pushed to {hub.url}/me/film-reviews" in capfd.readouterr().out
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "prompt_format.json"}
    assert set(hub.repositories["me/film-reviews"]) == files
    assert [set(commit) for commit in hub.commits] == [files]
    assert hub.private == {"me/film-reviews"}
    adapter = finished / "adapter" / "adapter_model.safetensors"
    assert hub.repositories["me/film-reviews"]["adapter_model.safetensors"] == adapter.read_bytes()


def test_a_hub_that_refuses_is_said_in_words(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    hub.answer_first = lambda method, path: 403 if "commit" in path or "create" in path else None
    with pytest.raises(UserError, match="does not let you write to `me/x` \\(HTTP 403\\)") as raised:
        push_folder(tmp_path, "me/x")
    assert "hf auth login" in str(raised.value.next_step)
    assert hub.commits == []


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "../x", "a/..", "a b/c", "/a", "a/"])
def test_names_that_are_no_repository(name: str) -> None:
    with pytest.raises(UserError, match="does not name a repository"):
        check_repository(name, where="--push")


def test_predictions_are_written_as_the_task_is_read(
    finished: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "said.jsonl"
    assert main(["evaluate", str(finished), "--predictions", str(file), "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)["metrics"]["eval/accuracy"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 20
    assert sum(line["is_right"] for line in lines) / 20 == pytest.approx(measured)
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)


def test_answers_are_written_as_squads_script_reads_them(
    overrides: dict[str, object], questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.json"
    options = [f"--set={key}={json.dumps(overrides[key])}" for key in ("dtype", "device")]
    settings = [
        "dataset_id=squad_v2",
        f"validation_file={questions / 'dev.json'}",
        f"train_file={questions / 'train.json'}",
    ]
    sets = [part for item in settings for part in ("--set", item)]
    assert main(["evaluate", str(overrides["model_name"]), *options, *sets, "--predictions", str(file)]) == 0
    answers = json.loads(file.read_text())
    assert len(answers) == 9
    assert all(key.startswith("dev.json-") and isinstance(text, str) for key, text in answers.items())


def test_a_run_keeps_the_picture_of_its_first_batch_and_every_prediction(finished: Path) -> None:
    batch = json.loads((finished / "batch.json").read_text())
    assert batch["num_examples"] == 8 == len(batch["ids"])
    assert batch["num_distinct"] < batch["num_real"] <= batch["num_padded"]
    assert batch["num_distinct"] == sum(end - begin for _, _, begin, end, _, _ in batch["segments"])
    root = batch["segments"][0]
    assert root[:3] == [0, 8, 0]
    assert root[4].startswith("Review:")
    first = json.loads((finished / "batches.jsonl").read_text().splitlines()[0])
    assert set(batch["ids"]) == set(first["ids"])
    said = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [line["when"] for line in said] == ["before"] * 20 + ["after"] * 20
    page = (finished / "report.html").read_text()
    assert "What was shared" in page
    assert f"{batch['num_padded']:,}" in page


def test_two_runs_are_compared(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "config.yaml"), "--set", "lora_r=2"]) == 0
    capfd.readouterr()
    assert main(["compare", str(finished), f"{finished}-2"]) == 0
    out = capfd.readouterr().out
    assert "run-2 against run" in out
    assert "of 20 examples, p " in out
    assert "lora_r" in out.split("settings that differ")[1]


def test_a_run_pushes_its_adapter_when_it_is_done(overrides: dict[str, object], hub: FakeHub, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**overrides, "max_steps": 1, "push_to_hub": "me/pushed"}))
    assert main(["train", str(config)]) == 0
    adapter = Path(str(overrides["project_dir"])) / "run" / "adapter"
    assert hub.repositories["me/pushed"] == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert hub.private == {"me/pushed"}


def test_a_push_that_fails_leaves_the_run_whole(
    overrides: dict[str, object], hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.answer_first = lambda method, path: 403 if "create" in path else None
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**overrides, "max_steps": 1, "push_to_hub": "me/pushed"}))
    assert main(["train", str(config)]) == 3
    assert "--push me/pushed` retries it" in capfd.readouterr().err
    assert (Path(str(overrides["project_dir"])) / "run" / "adapter" / "manifest.json").is_file()
