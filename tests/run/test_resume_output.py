"""What a resume says in each case, word by word: read `tests/golden/resume.txt`."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from trietune.cli.app import main
from trietune.io import manifest
from trietune.io.directory import read_manifest

NUM_STEPS = 6
# What every start says, resumed or not: counts of the data, the plan, steps, evaluations, what was saved.
_EVERY_START = re.compile(r"training: |validation: |loading |step \d|evaluation |checkpoint of |adapter of ")
Settings = dict[str, object]


@dataclass
class Bench:
    """Runs of one small training in folders of their own; `said` collects the golden text."""

    settings: Settings
    folder: Path
    capfd: pytest.CaptureFixture[str]
    made: dict[str, Path] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def train(self, project: Path, *arguments: str, **changes: object) -> tuple[int, str]:
        project.mkdir(parents=True, exist_ok=True)
        config = project / "config.yaml"
        config.write_text(json.dumps({**self.settings, "project_dir": str(project), **changes}))
        self.capfd.readouterr()
        code = main(["train", str(config), *arguments])
        return code, self.capfd.readouterr().err

    def finished(self, project: Path, **changes: object) -> Path:
        """A run that is done, copied from one with the same settings; returns its folder."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self.made:
            self.made[key] = self.folder / f"made-{len(self.made)}"
            assert self.train(self.made[key], **changes)[0] == 0
        shutil.copytree(self.made[key] / "run", project / "run")
        return project / "run"

    def killed(self, project: Path, **changes: object) -> Path:
        """The same as a kill after step 5 leaves it: checkpoints of steps 2 and 4, lines of later steps."""
        run = self.finished(project, **changes)
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoints" / "step-00000006")
        return run

    def resume(self, case: str, *arguments: str, code: int = 0, **changes: object) -> None:
        project = self.folder / "case"
        found, text = self.train(project, *arguments, **changes)
        typed = " ".join(["trietune train config.yaml", *arguments]).replace(f"{project}/", "runs/")
        self.said.append(f"### {case}\n$ {self.mask(typed)}\n{self.mask(without_every_start(text))}exit code {found}\n")
        shutil.rmtree(project)
        assert found == code, text

    def mask(self, text: str) -> str:
        for path, name in ((self.folder / "case", "runs"), (self.folder, "elsewhere")):
            text = text.replace(str(path), name)
        text = text.replace(str(self.settings["model_name"]), "MODEL")
        text = re.sub(r"\b[0-9a-f]{12,}\b", "HASH", text)
        return re.sub(r"\b\d\.\d{3}\b", "LOSS", text)


def without_every_start(text: str) -> str:
    lines, is_plan = [], False
    for line in text.splitlines(keepends=True):
        is_plan = line.startswith("run: ") or (is_plan and line.startswith("  "))
        if not is_plan and not _EVERY_START.match(line):
            lines.append(line)
    return "".join(lines)


@pytest.fixture
def bench(overrides: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Bench:
    settings = {
        **overrides, "max_steps": NUM_STEPS, "steps_freq": 2, "val_steps_freq": 2, "save_strategy": "step",
        "save_optim": True, "self_check": False, "keep_last_n": 3,
    }  # fmt: skip
    return Bench(settings, tmp_path, capfd)


def damage(run: Path, step: int, file: str = "adapter_model.safetensors") -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def measured_as(run: Path, step: int, loss: float) -> None:
    path = run / "checkpoints" / f"step-{step:08d}"
    found = read_manifest(path)
    info = replace(found.info, metrics={"eval/loss": loss})
    (path / "manifest.json").write_bytes(manifest.serialize(replace(found, info=info)))


@pytest.mark.slow
def test_what_a_resume_says(bench: Bench, golden: Callable[[str, str], None]) -> None:
    case = bench.folder / "case"

    bench.resume("nothing there yet", "--resume")
    bench.resume("nothing there, and there should be", code=6, resume_from_checkpoint=True)

    bench.killed(case)
    bench.resume("the newest, with its optimizer", "--resume")

    bench.killed(case, save_optim=False)
    bench.resume("the newest, saved without optimizer", "--resume", save_optim=False)

    measured_as(bench.killed(case), 2, loss=0.1)
    bench.resume("the best", "--resume", resume_option="best")

    bench.killed(case)
    path = str(case / "run" / "checkpoints" / "step-00000002")
    bench.resume("one by its path", "--resume", resume_option="path", checkpoint_path=path)

    bench.killed(case)
    path = str(case / "run" / "checkpoints" / "step-00000003")
    bench.resume("a path that is none", "--resume", resume_option="path", checkpoint_path=path, code=2)

    damage(bench.killed(case), 4)
    bench.resume("the newest is damaged", "--resume")

    run = bench.killed(case)
    damage(run, 4)
    path = str(run / "checkpoints" / "step-00000004")
    bench.resume("the one by its path is damaged", "--resume", resume_option="path", checkpoint_path=path, code=6)

    run = bench.killed(case)
    os.truncate(run / "checkpoints" / "step-00000002" / "manifest.json", 100)
    (run / "checkpoints" / "step-00000004" / "adapter_config.json").unlink()
    bench.resume("all are damaged", "--resume", code=6)

    damage(bench.killed(case), 4, "optimizer.safetensors")
    bench.resume("the optimizer of the newest is damaged", "--resume")

    run = bench.killed(case)
    for step in (2, 4):
        damage(run, step, "optimizer.safetensors")
    bench.resume("every optimizer is damaged", "--resume", code=6)

    damage(bench.killed(case), 4, "optimizer.safetensors")
    bench.resume("the same, and that is allowed", "--resume", "--allow-change", "optimizer_state")

    shutil.rmtree(bench.killed(case) / "checkpoints" / "step-00000004")
    (case / "run" / "checkpoints" / "step-00000002").rename(case / "run" / "checkpoints" / "abandoned-1-step-00000002")
    bench.resume("all were set aside", "--resume", code=6)

    bench.finished(case)
    bench.resume("the run has finished", "--resume")

    bench.killed(case)
    bench.resume("harmless differences", "--resume", max_tokens_per_micro_batch=200, attention="mask")

    bench.killed(case)
    bench.resume("another training", "--resume", learning_rate=0.02, lora_r=8, code=6)

    bench.killed(case)
    bench.resume("another training that is allowed", "--resume", "--allow-change", "learning_rate", learning_rate=0.02)

    storage = {"storage_backend": "local", "remote_path": str(bench.folder / "mirror"), "load_from_storage": True}
    copied = bench.killed(bench.folder / "copied")
    shutil.copytree(copied, bench.folder / "mirror" / "run")
    bench.resume("an empty machine", "--resume", **storage)

    damage(bench.folder / "mirror" / "run", 4)
    bench.resume("an empty machine, the newest copy damaged", "--resume", **storage)

    bench.train(case, max_steps=2)
    bench.resume("copies of another run in the storage", "--resume", **storage, code=2)

    bench.resume("copies of another run where this one's should go", **storage, sync_to_storage=True, code=2)

    golden("resume.txt", "\n".join(bench.said))
