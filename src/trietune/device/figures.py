"""How fast devices are, for estimates: published figures of cards that need not be here, and this machine, measured.

A range stands for what is not known: how much of a card's peak the products of a training reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from trietune.device.device import Device
from trietune.device.kernels import CudaDevice, unsupported_reason
from trietune.device.precision import DTYPES
from trietune.errors import UserError

Range = tuple[float, float]

# Of a card's peak in dense products. Published trainings with LoRA reach 33 to 43% on an H100 with models of 7 and 8
# billion parameters (NeMo AutoModel's and independent figures); narrower layers reach less.
SHARE_OF_PEAK: Range = (0.15, 0.45)
# Of a card's memory: what the driver, the libraries and the allocator leave.
USABLE_MEMORY = 0.94
# What one operation costs to start: seconds.
START_ON_CARD: Range = (4e-6, 12e-6)
START_ON_HOST: Range = (4e-6, 12e-6)
# How well a measured product, and a measured copy, stand for those of a training.
MEASURED_SPREAD: Range = (0.7, 1.1)
# What one more thread adds to the products of a step.
ONE_MORE_THREAD: Range = (0.5, 0.95)
# Bytes per second of an all-reduce: between cards of one machine over PCI Express at the least; gloo on a host.
EXCHANGE_BETWEEN_CARDS: Range = (5e9, 50e9)
EXCHANGE_ON_HOST: Range = (0.3e9, 2e9)
MEASURE_S = 0.4
COPIED_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Published:
    """A card's data sheet.

    Attributes:
        flops_16, flops_32: dense products in bfloat16 and float16, and in float32 without TF32, a second.
        bandwidth: bandwidth of its memory, in bytes per second.
        memory: bytes.
    """

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float
    memory: float
    capability: tuple[int, int]
    shared_memory_bytes: int


# NVIDIA's data sheets, without sparsity; shared memory from the CUDA programming guide.
CARDS = {
    "h200": Published("NVIDIA H200 (SXM, 141 GB)", 989e12, 67e12, 4.8e12, 141e9, (9, 0), 227 * 1024),
    "h100": Published("NVIDIA H100 (SXM, 80 GB)", 989e12, 67e12, 3.35e12, 80e9, (9, 0), 227 * 1024),
    "a100": Published("NVIDIA A100 (SXM, 80 GB)", 312e12, 19.5e12, 2.04e12, 80e9, (8, 0), 163 * 1024),
    "l4": Published("NVIDIA L4 (24 GB)", 121e12, 30.3e12, 0.3e12, 24e9, (8, 9), 99 * 1024),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a training's time is made of; each from the least to the most that is likely.

    Attributes:
        flops: FLOP per second in matrix products.
        bandwidth: bytes read and written a second.
        start_s: seconds to start an operation.
        exchange: bytes of gradients that processes add up a second.
        memory: bytes of one device, for a training.
        source: where the figures are from, for people.
        is_card: whether each process has one of its own.
    """

    flops: Range
    bandwidth: Range
    start_s: Range
    exchange: Range
    memory: float
    source: str
    is_card: bool


def imagine(name: str) -> tuple[Device, Published]:
    """A card as `choose_device` would describe it, if it were here.

    Raises:
        UserError: no figures of that name.
    """
    if name not in CARDS:
        raise UserError(
            f"`--device {name}` has no figures here",
            next_step=f"--device {'|'.join(CARDS)}   (or cpu; without it, what this machine would use, measured)",
        )
    card = CARDS[name]

    def refuse() -> None:
        raise AssertionError("nothing is computed on a card that is only imagined")

    return Device(
        kind="cuda",
        name=f"{card.name}, imagined",
        torch_device=torch.device("meta"),
        dtypes=tuple(DTYPES.values()),
        attentions=("varlen", "flex", "mask", "rows"),
        refuses_attention=partial(unsupported_reason, CudaDevice(card.capability, card.shared_memory_bytes)),
        free_memory_bytes=lambda: int(USABLE_MEMORY * card.memory),
        used_memory_bytes=lambda: 0,
        fastest_dtype=lambda: torch.bfloat16,
        runs_bitsandbytes=True,
        synchronize=refuse,
    ), card


def published_speed(card: Published, dtype: torch.dtype) -> Speed:
    """A card's speed in products of `dtype`, as far as its data sheet tells."""
    peak = card.flops_16 if dtype.itemsize == 2 else card.flops_32
    low, high = SHARE_OF_PEAK
    return Speed(
        flops=(low * peak, high * peak),
        bandwidth=(0.6 * card.bandwidth, 0.9 * card.bandwidth),
        start_s=START_ON_CARD,
        exchange=EXCHANGE_BETWEEN_CARDS,
        memory=USABLE_MEMORY * card.memory,
        source=f"{peak / 1e12:.0f} TFLOP/s and {card.bandwidth / 1e12:.2g} TB/s by its data sheet, of which trainings "
        f"reach {low:.0%} to {high:.0%}",
        is_card=True,
    )


def measured_speed(
    device: Device, dtype: torch.dtype, *, rows: int, width_in: int, width_out: int, num_threads: int
) -> Speed:
    """The speed of a device that is here, in products of the shape that a training computes. Takes about a second.

    A processor is measured with one thread: on a machine that others use too, several wait for each other.

    Args:
        rows: positions of a micro-batch.
        width_in, width_out: sizes of the layers' matrices.
        num_threads: threads of a process, on a CPU.
    """
    is_card = device.kind == "cuda"
    threads = torch.get_num_threads()
    if not is_card:
        torch.set_num_threads(1)
    try:
        flops = _measure_products(device, dtype, rows, width_in, width_out)
        bandwidth = _measure_copies(device)
    finally:
        torch.set_num_threads(threads)
    low, high = MEASURED_SPREAD
    more = (1.0, 1.0)
    of_threads = ""
    if not is_card:
        more = (1 + (num_threads - 1) * ONE_MORE_THREAD[0], 1 + (num_threads - 1) * ONE_MORE_THREAD[1])
        of_threads = f" with one thread of {num_threads}"
    return Speed(
        flops=(low * more[0] * flops, high * more[1] * flops),
        bandwidth=(low * bandwidth, high * bandwidth),
        start_s=START_ON_CARD if is_card else START_ON_HOST,
        exchange=EXCHANGE_BETWEEN_CARDS if is_card else EXCHANGE_ON_HOST,
        memory=float(device.free_memory_bytes()),
        source=f"measured now{of_threads}: {flops / 1e9:,.0f} GFLOP/s in products of {rows:,} positions, "
        f"{bandwidth / 1e9:,.1f} GB/s in copies",
        is_card=is_card,
    )


def _measure_products(device: Device, dtype: torch.dtype, rows: int, width_in: int, width_out: int) -> float:
    """FLOP per second, forward and backward in turn, over enough matrices that none stays in a cache."""
    place = device.torch_device
    size = width_in * width_out * dtype.itemsize
    weights = [torch.ones(width_out, width_in, dtype=dtype, device=place) for _ in range(max(1, min(8, 2**28 // size)))]
    hidden = torch.ones(rows, width_in, dtype=dtype, device=place)
    gradient = torch.ones(rows, width_out, dtype=dtype, device=place)

    def compute() -> None:
        for weight in weights:
            hidden @ weight.T
            gradient @ weight

    return 4 * rows * width_in * width_out * len(weights) / _seconds(device, compute)


def _measure_copies(device: Device) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(COPIED_BYTES // 4, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _seconds(device, lambda: target.copy_(source))


def _seconds(device: Device, compute: Callable[[], object]) -> float:
    """The shortest time of a call: what others do on the machine meanwhile is not its own speed."""
    compute()
    device.synchronize()
    taken: list[float] = []
    end = time.perf_counter() + MEASURE_S
    while time.perf_counter() < end or len(taken) < 3:
        begin = time.perf_counter()
        compute()
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken)
