"""What keeps an XLA device from starting is said in words: exit code 2, no traceback, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
# What Tenstorrent's plug-in does to the process when torch_xla finds it, without its library.
STAND_IN = """
import os
import torch_xla
from torch_xla.experimental import plugins

class Plugin(plugins.DevicePlugin):
    def __init__(self):
        super().__init__()
        os.environ["XLA_STABLEHLO_COMPILE"] = "1"
        torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)

    def library_path(self):
        return "/nonexistent/pjrt_plugin_tt.so"
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which a plug-in called `tt` is installed, without its library."""
    folder = tmp_path / "stand-in"
    information = folder / "fake_tt-0.0.1.dist-info"
    information.mkdir(parents=True)
    (folder / "fake_tt.py").write_text(STAND_IN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-tt\nVersion: 0.0.1\n")
    (information / "entry_points.txt").write_text("[torch_xla.plugins]\ntt = fake_tt:Plugin\n")
    return folder


def choose(device: str, *paths: Path, before: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Start `device` in a process of its own, as the command line does; `before` runs first."""
    code = f"""
import sys
{before}
from trietune.device import choose_device
from trietune.errors import UserError
try:
    device = choose_device({device!r}, use_tt=True, where=lambda key: key)
except UserError as error:
    print(error.what, error.where, error.next_step, sep="\\n")
    sys.exit(error.exit_code)
print("started", device.name)
"""
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_DEVICE"}
    python_path = os.pathsep.join(map(str, (*paths, SOURCE)))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**inherited, "PYTHONPATH": python_path, **environ}, check=False,
    )  # fmt: skip


def test_no_plug_in() -> None:
    done = choose("tt")
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("`device: tt`, but no Tenstorrent plug-in is installed\n")
    assert "pjrt-plugin-tt" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_plug_in_without_its_library(stand_in: Path) -> None:
    for device in ("tt", "auto"):
        done = choose(device, stand_in)
        assert done.returncode == 2, done.stderr
        assert done.stdout.startswith("the plug-in for TT is installed, but its library cannot be opened\n")
        assert "/nonexistent/pjrt_plugin_tt.so" in done.stdout
        assert "`--set device=cpu`" in done.stdout


def test_computed_on_the_cpu_before() -> None:
    before = "import torch; torch.ones(1, requires_grad=True).sum().backward()"
    done = choose("xla", before=before, PJRT_DEVICE="CPU")
    assert done.returncode == 2, done.stderr
    assert "this process has already computed on another device" in done.stdout
    assert "start a new process" in done.stdout


def test_another_device_has_been_started_before(stand_in: Path) -> None:
    before = "import os; os.environ['PJRT_DEVICE'] = 'CPU'; import torch_xla; torch_xla.device()"
    done = choose("tt", stand_in, before=before)
    assert done.returncode == 2, done.stderr
    assert "the device TT cannot be started any more" in done.stdout


def test_a_type_that_nobody_registered() -> None:
    done = choose("xla", PJRT_DEVICE="NOSUCH")
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("no PJRT plug-in is registered for the device type NOSUCH\n")


def test_torch_xla_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch_xla.py").write_text("raise ImportError('undefined symbol: _ZN5torch8autograd10deleteNodeE')\n")
    done = choose("xla", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "torch_xla is installed, but it cannot be imported: undefined symbol" in done.stdout
    assert "install builds that belong together" in done.stdout


def test_the_whole_path_of_a_tenstorrent_device(stand_in: Path, tmp_path: Path) -> None:
    """`set_device_type("TT")` leads to XLA's CPU client here; everything before and after it is real."""
    from tiny_model import write_tiny_model

    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(
        "\n".join(f'{{"prompt": "the film is {word}, say", "completion": "{word}"}}' for word in ("good", "bad") * 4)
    )
    code = f"""
import sys
import torch_xla.runtime as runtime
real = runtime.set_device_type
asked = []
def set_device_type(name):
    asked.append(name)
    real("CPU" if name == "TT" else name)
runtime.set_device_type = set_device_type
from trietune.cli.app import main
code = main([
    "train", "--set", "model_name={model}", "--set", "train_file={tmp_path / "data.jsonl"}",
    "--set", "dataset_id=own", "--set", "dtype=float32", "--set", "use_wandb=False", "--set", "batch_size=4",
    "--set", "num_epochs=2", "--set", "enable_trace=True", "--set", "trace_region_size_mb=200",
    "--set", "project_dir={tmp_path / "runs"}", "--set", "wandb_run_name=tt", "--set", "print_examples=False",
])
print("asked for", asked)
sys.exit(code)
"""
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_DEVICE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
        env={**inherited, "PYTHONPATH": f"{stand_in}{os.pathsep}{SOURCE}", "TRIETUNE_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "asked for ['TT']" in done.stdout
    assert "training on the Tenstorrent device" in done.stderr
    assert "takes no compile options, so enable_trace=true has no effect" in done.stderr
    assert (tmp_path / "runs" / "tt" / "adapter" / "adapter_model.safetensors").is_file()
