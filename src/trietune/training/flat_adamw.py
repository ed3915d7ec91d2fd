"""AdamW over one buffer that holds all of an adapter's tensors.

An adapter has hundreds of small tensors. Gradient norm, clipping and update cost an operation or more on each of them;
of a short step on CPU that is a twentieth. Here the parameters are views of one buffer, and so are their gradients, so
code that knows the parameters by name keeps working, and the optimizer knows one.

    parameters   A B A B ...   views of   [ A | B | A | B | ... ]     the one parameter of the optimizer
    .grad        A B A B ...   views of   [ A | B | A | B | ... ]     its gradient, zeroed instead of dropped
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trietune.io.json_types import JsonMapping, JsonObject

# Numbers of a tensor beyond which its own operations cost more than calling them: whole layers that are trained.
LARGEST = 4_000_000


class FlatAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, on `parameters` of one dtype and one device, laid end to end.

    A parameter that gets no gradient in a step counts as one whose gradient is zero. `state_dict` and `load_state_dict`
    speak of single parameters, as PyTorch's own do.

    Attributes:
        shapes: of the single parameters, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        whole = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        whole.grad = torch.zeros_like(whole)
        super().__init__([whole], **options)
        self._whole = whole
        for parameter, data, grad in zip(parameters, self._split(whole.detach()), self._split(whole.grad), strict=True):
            parameter.data = data
            parameter.grad = grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradient; it stays where it is, whatever `set_to_none` asks."""
        super().zero_grad(set_to_none=False)

    def state_dict(self) -> JsonObject:
        whole = super().state_dict()
        count = len(self.shapes)
        state: dict[int, JsonObject] = {}
        for key, value in whole["state"].get(0, {}).items():
            is_alike = isinstance(value, Tensor) and value.shape == self._whole.shape
            pieces = self._split(value) if is_alike else [value] * count
            for index, piece in enumerate(pieces):
                state.setdefault(index, {})[key] = piece
        groups = [{**group, "params": list(range(count))} for group in whole["param_groups"]]
        return {**whole, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: JsonMapping) -> None:
        """Take the state of every parameter, or of none.

        Raises:
            ValueError: the parameters have taken different numbers of steps, or their states have other shapes.
        """
        state, count = state_dict["state"], len(self.shapes)
        joined = {}
        if state:
            each = [state[index] for index in range(count)]
            if any(not torch.equal(torch.as_tensor(one["step"]), torch.as_tensor(each[0]["step"])) for one in each):
                raise ValueError("the optimizer's state is of parameters that have taken different numbers of steps")
            joined[0] = {key: self._join([one[key] for one in each]) for key in each[0]}
        groups = [{**group, "params": [0]} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "state": joined, "param_groups": groups})

    def _split(self, whole: Tensor) -> list[Tensor]:
        pieces = whole.split_with_sizes([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _join(self, pieces: Sequence[Any]) -> object:
        if not isinstance(pieces[0], Tensor) or pieces[0].ndim == 0:
            return pieces[0]
        if [piece.shape for piece in pieces] != self.shapes:
            raise ValueError("the optimizer's state is of parameters with other shapes")
        return torch.cat([piece.reshape(-1) for piece in pieces])


def can_be_flat(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all parameters have one dtype and one device, and none is so large that it should be moved in memory."""
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    return len(kinds) == 1 and max(parameter.numel() for parameter in parameters) <= LARGEST
