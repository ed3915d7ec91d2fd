"""Write small runs with whichever version of TrieTune is on the path, for later versions to open.

    git worktree add /tmp/older COMMIT
    PYTHONPATH=/tmp/older/src python tests/old_runs/write.py NAME

writes `tests/old_runs/NAME/` (the runs) and `tests/old_runs/NAME/recorded.json` (what that version measured on them).
Base models and data are shared by all versions and are made by `--inputs`; changing them invalidates every run.

Nothing here may import more of TrieTune than every version has: the command, and the tracker's `emit`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INPUTS = ("llama", "gemma", "data")
EXIT_TERMINATED = 143
PROMPT = "a good film"
IN_FP32 = ("--set", "dtype=float32")
ANSWER = ("--max-new-tokens", "8", *IN_FP32)

REVIEWS: dict[str, Any] = {
    "model_name": "llama",
    "dataset_id": "sst2",
    "train_file": "data/train.tsv",
    "validation_file": "data/dev.tsv",
    "max_length": 128,
    "dtype": "float32",
    "batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
    "num_epochs": 2,
    "max_steps": 8,
    "save_strategy": "step",
    "save_optim": True,
    "steps_freq": 3,
    "val_steps_freq": 3,
    "keep_last_n": 1,
    "keep_best_n": 1,
    "checkpoint_metric": "eval/loss",
    "checkpoint_metric_mode": "min",
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "project_dir": "runs",
    "use_wandb": False,
    "device": "cpu",
    "deterministic": True,
    "print_examples": True,
}
PREFERENCES = {
    **{key: value for key, value in REVIEWS.items() if key != "dataset_id"},
    "model_name": "gemma",
    "train_file": "data/pairs.jsonl",
    "validation_file": "data/pairs-valid.jsonl",
    "objective": "dpo",
}
# name of the run -> its settings, and after how many steps it is stopped (0: not at all). A stopped run has the
# settings of a finished one, whose further steps it should take when it is resumed.
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "reviews": (REVIEWS, 0),
    "reviews-stopped": (REVIEWS, 5),
    "preferences": (PREFERENCES, 0),
    "preferences-stopped": (PREFERENCES, 5),
}


def main() -> None:
    if sys.argv[1:] == ["--inputs"]:
        write_inputs(HERE)
        return
    (name,) = sys.argv[1:]
    target = HERE / name
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        copy_inputs(world)
        os.chdir(world)
        os.environ["TRIETUNE_CACHE"] = str(world / "cache")
        has_objectives = "objective" in said("train", "--show-config")
        recorded = {}
        for run, (settings, stop_at) in RUNS.items():
            if has_objectives or "objective" not in settings:
                recorded[run] = write_run(run, settings, stop_at)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(world / "runs", target)
        os.chdir(HERE)
    (target / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


def copy_inputs(world: Path) -> None:
    """Give `world` the base models and data under the names by which the runs know them."""
    for name in INPUTS:
        shutil.copytree(HERE / "inputs" / name, world / name)


def write_run(run: str, settings: dict[str, Any], stop_at: int) -> dict[str, Any]:
    """Train one run in the current folder; returns what `evaluate` and `predict` of this version say about it."""
    config = Path(f"{run}.yaml")
    config.write_text(json.dumps({**settings, "wandb_run_name": run}))
    with stopping_at(stop_at):
        said("train", str(config), exit_code=EXIT_TERMINATED if stop_at else 0)
    folder = Path("runs") / run
    forget_machine(folder)
    target = str(weights_of(folder))
    data = data_of(run) if stop_at else ()
    evaluated = json.loads(said("evaluate", target, *data, "--json"))
    answered = json.loads(said("predict", target, "--text", PROMPT, *ANSWER, "--json"))
    return {"metrics": evaluated["metrics"], "predictions": answered["predictions"]}


@contextlib.contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Send this process SIGTERM when a run has taken `step` steps; 0: never."""
    try:
        from trietune.tracking.tracker import Tracker
    except ImportError:
        from trietune.tracking.dispatch import Tracker
    emit = Tracker.emit

    def stop(tracker: Tracker, event: Any) -> None:
        emit(tracker, event)
        if type(event).__name__ == "StepFinished" and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.emit = stop
    yield
    Tracker.emit = emit


def said(*arguments: str, exit_code: int = 0) -> str:
    """What a command writes to stdout."""
    from trietune.cli import main as command

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = command(list(arguments))
    assert code == exit_code, (arguments, code)
    return out.getvalue()


def data_of(run: str) -> tuple[str, ...]:
    """The data and number format of a run, for a target that does not know its run."""
    settings = RUNS[run][0]
    data = {
        key: settings[key] for key in ("dataset_id", "train_file", "validation_file", "objective") if key in settings
    }
    return (*(f"--set={key}={value}" for key, value in data.items()), *IN_FP32)


def weights_of(run: Path) -> Path:
    """What of a run can be evaluated: a finished one itself, a stopped one's newest checkpoint."""
    return run if (run / "adapter").exists() else max((run / "checkpoints").glob("step-*"))


def forget_machine(run: Path) -> None:
    """Drop what is drawn from other files, or names the machine."""
    for name in ("report.html", ".lock"):
        (run / name).unlink()
    environment = json.loads((run / "environment.json").read_text())
    environment["machine"] = {"system": "Linux", "cpu": "x86_64", "device": "CPU, 1 threads"}
    (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


# Base models and data

WORDS = ["a", "the", "film", "plot", "cast", "is", "was", "good", "fine", "bad", "dull", "great", "poor", "and", "very"]
PRAISE, BLAME = ("good", "fine", "great"), ("bad", "dull", "poor")


def write_inputs(folder: Path) -> None:
    for name in INPUTS:
        (folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
    write_models(folder / "inputs")
    write_data(folder / "inputs" / "data")


def write_models(folder: Path) -> None:
    """A Llama and a Gemma of two layers and random weights, with a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate(["<eos>", "<bos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**shape))),
        ("gemma", GemmaForCausalLM(GemmaConfig(**shape))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    draw = random.Random(5)
    for name, size in (("train.tsv", 16), ("dev.tsv", 8)):
        rows = []
        for _ in range(size):
            words = [draw.choice(WORDS) for _ in range(draw.randint(2, 5))]
            rows.append(f"{' '.join(words)}\t{int(bool(set(PRAISE) & set(words)))}")
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for name, size in (("pairs.jsonl", 16), ("pairs-valid.jsonl", 6)):
        rows = []
        for _ in range(size):
            start = f" {draw.choice(WORDS)} {draw.choice(WORDS)} "
            pair = {"chosen": start + draw.choice(PRAISE), "rejected": start + draw.choice(BLAME)}
            rows.append(json.dumps({"prompt": f"the {draw.choice(WORDS[:5])}:", **pair}))
        (folder / name).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
