"""Which device is chosen, and what is said where it is not there; nothing here has torch_xla or a card."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from trietune.device import choose, choose_device
from trietune.device.options import DeviceOptions, compile_option, read_mesh
from trietune.errors import UserError

without_torch_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is installed here"
)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")


@without_cuda
def test_use_tt_falls_back_in_one_line() -> None:
    device = choose_device("auto", use_tt=True)
    assert device.kind in ("cpu", "mps")
    assert device.reason is not None
    assert device.reason.startswith("`use_tt: True`, but no Tenstorrent plug-in is installed: training on ")
    assert choose_device("auto", use_tt=False).reason is None


def test_tt_insists_and_says_what_to_install() -> None:
    with pytest.raises(UserError) as caught:
        choose_device("tt", use_tt=True, where=lambda key: f"my.yaml, line 3 ({key})")
    error = caught.value
    assert error.what == "`device: tt`, but no Tenstorrent plug-in is installed"
    assert error.where == "my.yaml, line 3 (device); no entry point `tt` in the group torch_xla.plugins"
    assert "pip install pjrt-plugin-tt" in str(error.next_step)
    assert error.exit_code == 2


@without_torch_xla
def test_xla_without_torch_xla() -> None:
    with pytest.raises(UserError) as caught:
        choose_device("xla", use_tt=True)
    assert caught.value.what == "the device CPU needs torch_xla, which is not installed"
    assert "pip install torch==2.9.0 torch_xla==2.9.0" in str(caught.value.next_step)
    assert "`--set device=cpu`" in str(caught.value.next_step)


@without_torch_xla
def test_a_plug_in_without_torch_xla_is_no_reason_to_train_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_plugin", lambda: True)
    monkeypatch.setattr("trietune.device.xla.device.has_plugin", lambda: True)
    with pytest.raises(UserError) as caught:
        choose_device("auto", use_tt=True)
    assert caught.value.what == "the device TT needs torch_xla, which is not installed"


@without_cuda
def test_cuda_without_a_card() -> None:
    with pytest.raises(UserError, match="`device: cuda`, but PyTorch sees no CUDA device"):
        choose_device("cuda", use_tt=True)


# Meshes


def mesh(**changes: object) -> object:
    settings = {
        "strategy": "single", "shape": (2, 4), "axis_names": ("data", "model"), "shardings": None,
        "data_dimension": None, "where": "test",
    }  # fmt: skip
    return read_mesh(**{**settings, **changes})  # type: ignore[arg-type]


def test_no_shape_is_no_mesh() -> None:
    assert mesh(shape=None) is None


@pytest.mark.parametrize(
    ("changes", "data_axis", "num_rows"),
    [
        ({}, "data", 2),
        ({"axis_names": ("batch", "model")}, "batch", 2),
        ({"axis_names": None}, "data", 2),
        ({"axis_names": ("x", "y")}, None, 1),
        ({"axis_names": ("x", "y"), "data_dimension": "y"}, "y", 4),
        ({"data_dimension": 1}, "model", 4),
        ({"shape": (1, 8)}, None, 1),
    ],
)
def test_axis_that_splits_a_batch(changes: dict[str, object], data_axis: str | None, num_rows: int) -> None:
    found = mesh(**changes)
    assert (found.data_axis, found.num_rows) == (data_axis, num_rows)  # type: ignore[attr-defined]


def test_patterns_are_written_for_plain_and_for_adapted_names() -> None:
    shardings = [[r"\.self_attn\.q_proj(\.base_layer)?$", [None, "model"]], [r"\.lm_head\.weight$", ["model", None]]]
    found = mesh(shardings=shardings)
    assert found.axes_of("model.layers.0.self_attn.q_proj.base_layer")[0] == (None, "model")  # type: ignore[attr-defined]
    assert found.axes_of("lm_head")[0] == ("model", None)  # type: ignore[attr-defined]
    assert found.axes_of("model.layers.0.mlp.up_proj.base_layer") is None  # type: ignore[attr-defined]


def test_specs_by_the_names_of_parameters_and_numbers_of_axes() -> None:
    found = mesh(shardings={"model.layers.0.mlp.up_proj.weight": [1, None]})
    assert found.axes_of("model.layers.0.mlp.up_proj.base_layer")[0] == ("model", None)  # type: ignore[attr-defined]
    assert found.axes_of("model.layers.1.mlp.up_proj.base_layer") is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shape": None, "strategy": "tensor_parallel"}, "needs the devices' grid"),
        ({"axis_names": ("data",)}, "the 2 axes of `mesh_shape` need names"),
        ({"data_dimension": "rows"}, "`input_sharding_dim: rows` is not an axis of the mesh"),
        ({"shape": (1, 8), "strategy": "data_parallel"}, "no axis of the mesh splits a batch: data 1, model 8"),
        ({"strategy": "tensor_parallel"}, "needs the weights that are split"),
        ({"shardings": [["(", [None]]]}, "is not a regular expression"),
        ({"shardings": [["q_proj", ["column", None]]]}, "`column`, over which `q_proj` is split, is not an axis"),
        ({"shardings": ["q_proj"]}, "is not a pair of a pattern and axes"),
        ({"shardings": [["q_proj", "model"]]}, "the axes of `q_proj` are not a list"),
    ],
)
def test_a_mesh_that_cannot_be_meant(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        mesh(**changes)
    assert text in caught.value.what
    assert caught.value.next_step


def test_options_are_text_for_the_compiler() -> None:
    assert [compile_option(value) for value in (True, False, 1, "hifi4")] == ["true", "false", "1", "hifi4"]
    assert DeviceOptions().mesh is None
