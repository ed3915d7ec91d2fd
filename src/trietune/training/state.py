"""The optimizer's state as named tensors, and back, so that a resumed run continues bit for bit.

state.0.exp_avg   state.0.exp_avg_sq   state.0.step   state.1.exp_avg ...      one number a parameter, in order
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trietune.io.json_types import JsonObject
from trietune.training.flat_adamw import FlatAdamW

_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "step")
_KEYS_OF = {name: {"exp_avg", "exp_avg_sq"} for name in ("Adam", "AdamW", "FlatAdamW")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor and number of the optimizer's state, numbers as float64 scalars."""
    named = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is None:
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            named[f"state.{index}.{key}"] = tensor
    return named


def restore_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        ValueError: a parameter lacks its state, or there is state for a parameter that does not exist.
    """
    own = optimizer.state_dict()
    num_parameters = sum(len(group["params"]) for group in own["param_groups"])
    state: dict[int, JsonObject] = {}
    for name, tensor in named.items():
        word, index, key = (*name.split(".", 2), "", "")[:3]
        if word != "state" or not index.isdecimal() or len(index) > 9 or not key:
            raise ValueError(f"`{name[:80]}` is no part of an optimizer's state")
        # A plain number was stored as a float64 scalar; optimizers keep their own scalars in float32.
        is_number = tensor.ndim == 0 and tensor.dtype == torch.float64
        state.setdefault(int(index), {})[key] = tensor.item() if is_number else tensor
    if named and set(state) != set(range(num_parameters)):
        raise ValueError(f"the optimizer's state is for {len(state)} parameters, this adapter has {num_parameters}")
    _check_fits(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _check_fits(optimizer: torch.optim.Optimizer, state: dict[int, JsonObject]) -> None:
    """Raise ValueError unless each parameter has the same values, each a number or as large as the parameter."""
    if isinstance(optimizer, FlatAdamW):
        shapes = optimizer.shapes
    else:
        shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    keys = set(state[0]) if state else set()
    for index, values in state.items():
        if set(values) != keys:
            raise ValueError(f"parameter {index} has {sorted(values)}, parameter 0 {sorted(keys)}")
        for key, value in values.items():
            if not isinstance(value, Tensor):
                if not math.isfinite(value):
                    raise ValueError(f"`state.{index}.{key}` is {value}")
                continue
            if not value.is_floating_point() or (value.ndim and value.shape != shapes[index]):
                raise ValueError(
                    f"`state.{index}.{key}` holds {value.dtype} {list(value.shape)}, its parameter "
                    f"{list(shapes[index])}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"`state.{index}.{key}` holds what is no finite number")
            if key in _NOT_NEGATIVE and bool((value < 0).any()):
                raise ValueError(f"`state.{index}.{key}` is negative")
    needed = _KEYS_OF.get(type(optimizer).__name__)
    if state and needed is not None and not needed <= keys:
        raise ValueError(f"it lacks {', '.join(sorted(needed - keys))}")
