"""Whole runs as on a CUDA card: its description and its ways to attend, with stand-ins for the kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model.flash_on_cpu import flash_on_cpu
from model.flex_on_cpu import flex_on_cpu
from run.test_out_of_memory_run import narrow as narrow  # a fixture
from run.test_run import Recorder, adapter_of, run
from trietune import UserError
from trietune.device.cpu import describe_cpu
from trietune.device.device import Device
from trietune.device.kernels import CudaDevice, unsupported_reason
from trietune.tracking.events import Message, RunStarted, StepFinished

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

H100 = CudaDevice(capability=(9, 0), shared_memory_bytes=227 * 1024)
T4 = CudaDevice(capability=(7, 5), shared_memory_bytes=64 * 1024)
# Of a loss after some steps: eight bits a number, added up in another order.
BF16_TOLERANCE, FP16_TOLERANCE = 2e-2, 5e-3


def describe(card: CudaDevice, **changes: Any) -> Device:
    return replace(
        describe_cpu(),
        kind="cuda",
        name="NVIDIA stand-in",
        dtypes=(torch.bfloat16, torch.float32, torch.float16),
        attentions=("varlen", "flex", "mask", "rows"),
        refuses_attention=partial(unsupported_reason, card),
        to_device=lambda tensor: tensor.clone(),
        **changes,
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`card(description)`: from here on, that is the device of every run."""
    with ExitStack() as stack:

        def install(device: Device) -> list[dict[str, Any]]:
            monkeypatch.setattr("trietune.run.opening.choose_device", lambda *args, **options: device)
            stack.enter_context(flex_on_cpu())
            return stack.enter_context(flash_on_cpu())

        yield install


@pytest.fixture
def evaluated(overrides: dict[str, object]) -> dict[str, object]:
    """Asks for validation, which the other settings here leave out."""
    return {"validation_file": overrides["validation_file"]}


@pytest.fixture
def wide(overrides: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Settings with a model whose heads the kernels take: three of 16 numbers, one for keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "wide"
    shutil.copytree(str(overrides["model_name"]), folder)
    config = LlamaConfig.from_pretrained(folder, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return {**overrides, "model_name": str(folder), "max_steps": 3, "device": "auto", "validation_file": None}


def plan_of(recorder: Recorder) -> dict[str, str]:
    return dict(recorder.of(RunStarted)[0].plan)


def test_bf16_attends_by_the_flash_kernel(wide: dict[str, object], evaluated: dict[str, object], card: Any) -> None:
    settings = {**wide, **evaluated, "dtype": "bfloat16"}
    expected = run({**settings, "wandb_run_name": "rows"})[1].losses
    calls = card(describe(H100))
    _, recorder = run(settings)
    assert calls
    assert plan_of(recorder)["batching"].startswith("trie, attention: varlen, ")
    assert "attention" not in plan_of(recorder)
    assert recorder.losses == pytest.approx(expected, rel=BF16_TOLERANCE)


def test_fp32_attends_by_flex_attention_and_says_why(wide: dict[str, object], card: Any) -> None:
    expected = run({**wide, "wandb_run_name": "rows"})[1].losses
    calls = card(describe(H100, compilations=lambda: 2))
    _, recorder = run(wide)
    assert not calls
    assert plan_of(recorder)["attention"] == ("flex, not varlen: it computes in bfloat16 and float16, not in float32")
    assert recorder.losses == pytest.approx(expected, rel=1e-4)
    assert [event.metrics["num_compilations"] for event in recorder.of(StepFinished)] == [2, 2, 2]


def test_nothing_is_said_of_compilations_where_nothing_is_compiled(wide: dict[str, object]) -> None:
    _, recorder = run({**wide, "max_steps": 1})
    assert "num_compilations" not in recorder.of(StepFinished)[0].metrics


def test_fp16_scales_the_loss_and_keeps_the_scale(wide: dict[str, object], card: Any) -> None:
    expected = run({**wide, "wandb_run_name": "rows"})[1].losses
    card(describe(T4))
    settings = {**wide, "dtype": "float16", "save_optim": True}
    whole, recorder = run({**settings, "wandb_run_name": "whole"})
    assert plan_of(recorder)["device"] == "NVIDIA stand-in, base in float16, with a scaled loss"
    assert plan_of(recorder)["attention"].startswith("flex, not varlen: it needs compute capability 8.0")
    assert recorder.losses == pytest.approx(expected, rel=FP16_TOLERANCE)
    state = json.loads((whole.directory / "checkpoints" / "step-00000003" / "trainer_state.json").read_text())
    assert state["loss_scale"]["scale"] >= 1

    run({**settings, "max_steps": 2})
    resumed, _ = run({**settings, "resume_from_checkpoint": True}, allowed_changes=frozenset({"max_steps"}))
    assert resumed.step == 3
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(tensor, adapter_of(resumed)[name]), name


@pytest.mark.slow
def test_what_took_memory_is_written_once(wide: dict[str, object], card: Any, narrow: Any) -> None:
    written: list[Path] = []

    def write(path: Path) -> bool:
        written.append(path)
        path.write_bytes(b"sizes")
        return True

    card(describe(H100, write_memory_snapshot=write))
    narrow(60)
    finished, recorder = run({**wide, "batch_size": 16})
    assert written == [finished.directory / "memory_snapshot.pickle"]
    told = [event.text for event in recorder.of(Message) if "memory_snapshot" in event.text]
    assert told == [f"{written[0]} shows what used the memory; open it at https://pytorch.org/memory_viz"]


@pytest.mark.slow
def test_a_full_disk_costs_the_snapshot_not_the_run(wide: dict[str, object], card: Any, narrow: Any) -> None:
    def write(path: Path) -> bool:
        raise OSError(28, "No space left on device")

    card(describe(H100, write_memory_snapshot=write))
    narrow(60)
    finished, recorder = run({**wide, "batch_size": 16})
    assert finished.step == 3
    assert any(event.text.startswith("no memory snapshot: ") for event in recorder.of(Message))


def test_a_way_that_does_not_take_the_model_is_refused(overrides: dict[str, object], card: Any) -> None:
    card(describe(H100))
    with pytest.raises(UserError) as refused:
        run({**overrides, "attention": "varlen", "dtype": "bfloat16"})  # heads of 12 numbers
    assert refused.value.what == (
        "`attention: varlen` does not run here: it supports head sizes that are multiples of 8 up to 256, not 12"
    )
    assert refused.value.next_step == '`"attention=auto"` among the overrides, which uses `rows` on this device'


@pytest.mark.slow
def test_a_checkpoint_of_the_card_goes_on_on_the_cpu_and_back(wide: dict[str, object], card: Any) -> None:
    """The optimizer's state included; the numbers are those of an uninterrupted run up to rounding."""
    settings = {**wide, "save_optim": True, "max_steps": 4}
    expected = adapter_of(run({**settings, "wandb_run_name": "whole"})[0])
    run({**settings, "max_steps": 1})
    again = {**settings, "resume_from_checkpoint": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trietune.run.opening.choose_device", lambda *args, **options: describe(H100))
        with flex_on_cpu():
            run({**again, "max_steps": 3}, allowed_changes=frozenset({"max_steps", "device"}))
    finished, _ = run(again, allowed_changes=frozenset({"max_steps", "device"}))
    found = adapter_of(finished)
    difference = max(float((found[n] - t).norm() / t.norm()) for n, t in expected.items())
    assert difference < 1e-4


def test_a_base_in_4_bits_is_refused_on_a_cpu(wide: dict[str, object]) -> None:
    with pytest.raises(UserError) as refused:
        run({**wide, "load_in_4bit": True, "device": "cpu"})
    assert refused.value.what.startswith("`load_in_4bit: True` needs a CUDA device, and this run is on CPU")
    assert refused.value.where == "argument"
