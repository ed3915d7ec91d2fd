"""What the metrics of a checkpoint were measured on: values are ranked only where it is the same.

details of its manifest      {"measured_on": "3f9a...", ...}            all validation examples
                             {"measured_on": "3f9a...:960:23", ...}     960 of them, drawn with seed 23
"""

from __future__ import annotations

from collections.abc import Mapping

MEASURED_ON = "measured_on"


def describe_measured_on(validation_fingerprint: str, *, num_examples: int, max_examples: int | None, seed: int) -> str:
    """A text that is the same for the same validation examples, and only for these.

    Args:
        num_examples: size of the whole validation set.
        max_examples: how many a periodic validation takes of them; None takes all.
        seed: by which they are drawn, if not all are taken.
    """
    if max_examples is None or max_examples >= num_examples:
        return validation_fingerprint
    return f"{validation_fingerprint}:{max_examples}:{seed}"


def measured_on(
    details: Mapping[str, object], *, current: str = "", current_settings: Mapping[str, object] = {}
) -> str:
    """What a checkpoint with these details was measured on.

    Checkpoints from before this was kept have the settings that decided it: where they are the ones of now, it was
    measured on the same; otherwise the settings themselves tell such checkpoints apart.

    Args:
        details: details in the checkpoint's manifest.
        current: what this run measures on.
        current_settings: this run's details.
    """
    found = details.get(MEASURED_ON)
    if isinstance(found, str):
        return found
    deciding = _deciding(details)
    if current and deciding == _deciding(current_settings):
        return current
    return " ".join(f"{key}={value}" for key, value in deciding.items())


def _deciding(details: Mapping[str, object]) -> dict[str, object]:
    keys = ["validation_fingerprint", "eval_max_examples", "seed"]
    if details.get("eval_max_examples") == "auto":
        keys += ["val_steps_freq", "batch_size", "gradient_accumulation_steps"]
    return {key: details.get(key) for key in keys}
