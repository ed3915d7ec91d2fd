"""Adapters that are large are saved piece by piece; what is saved and how a run goes on from it is the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trietune import load_config, train
from trietune.io import directory
from trietune.io.directory import LazyContent, read_directory, write_directory
from trietune.model.adapter import tensors as raw_tensors


@pytest.mark.slow
def test_a_streamed_run_is_killed_and_ends_with_the_same_bytes(
    overrides: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **overrides, "modules_to_save": ["lm_head"], "save_optim": True, "lora_dropout": 0.1, "steps_freq": 2,
        "save_strategy": "step", "self_check": False,
    }  # fmt: skip
    whole = tmp_path / "whole" / "run"
    train(load_config(None, {**settings, "project_dir": str(whole.parent)}))
    streamed: list[str] = []
    real = write_directory

    def note(target: Path, contents: Mapping[str, Any], **rest: Any) -> Any:
        streamed.extend(name for name, content in contents.items() if isinstance(content, LazyContent))
        return real(target, contents, **rest)

    monkeypatch.setattr(directory, "write_directory", note)
    monkeypatch.setattr(raw_tensors, "STREAMED_ABOVE_BYTES", 1000)
    monkeypatch.setattr(raw_tensors, "_PIECE_BYTES", 5000)
    train(load_config(None, {**settings, "project_dir": str(tmp_path / "pieces")}))
    run = tmp_path / "pieces" / "run"
    assert streamed.count("adapter_model.safetensors") == streamed.count("optimizer.safetensors") == 3
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train(load_config(None, {**settings, "project_dir": str(run.parent), "resume_from_checkpoint": True}))
    for name in ("adapter", "checkpoints/step-00000006"):
        found, expected = read_directory(run / name)[1], read_directory(whole / name)[1]
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert found.get(file) == expected.get(file), f"{name}/{file}"
    assert any(b"lm_head" in data for data in found.values())
