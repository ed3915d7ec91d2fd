"""Keys as hands type them: options, assignments, files; what is no command; and that the last one written wins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trietune.cli.app import main
from trietune.cli.commands import ANSWERS, unknown_command
from trietune.cli.typed_keys import complete_assignment, keys_as_set
from trietune.config import Settings, load_config
from trietune.errors import UserError

OWN = {"--set": 1, "--resume": 0, "--dry-run": 0, "--json": 0, "--allow-change": 1, "--text": 1, "--input": 1}


def read(*words: str, command: str = "train") -> tuple[list[str], list[str]]:
    """What is left of the words, and the overrides in their order."""
    left = keys_as_set(words, OWN, command=command)
    overrides = [left[index + 1] for index, word in enumerate(left) if word == "--set"]
    return left[2 * len(overrides) :], overrides


@pytest.mark.parametrize(
    ("typed", "overrides"),
    [
        ("--learning-rate 1e-4", ["learning_rate=1e-4"]),
        ("--learning_rate=1e-4", ["learning_rate=1e-4"]),
        ("learning_rate=1e-4", ["learning_rate=1e-4"]),
        ("learning-rate=1e-4", ["learning_rate=1e-4"]),
        ("--set learning_rate=1e-4", ["learning_rate=1e-4"]),
        ("--set=learning_rate=1e-4", ["learning_rate=1e-4"]),
        ("--use-dora", ["use_dora=True"]),
        ("--no-use-dora", ["use_dora=False"]),
        ("--use_dora true", ["use_dora=True"]),
        ("--use_dora False", ["use_dora=False"]),
        ("--use-dora=no", ["use_dora=no"]),
        ("--no-self-check --use-rslora", ["self_check=False", "use_rslora=True"]),
        ("--resume-from-checkpoint", ["resume_from_checkpoint=True"]),
        ("--resume_from_checkpoint auto", ["resume_from_checkpoint=auto"]),
        ("--group-by-prefix false", ["group_by_prefix=False"]),
        ("--ignored-index -100 --max-steps -1", ["ignored_index=-100", "max_steps=-1"]),
        ("--lora_target_modules q_proj v_proj --seed 3", ["lora_target_modules=q_proj,v_proj", "seed=3"]),
        ("--lora-target-modules all-linear", ["lora_target_modules=all-linear"]),
        ("lora_r=1 --lora-r 2 --set lora_r=3 lora_r=4", ["lora_r=1", "lora_r=2", "lora_r=3", "lora_r=4"]),
        ("--data owner/name", ["train_file=null", "validation_file=null", "data_shares=null", "dataset_id=owner/name"]),
        ("--model owner/name", ["model_name=owner/name"]),
        (
            "--data missing.jsonl",
            ["dataset_id=null", "validation_file=null", "data_shares=null", "train_file=missing.jsonl"],
        ),
        ("--data ./missing", ["dataset_id=null", "validation_file=null", "data_shares=null", "train_file=./missing"]),
        ("--lr 3 --bf16", ["lr=3", "bf16=True"]),
    ],
)  # fmt: skip
def test_keys_become_overrides_in_the_order_in_which_they_are_typed(typed: str, overrides: list[str]) -> None:
    assert read("my.yaml", *typed.split()) == (["my.yaml"], overrides)


def test_the_commands_own_options_keep_their_values() -> None:
    typed = ["my.yaml", "--resume", "--allow-change", "lora_r=3", "--json"]
    assert read(*typed) == (typed, [])


def test_a_text_to_ask_is_a_key_only_if_it_names_one() -> None:
    words = ["runs/x", "x=1, what is x?", "--text", "seed=3", "device=cpu"]
    assert read(*words, command="predict") == (words[:-1], ["device=cpu"])
    assert read("runs/x", "--", "device=cpu", command="predict")[0] == ["runs/x", "--", "device=cpu"]


@pytest.mark.parametrize(
    ("typed", "what", "step"),
    [
        ("--learnin-rate 3", "No such option: `--learnin-rate`", "`--learning-rate`"),
        ("--dryrun", "No such option: `--dryrun`", "`--dry-run`"),
        ("--qqqq", "No such option: `--qqqq`", "trietune train --help"),
        ("--learning-rate", "`--learning-rate` needs a value", "trietune train --help"),
        ("--learning-rate --seed 3", "`--learning-rate` needs a value", "trietune train --help"),
        ("--no-use-dora=True", "`--no-use-dora=True` takes no value", "--no-use-dora"),
        ("-c", "`-c` needs a value", "trietune train --help"),
    ],
)
def test_what_is_no_key_is_answered(typed: str, what: str, step: str) -> None:
    with pytest.raises(UserError) as caught:
        read(*typed.split())
    assert caught.value.what == what
    assert step in str(caught.value.next_step)
    assert caught.value.exit_code == 2


def test_files_are_laid_over_one_another_where_they_are_typed(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nlora_r: 1\n")
    second.write_text('seed: 2\nprompt_template: "a: {b}"\nwandb_tags: ["x y", "z"]\nmax_time: null\nuse_dora: True\n')
    assert read("-c", str(first)) == ([str(first)], [])
    assert read("--config", str(first), "--seed", "3")[0] == [str(first)]
    left, overrides = read(str(first), "--seed", "3", "-c", str(second), "--lora-r", "4")
    assert left == [str(first)]
    settings = load_config(first, [*overrides, "completion_template={c}"], {})
    assert (settings.seed, settings.lora_r, settings.use_dora) == (2, 4, True)
    assert settings.prompt_template == "a: {b}"
    assert settings.wandb_tags == ("x y", "z")
    with pytest.raises(UserError, match="there is no file"):
        read(str(first), "-c", str(tmp_path / "third.yaml"))


@pytest.mark.parametrize("key", sorted(Settings.model_fields))
def test_every_key_is_an_option(key: str) -> None:
    dashed = f"--{key.replace('_', '-')}"
    is_switch = isinstance(Settings.model_fields[key].default, bool)
    assert read("--set", "seed=1", dashed, *([] if is_switch else ["7"]))[1][-1].startswith(f"{key}=")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_lists_every_key_under_the_heading_of_its_group(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    out, _ = capfd.readouterr()
    assert all(f"--{key.replace('_', '-')}" in out for key in Settings.model_fields)
    assert out.index("Keys: Data") < out.index("--train-file") < out.index("Keys: Adapter") < out.index("--lora-r")
    assert "--no-use-dora" in out


def test_values_reach_the_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train_file: a.jsonl\nlearning_rate: 1\n")
    assert main(["train", str(path), "--learning-rate", "1e-4", "--use-dora", "seed=9", "--show-config"]) == 0
    out, _ = capfd.readouterr()
    assert "learning_rate: 1e-4 " in out
    assert "use_dora: True " in out
    assert "seed: 9 " in out
    assert main(["train", str(path), "--lr", "1e-4"]) == 2
    assert "write `--learning-rate 1e-4`" in capfd.readouterr().err


def test_model_and_data_need_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert main(["train", "--model", "some/model", "--data", "mine.jsonl", "--show-config"]) == 0
    out, _ = capfd.readouterr()
    for line in (
        'model_name: "some/model" ', 'train_file: "mine.jsonl" ', "dataset_id: null", 'wandb_run_name: "mine" ',
        "learning_rate: 2e-4 ",
    ):  # fmt: skip
        assert line in out
    # Without data of one's own it is the sample run, as before.
    for typed in (["--model", "some/model"], ["--set", "dataset_id=demo/questions"], []):
        assert main(["train", *typed, "--show-config"]) == 0
        assert "learning_rate: 5e-4 " in capfd.readouterr().out
    assert main(["train", "--objective", "dpo", "--show-config"]) == 0
    assert 'dataset_id: "demo/preferences"' in capfd.readouterr().out


@pytest.mark.parametrize(
    ("typed", "step"),
    [
        ("chat runs/x", "trietune predict runs/x "),
        ("merge runs/x out", "trietune export runs/x out --merge"),
        ("merge", "trietune export runs/NAME OUT --merge"),
        ("serve runs/x", "trietune export runs/x OUT --merge --to vllm"),
        ("push runs/x", "trietune export runs/x --push OWNER/NAME"),
        ("help", "trietune --help"),
        ("help train", "trietune train --help"),
        ("sft my.yaml", "trietune train my.yaml"),
        ("dpo my.yaml", "trietune train my.yaml --objective dpo"),
        ("my.yaml", "trietune train my.yaml"),
        ("evalute runs/x", "`trietune evaluate runs/x`"),
        ("qqqq", "trietune --help"),
    ],
)
def test_what_is_no_command_is_answered_with_the_right_one(
    typed: str, step: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert step in err.splitlines()[-1] + " "


def test_answers_name_commands_that_exist() -> None:
    known = ["train", "evaluate", "predict", "export", "report", "compare", "checkpoints", "init", "doctor"]
    for name in ANSWERS:
        assert name not in known
        step = str(unknown_command(name, [], known).next_step)
        assert "{" not in step
        assert name == "login" or step.split()[1] in [*known, "--version"]


def test_shells_complete_what_follows_set() -> None:
    assert ("learning_rate=", "step size of the optimizer") in complete_assignment("learning")
    assert complete_assignment("save_strategy=e") == [("save_strategy=epoch", "")]
    assert all(text.strip() for text, _ in complete_assignment(""))


def test_a_file_among_texts_is_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("a\n")
    assert main(["predict", "runs/x", str(path)]) == 2
    assert f"--input {path}" in capfd.readouterr().err


def test_help_loads_neither_torch_nor_the_settings() -> None:
    script = (
        "import sys; from trietune.cli.app import main; main(['--help']);"
        "sys.exit(bool({'torch', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == 0
