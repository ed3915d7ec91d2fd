"""A run whose memory does not hold what was estimated: it says so once, goes on with less, and ends with a remedy."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trietune import UserError, load_config, train
from trietune.cli.app import main
from trietune.model.causal_lm import TrieModel
from trietune.tracking.events import Event, Message, StepFinished
from trietune.tracking.tracker import Tracker
from trietune.trie import MicroBatch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Listener:
    """Keeps every event."""

    name = "listener"

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def run(settings: dict[str, object]) -> tuple[list[str], list[Any]]:
    """What was warned of, and the metrics of the steps."""
    listener = Listener()
    train(load_config(None, settings), tracker=Tracker([listener]))
    warnings = [event.text for event in listener.events if isinstance(event, Message) and event.level == "warning"]
    return warnings, [event.metrics for event in listener.events if isinstance(event, StepFinished)]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`narrow(room)`: from here on, training has memory for `room` positions at once."""

    def narrow(room: int) -> None:
        original = TrieModel.label_losses

        def label_losses(self: TrieModel, micro_batch: MicroBatch, *others: Any, **options: Any) -> Tensor:
            if self.network.training and micro_batch.num_positions > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(self, micro_batch, *others, **options)

        monkeypatch.setattr(TrieModel, "label_losses", label_losses)

    return narrow


def test_a_run_goes_on_with_smaller_micro_batches(overrides: dict[str, object], narrow: Any) -> None:
    _, expected = run({**overrides, "batch_size": 16, "wandb_run_name": "roomy"})
    narrow(100)
    warnings, found = run({**overrides, "batch_size": 16})
    told = [text for text in warnings if text.startswith("memory ran out")]
    assert told
    assert "tokens: at most " in told[0]
    assert "step 1 begins again" in told[0]
    assert "dropout" not in told[0]
    assert all(metrics["num_micro_batches"] > 1 for metrics in found)
    assert [m["train/loss"] for m in found] == pytest.approx([m["train/loss"] for m in expected], rel=1e-4)


def test_dropout_draws_anew_and_is_said_to(overrides: dict[str, object], narrow: Any) -> None:
    narrow(100)
    warnings, _ = run({**overrides, "batch_size": 16, "lora_dropout": 0.1, "max_steps": 1})
    assert any(text.endswith("dropout draws new masks") for text in warnings)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "remedy"), [(False, "gradient_checkpointing=True"), (True, "max_length=")])
def test_one_example_that_does_not_fit_ends_the_run_with_a_remedy(
    overrides: dict[str, object], narrow: Any, checkpointing: bool, remedy: str
) -> None:
    narrow(5)
    with pytest.raises(UserError) as caught:
        run({**overrides, "gradient_checkpointing": checkpointing})
    assert caught.value.what.startswith("not enough memory for one example of ")
    assert "step 1, on CPU" in str(caught.value)
    assert remedy in str(caught.value)


def test_a_process_that_gets_no_thread_says_so(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["predict", str(tiny_model), "a film", "--set", "dtype=float32", "--max-new-tokens", "1"]
    assert main(command) == 0  # all is imported
    child = os.fork()
    if child == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        threading.stack_size(1 << 30)  # a new thread needs as much address space
        resource.setrlimit(resource.RLIMIT_AS, (size + (512 << 20), resource.RLIM_INFINITY))
        try:
            threading.Thread(target=print).start()
            os._exit(98)  # the fault did not happen
        except RuntimeError:
            pass
        os._exit(main(command))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    text = capfd.readouterr().err
    assert "the system gives this process no further thread" in text
    assert "ulimit -v" in text
    assert "config.json" not in text, "no file is to blame"
