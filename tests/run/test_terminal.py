"""No text from a file steers a terminal: not by stdout, not by stderr, whoever wrote it."""

from __future__ import annotations

import ast
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from slow_cases import slow_but
from trietune import load_config, train
from trietune.cli.app import main

# Renames the window; moves the cursor up and wipes a line; C1's own introducer; turns the direction of writing.
HOSTILE = "\x1b]0;owned\x07\x1b[1A\x1b[2K\x9b31m\u202egnirts"
CLI = Path(__file__).parents[2] / "src" / "trietune" / "cli"


def is_clean(text: str) -> bool:
    return not any(char in text for char in "\x1b\x07\x9b\u202e\x08\x7f\r")


Routes = dict[str, Callable[[Path, dict[str, object]], list[str]]]


def with_file(name: str, content: str | bytes, key: str = "train_file") -> Callable[..., list[str]]:
    def command(folder: Path, overrides: dict[str, object]) -> list[str]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        config = folder / "config.yaml"
        config.write_text(json.dumps({**overrides, key: str(path), "validation_file": None}))
        return ["train", str(config), "--dry-run"]

    return command


def run_folder(change: Callable[[Path], None], *command: str) -> Callable[..., list[str]]:
    def make(folder: Path, overrides: dict[str, object]) -> list[str]:
        run = train(load_config(None, overrides)).directory
        change(run)
        return [part.replace("RUN", str(run)).replace("OUT", str(folder / "out")) for part in command]

    return make


def add_tensor(run: Path) -> None:
    adapter = run / "adapter"
    (adapter / "manifest.json").unlink()
    header = json.dumps({HOSTILE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def add_key(run: Path) -> None:
    adapter = run / "adapter"
    (adapter / "manifest.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, HOSTILE: 1}))


def name_labels(run: Path) -> None:
    adapter = run / "adapter"
    (adapter / "manifest.json").unlink()
    document = json.loads((adapter / "prompt_format.json").read_text())
    document["task"]["label_names"] = [f"{HOSTILE}{name}" for name in document["task"]["label_names"]]
    (adapter / "prompt_format.json").write_text(json.dumps(document))


def add_lines(run: Path) -> None:
    line = {
        "event": "evaluation",
        "step": 6,
        "when": "after",
        "num_examples": 1,
        f"eval/{HOSTILE}": 0.5,
        "intervals": {},
    }
    prediction = {"step": 6, "when": "after", "id": HOSTILE, "prompt": HOSTILE, "expected": HOSTILE,
                  "predicted": HOSTILE, "is_right": False}  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"event": "end", "step": 6, "status": HOSTILE, "seconds": 1}) + "\n")
    with (run / "predictions.jsonl").open("a") as file:
        file.write(json.dumps(prediction) + "\n")


def rename_step(run: Path) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    (checkpoint / HOSTILE.replace("/", "")).touch()


FILE = HOSTILE.replace("/", "")
ROUTES: Routes = {
    "a label": with_file("a.tsv", f"sentence\tlabel\nfine\t{HOSTILE}\n"),
    "a column": with_file("b.jsonl", json.dumps({HOSTILE: "a", "x": "b"}) + "\n"),
    "a column twice": with_file("c.tsv", f"{HOSTILE}\t{HOSTILE}\n1\t2\n"),
    "a key twice": with_file("d.jsonl", '{"%s": 1, "%s": 2}\n' % ((json.dumps(HOSTILE)[1:-1],) * 2)),
    "the name of a data file": with_file(f"{FILE}.tsv", "sentence\tlabel\nfine\n"),
    "the name of a file that is fine": with_file(
        f"{FILE}.jsonl", "".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(40))
    ),
    "a model's name": lambda folder, _: ["evaluate", f"./{HOSTILE}", "--dataset", "demo/film_reviews"],
    "a tensor's name": run_folder(add_tensor, "predict", "RUN", "--text", "a"),
    "a key of an adapter": run_folder(add_key, "export", "RUN", "OUT"),
    "a label's name": run_folder(name_labels, "predict", "RUN", "--text", "a fine film"),
    "a label's name, as JSON": run_folder(name_labels, "predict", "RUN", "--text", "a fine film", "--json"),
    "a metric and an answer": run_folder(add_lines, "report", "RUN", "--text"),
    "a file beside a checkpoint": run_folder(rename_step, "verify", "RUN"),
    "a file beside a checkpoint, as JSON": run_folder(rename_step, "verify", "RUN", "--json"),
    "a folder that is no run": lambda folder, _: ["report", str(folder / FILE)],
    "a configuration": lambda folder, _: ["train", str(folder / f"{FILE}.yaml")],
    "an unknown key": lambda folder, _: ["train", "--set", f"{HOSTILE}=1", "--dry-run"],
    "a required metric": lambda folder, _: ["evaluate", "x", "--require", f"{HOSTILE}>=x"],
}


@pytest.mark.parametrize(
    "route", slow_but(ROUTES, "a label", "a column", "a tensor's name", "a label's name, as JSON", "an unknown key")
)
def test_control_characters_are_written_out(
    route: str, overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ROUTES[route](tmp_path, overrides)
    capfd.readouterr()
    main(command)
    out, err = capfd.readouterr()
    assert is_clean(out), out
    assert is_clean(err), err
    # Of a long path, both ends are shown.
    assert any(part in out + err for part in ("]0;own", "egnirts")), "what is hostile was shown nowhere"
    if "--json" in command:
        assert any(HOSTILE in text or FILE in text for text in _texts(json.loads(out))), "JSON keeps what it holds"


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (str(key), *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def test_the_commands_write_by_one_door_alone() -> None:
    doors = {"_say", "_print_json_line", "report"}
    functions = [function for path in sorted(CLI.glob("*.py")) for function in ast.parse(path.read_text()).body]
    assert len(functions) > 20
    for function in functions:
        if not isinstance(function, ast.FunctionDef) or function.name in doors:
            continue
        text = ast.unparse(function)
        for other in ("typer.echo", "click.echo", "print(", "stdout.write", "stderr.write"):
            assert other not in text.replace("_print", ""), f"{function.name}: {other}"


def test_warnings_of_libraries_are_written_out(capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    script = (
        "import warnings, logging\nfrom trietune.cli.train import _set_log_level\n_set_log_level('INFO')\n"
        f"warnings.warn({HOSTILE!r})\nlogging.getLogger('trietune').info({HOSTILE!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("]0;owned") == 2
    assert is_clean(done.stderr)
