"""The optimizer's state as named tensors, and back, so that a resumed run continues bit for bit.

state.0.exp_avg   state.0.exp_avg_sq   state.0.step   state.1.exp_avg ...      one number a parameter, in order
"""

from __future__ import annotations

import torch
from torch import Tensor

from trietune.io.json_types import JsonObject


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
        _, index, key = name.split(".", 2)
        # A plain number was stored as a float64 scalar; optimizers keep their own scalars in float32.
        is_number = tensor.ndim == 0 and tensor.dtype == torch.float64
        state.setdefault(int(index), {})[key] = tensor.item() if is_number else tensor
    if named and set(state) != set(range(num_parameters)):
        raise ValueError(f"the optimizer's state is for {len(state)} parameters, this adapter has {num_parameters}")
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
