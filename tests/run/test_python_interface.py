"""What `import trietune` offers: the commands as functions, advice in Python, notebooks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import trietune
from trietune.cli.app import main
from trietune.io.python_words import as_python
from trietune.run.signals import is_interactive
from trietune.tracking.console import notebook
from trietune.tracking.console.console import ConsoleListener
from trietune.tracking.events import ExamplesShown, MarkedExample, PhaseProgress, RunFinished, StepFinished
from trietune.tracking.tracker import Tracker


def test_dir_lists_the_interface_and_loads_nothing() -> None:
    script = (
        "import sys, trietune; print(dir(trietune)); [getattr(trietune, name) for name in ('predict', 'export')];"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(trietune.__all__) == set(dir(trietune)) >= {"predict", "export", "train", "evaluate", "load_config"}


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("trietune predict runs/x", 'trietune.predict("runs/x", ["a text"])'),
        ("trietune evaluate runs/x", 'trietune.evaluate("runs/x")'),
        (
            "trietune evaluate runs/x/adapter --dataset sst2   (a hub id)",
            'trietune.evaluate("runs/x/adapter", overrides=["dataset_id=sst2"])   (a hub id)',
        ),
        ("`trietune export runs/x out --merge --to vllm`", '`trietune.export("runs/x", "out", merge=True, to="vllm")`'),
        ("`--set batching=padded`, on plain rows", '`"batching=padded"` among the overrides, on plain rows'),
        ("write `--learning-rate 2e-4`", 'write `"learning_rate=2e-4"` among the overrides'),
        ("`--resume` continues", '`"resume_from_checkpoint=auto"` among the overrides continues'),
        ("`trietune train a.yaml --dry-run` shows", '`trietune.load_config("a.yaml")` shows'),
        ("trietune report runs/x", "trietune report runs/x"),
        ("lower `learning_rate`", "lower `learning_rate`"),
    ],
)
def test_advice_is_said_in_python(text: str, python: str) -> None:
    assert as_python(text) == python


@pytest.mark.slow
def test_errors_advise_in_python_where_python_called(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 0\n")
    with pytest.raises(trietune.UserError) as caught:
        trietune.load_config(path)
    assert f'`trietune.load_config("{path}")` shows what would run' in str(caught.value)
    with pytest.raises(trietune.UserError) as caught:
        trietune.predict(tmp_path / "nothing" / "here", "x")
    assert "--" not in str(caught.value)


def test_predict_returns_the_commands_records_and_export_a_folder(
    overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trietune.train(trietune.load_config(None, {**overrides, "max_steps": 1, "self_check": False}))
    out = capfd.readouterr().out
    assert f'trietune.predict("{run.directory}", ["a text"])' in out
    assert f"trietune predict {run.directory}" not in out
    texts = ["the film is fine", "dull"]
    records = trietune.predict(run.directory, texts, overrides=["self_check=False"], max_new_tokens=4)
    assert main(["predict", str(run.directory), *texts, "--json", "--no-self-check"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert [record["input"] for record in records] == texts
    assert [record["label"] for record in records] == [record["label"] for record in document["predictions"]]
    assert set(records[0]["probabilities"]) == {"negative", "positive"}
    assert trietune.predict(run.directory, texts[0], overrides={"self_check": False}) == records[:1]
    folder = trietune.export(run.directory, tmp_path / "out")
    assert (folder / "adapter_model.safetensors").is_file()
    with pytest.raises(trietune.UserError, match="is not known"):
        trietune.export(run.directory, tmp_path / "other", to="word")  # type: ignore[arg-type]


class Interrupting:
    """Sends an interrupt after a step."""

    name = "interrupting"

    def handle(self, event: object) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None:
        pass


def test_an_interrupt_at_a_prompt_is_raised_after_the_run_has_ended_whole(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = trietune.load_config(None, {**overrides, "self_check": False})
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt, match="was saved at step 2"):
        trietune.train(settings, tracker=Tracker([Interrupting()]))
    folder = Path(str(overrides["project_dir"])) / "run"
    assert (folder / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.delattr(sys, "ps1")
    stopped = trietune.train(
        trietune.load_config(None, {**overrides, "self_check": False, "wandb_run_name": "script"}),
        tracker=Tracker([Interrupting()]),
    )
    assert (stopped.status, stopped.exit_code) == ("stopped", 130)


class Kernel:
    """A stand-in for IPython's shell in a notebook, and its display."""

    kernel = object()

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, data: dict[str, str], **_: Any) -> Any:
        self.shown.append(data)
        return types.SimpleNamespace(update=lambda data, raw: self.shown.append(data))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.get_ipython = lambda: kernel  # type: ignore[attr-defined]
    display.display = kernel.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return kernel


def test_progress_in_a_notebook_is_one_output_that_is_updated(
    kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    console = ConsoleListener(clock=lambda: now[0])
    assert notebook.is_notebook()
    assert is_interactive()
    for done in range(5):
        now[0] += 1
        console.handle(PhaseProgress("tokenizing", done * 10, 40, "examples"))
    assert len(kernel.shown) == 5
    assert "tokenizing" in kernel.shown[0]["text/plain"]
    assert "<pre>" in kernel.shown[-1]["text/html"]
    console.handle(ExamplesShown([MarkedExample("a:1", [("one <b>", False), ("two", True)])]))
    assert "one &lt;b&gt;" in kernel.shown[-1]["text/html"]
    assert "[two]" in kernel.shown[-1]["text/html"]
    console.handle(RunFinished("finished", 1, 1.0, {}, ()))
    console.close()
    assert kernel.shown[-1]["text/plain"] == ""
    assert "\x1b" not in "".join(capsys.readouterr())


def test_frames_in_a_notebook_are_not_drawn_more_often_than_anybody_sees(kernel: Kernel) -> None:
    now = [0.0]
    screen = notebook.NotebookScreen(lambda width: [], clock=lambda: now[0])
    for _ in range(100):
        now[0] += 0.01
        screen.start()
    assert len(kernel.shown) <= 5


def test_without_a_kernel_it_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not notebook.is_notebook()
    console = ConsoleListener(io.StringIO(), io.StringIO())
    assert console._screen is None


@pytest.mark.parametrize("number", [0, "5", 1.5, True])
def test_a_length_of_answers_that_is_no_count_is_refused(number: Any) -> None:
    with pytest.raises(trietune.UserError, match=r"`max_new_tokens=.*` is not a whole number of 1 or more"):
        trietune.predict("nowhere", "x", max_new_tokens=number)


def test_overrides_in_one_text_are_refused_and_not_read_letter_by_letter() -> None:
    with pytest.raises(trietune.UserError, match="`overrides='dtype=float32'` is one text") as refused:
        trietune.load_config(overrides="dtype=float32")
    assert "write a list: `overrides=['dtype=float32']`" in str(refused.value)
    assert "2 things" not in str(refused.value)


def test_a_number_of_examples_that_is_no_count_is_refused() -> None:
    for number in (0, "3", 2.0):
        with pytest.raises(trietune.UserError, match=r"`max_examples=.*` is not a whole number of 1 or more"):
            trietune.evaluate("nowhere", max_examples=number)  # type: ignore[arg-type]


def test_what_is_no_settings_is_refused_with_what_to_write() -> None:
    for given, how in (("x.yaml", "'x.yaml'"), (Path("x.yaml"), "'x.yaml'"), ({"a": 1}, "overrides={...}")):
        with pytest.raises(
            trietune.UserError, match=r"`trietune\.train` takes settings, and was given a value"
        ) as refused:
            trietune.train(given)  # type: ignore[arg-type]
        assert f"next:  trietune.train(trietune.load_config({how}))" in str(refused.value)
