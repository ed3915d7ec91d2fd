"""`trietune estimate`: a run that is prepared and not started, and what it would take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from trietune.cli.options import AsJson, MaybePath, MaybeText, Overrides
from trietune.cli.printing import console, print_json, say_line
from trietune.cli.settings import settings_to_train
from trietune.errors import UserError
from trietune.io.json_types import JsonObject
from trietune.ranks.launched import refuse_several_processes

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.device.figures import Range, Speed
    from trietune.run.estimate import Estimate
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker

NOT_COUNTED = "loading model and data, saving, uploads, and machines that others use too"


def estimate(
    config: Annotated[MaybePath, typer.Argument(help="YAML file; without one, the sample model and data.")] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[
        MaybeText,
        typer.Option(metavar="NAME", help="h200, h100, a100, l4, cpu; default: this machine's, measured."),
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that share each step.")] = 1,
    price: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, metavar="EUR", help="Of one device for an hour; the total is printed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how long a run would take, how much memory, and at what cost."""
    from trietune.io.columns import columns

    refuse_several_processes()
    if price is not None and not math.isfinite(price):
        raise UserError(f"`--price {price:g}` is not an amount", next_step="--price 2.50")
    settings = settings_to_train(config, overrides)
    with console() as tracker:
        lines, document = _estimated(settings, tracker, device=device, num_processes=nproc, price=price)
    if as_json:
        print_json({"estimate": document})
        return
    for line in columns(lines):
        say_line(line)


def _estimated(
    settings: Settings, tracker: Tracker, *, device: str | None, num_processes: int, price: float | None
) -> tuple[list[tuple[str, str]], JsonObject]:
    """What the command prints, as (name, value), and the same for `--json`.

    Raises:
        UserError: a device without figures, and whatever is wrong with settings or data.
    """
    from trietune.device.figures import imagine, published_speed
    from trietune.ranks.launch import as_one_of
    from trietune.run.estimate import estimate_run
    from trietune.run.prepare import prepare
    from trietune.run.signals import StopSignals

    imagined = card = None
    if device not in (None, "cpu"):
        imagined, card = imagine(device)
    elif device == "cpu":
        from trietune.device.cpu import describe_cpu

        imagined = describe_cpu()
    with StopSignals() as signals, as_one_of(num_processes):
        prepared = prepare(settings, tracker, signals.check, num_processes=num_processes, device=imagined)
    speed = _measure(prepared, num_processes) if card is None else published_speed(card, prepared.plan.dtype)
    found = estimate_run(prepared, speed, num_processes)
    return _lines(prepared, found, price), _document(prepared, found, price)


def _measure(prepared: Prepared, num_processes: int) -> Speed:
    """The speed of the device that the run would take, which is here."""
    from trietune.device.figures import measured_speed
    from trietune.run.estimate import threads_here

    plan, widths = prepared.plan, prepared.shape.widths
    if plan.device.has_static_shapes:
        raise UserError(
            f"there are no figures for {plan.device.name}, where a step is a program",
            next_step="--device cpu, or a card: --device h100",
        )
    rows = max(prepared.work.num_positions // max(prepared.work.num_micro_batches, 1), 1)
    # Of the layers' matrices, as many numbers as they have on average beside the residual stream.
    width = max(prepared.shape.num_in_layers // max(widths.layers * widths.hidden * 4, 1), 64)
    threads = threads_here(num_processes)
    return measured_speed(
        plan.device, plan.dtype, rows=rows, width_in=widths.hidden, width_out=width, num_threads=threads
    )


def _lines(prepared: Prepared, found: Estimate, price: float | None) -> list[tuple[str, str]]:
    plan = prepared.plan
    kept = {"model", "adapter", "device", "data", "objective", "steps", "processes", "", "sharing"}
    lines = [(name, value) for name, value in plan.lines() if name in kept]
    memory = f"{found.memory / 1e9:.1f} of {found.speed.memory / 1e9:.1f} GB"
    memory += " in each process" if found.num_processes > 1 else ""
    lines += [
        ("memory", f"about {memory}: {'fits' if found.fits else 'does not fit'}"),
        ("speed", found.speed.source),
    ]
    if found.unknown is not None:
        return [*lines, ("time", f"not estimated: {found.unknown}")]
    lines += [
        ("step", f"{_span(found.step)}; {found.flops_a_step / 1e12:.2g} TFLOP"),
        ("training", f"{_span(found.training)} for {found.num_steps:,} steps"),
    ]
    if found.reference[1]:
        lines.append(("reference", f"{_span(found.reference)}, once: it is kept"))
    if found.validation[1]:
        lines.append(("validation", f"{_span(found.validation)} for all of them"))
    lines.append(("total", _span(found.total)))
    lines += [("", sentence) for sentence in _ends_sooner(prepared.settings, found)]
    if price is not None:
        low, high = found.cost(price)
        devices = found.num_processes if found.speed.is_card else 1
        times = f" x {devices} devices" if devices > 1 else ""
        lines.append(("cost", f"{_amount(low)} to {_amount(high)} EUR at {price:g} EUR an hour{times}"))
    return [*lines, ("not counted", NOT_COUNTED)]


def _ends_sooner(settings: Settings, found: Estimate) -> list[str]:
    """Why the run may take less than all its steps."""
    sentences = []
    if settings.max_time is not None and found.total[1] > settings.max_time:
        may = "ends" if found.total[0] > settings.max_time else "may end"
        sentences.append(
            f"`max_time`, {_span((settings.max_time,) * 2).partition(' to ')[2]}, {may} it before its last step"
        )
    if settings.early_stopping_patience is not None:
        sentences.append("`early_stopping_patience` may end it before its last step")
    return sentences


def _document(prepared: Prepared, found: Estimate, price: float | None) -> JsonObject:
    is_known = found.unknown is None
    return {
        "device": prepared.plan.device.name,
        "num_processes": found.num_processes,
        "num_steps": found.num_steps,
        "memory_bytes": int(found.memory),
        "device_memory_bytes": int(found.speed.memory),
        "fits": found.fits,
        "speed": found.speed.source,
        "flops_per_step": found.flops_a_step,
        "step_seconds": list(found.step) if is_known else None,
        "training_seconds": list(found.training) if is_known else None,
        "reference_seconds": list(found.reference) if is_known else None,
        "validation_seconds": list(found.validation) if is_known else None,
        "total_seconds": list(found.total) if is_known else None,
        "cost_eur": list(found.cost(price)) if is_known and price is not None else None,
        "unknown": found.unknown,
        "not_counted": NOT_COUNTED,
    }


def _span(seconds: Range) -> str:
    """`12 to 20 s`, `1.5 to 3 h`: two digits, in the unit of the larger one."""
    high = seconds[1]
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if high >= 1.5 * size or unit == "ms":
            return f"{_amount(seconds[0] / size)} to {_amount(high / size)} {unit}"
    raise AssertionError("unreachable")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"
