"""Every file of `examples/` runs as its first lines say."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import trietune
from slow_cases import slow_but
from tiny_model import write_tiny_model

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]
YAML_FILES = sorted((ROOT / "examples").glob("*.yaml"))
PROGRAM = """\
import sys, warnings
warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_minimal_loop_trains_and_writes_an_adapter(tmp_path: Path) -> None:
    words = ["good", "fine", "bad", "dull"] * 20
    rows = [{"prompt": f"{word}: ", "completion": "yes" if word in ("good", "fine") else "no"} for word in words]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    model, adapter = write_tiny_model(tmp_path / "tiny"), tmp_path / "adapter"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT / "examples" / "minimal_loop.py", model, data, adapter],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("epoch 1, 80 of 80 examples, loss ")
    assert float(lines[-1].rpartition(" ")[2]) < float(lines[0].rpartition(" ")[2])
    assert (adapter / "adapter_model.safetensors").is_file()


def test_minimal_loop_reads_sst2(tmp_path: Path) -> None:
    data = tmp_path / "train.tsv"
    data.write_text('sentence\tlabel\na "fine" film\t1\ndull \t0\n')
    minimal_loop = runpy.run_path(str(ROOT / "examples" / "minimal_loop.py"))
    assert minimal_loop["read_examples"](data) == [
        ('Review: a "fine" film\nOutput:', ' {"label": "positive"}'),
        ("Review: dull \nOutput:", ' {"label": "negative"}'),
    ]


def test_minimal_loop_stays_about_a_hundred_lines() -> None:
    lines = (ROOT / "examples" / "minimal_loop.py").read_text().splitlines()
    assert len(lines) < 115, "it is to be read in one sitting"


@pytest.mark.parametrize("path", slow_but(YAML_FILES, *YAML_FILES[::3]), ids=lambda path: path.stem)
def test_yaml_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model, whose tokens are characters, and for three steps."""
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert f"trietune train examples/{path.name}" in text
    overrides = [
        f"model_name={write_tiny_model(tmp_path / 'tiny')}",
        f"project_dir={tmp_path}",
        *("max_length=4096", "max_steps=3", "max_train_examples=36", "eval_max_examples=4", "dtype=float32"),
    ]
    run = trietune.train(trietune.load_config(path, overrides))
    assert run.exit_code == 0
    losses = [
        event["train/loss"]
        for event in map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in event
    ]
    assert losses
    assert (run.directory / "adapter" / "adapter_model.safetensors").is_file()


def test_the_slurm_job_starts_one_torchrun_on_each_machine(tmp_path: Path) -> None:
    """With stand-ins for Slurm's own commands, and torchrun's own parser."""
    from torch.distributed.run import get_args_parser

    for name, text in {"scontrol": "echo gpu-a; echo gpu-b", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    ran = subprocess.run(
        ["bash", ROOT / "examples" / "cluster" / "slurm.sh", "sst2.yaml"],
        capture_output=True, text=True, timeout=60, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm},
    )  # fmt: skip
    program, *arguments = ran.stdout.splitlines()
    parsed = get_args_parser().parse_args(arguments)
    assert program == "torchrun"
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "gpu-a:29500")
    assert (parsed.module, parsed.training_script) == (True, "trietune")
    assert parsed.training_script_args == ["train", "sst2.yaml", "--resume"]
