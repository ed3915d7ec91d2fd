"""Which device trains, and why: the one place where kinds of devices are told apart."""

from __future__ import annotations

from collections.abc import Callable

from trietune.device.cpu import describe_cpu
from trietune.device.cuda import describe_cuda, has_cuda, missing_cuda
from trietune.device.device import Device
from trietune.device.mps import describe_mps, has_mps, missing_mps
from trietune.device.options import DeviceOptions
from trietune.device.xla.plugin import has_plugin


def choose_device(
    device: str,
    *,
    use_tt: bool,
    options: DeviceOptions | None = None,
    where: Callable[[str], str] = lambda key: key,
) -> Device:
    """The device that `device` and `use_tt` mean on this machine, started.

    An XLA device starts its runtime here: it must come before the first backward pass of the process, and before
    transformers and peft are imported.

    Args:
        device: `auto`, `cpu`, `cuda`, `mps`, `tt` or `xla`; anything but `auto` insists.
        use_tt: with `auto`, a Tenstorrent device comes first, then CUDA, then the CPU.
        options: what only XLA devices can do: a mesh, and how programs are compiled.
        where: tells where a key was set, for messages.

    Raises:
        UserError: the device that was asked for by name is not here, or one that is here cannot be started.
    """
    options = options or DeviceOptions()
    match device:
        case "auto":
            return _choose(use_tt, options, where)
        case "cpu":
            return describe_cpu()
        case "cuda":
            if not has_cuda():
                raise missing_cuda(where("device"))
            return describe_cuda()
        case "mps":
            if not has_mps():
                raise missing_mps(where("device"))
            return describe_mps()
        case "tt" | "xla":
            from trietune.device.xla.device import start_tenstorrent, start_xla

            start = start_tenstorrent if device == "tt" else start_xla
            return start(options, where("device"))
        case _:
            raise ValueError(f"no device is called {device!r}")


def _choose(use_tt: bool, options: DeviceOptions, where: Callable[[str], str]) -> Device:
    describe = describe_cuda if has_cuda() else describe_mps if has_mps() else describe_cpu
    if not use_tt:
        return describe()
    if has_plugin():
        from trietune.device.xla.device import start_tenstorrent

        return start_tenstorrent(options, where("use_tt"), reason="`use_tt: True`: training on the Tenstorrent device")
    found = describe()
    return describe(f"`use_tt: True`, but no Tenstorrent plug-in is installed: training on {found.kind.upper()}")
