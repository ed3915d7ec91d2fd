"""The machine: which device, which number format, how much memory."""

from trietune.device.choose import choose_device
from trietune.device.device import Device, DeviceKind
from trietune.device.memory import bytes_per_position, micro_batch_bound, widths_of
from trietune.device.options import DeviceOptions, Mesh, read_mesh
from trietune.device.precision import choose_dtype

__all__ = [
    "Device",
    "DeviceKind",
    "DeviceOptions",
    "Mesh",
    "read_mesh",
    "bytes_per_position",
    "choose_device",
    "choose_dtype",
    "micro_batch_bound",
    "widths_of",
]
