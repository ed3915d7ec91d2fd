"""Several XLA devices as one: rows of a micro-batch and weights are marked, and the compiler splits the work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trietune.device.options import Mesh
from trietune.errors import UserError


@dataclass(frozen=True, slots=True)
class Sharder:
    """A mesh of devices that are there."""

    mesh: Mesh
    _devices: object
    _where: str

    @classmethod
    def of(cls, mesh: Mesh, where: str) -> Sharder:
        """Lay the devices out in the grid. Raises `UserError` unless there are as many as it has places."""
        import torch_xla.distributed.spmd as spmd
        import torch_xla.runtime as runtime

        found, wanted = runtime.global_runtime_device_count(), int(np.prod(mesh.shape))
        if found != wanted:
            raise UserError(
                f"a mesh of {' x '.join(map(str, mesh.shape))} needs {wanted} devices, and there are {found}",
                where=where,
                next_step=f'`mesh_shape: "{found},1"`, or another grid of {found}',
            )
        return cls(mesh, spmd.Mesh(np.arange(found), mesh.shape, mesh.axis_names), where)

    @property
    def description(self) -> str:
        """The axes and their sizes."""
        pairs = zip(self.mesh.axis_names, self.mesh.shape, strict=True)
        return " x ".join(f"{name} {size}" for name, size in pairs)

    def split_rows(self, tensor: torch.Tensor) -> None:
        """Give each device of the data axis its part of the first dimension; what cannot be split is on all of them."""
        import torch_xla.distributed.spmd as spmd

        if self.mesh.data_axis is not None and tensor.ndim and tensor.shape[0] % self.mesh.num_rows == 0:
            spmd.mark_sharding(tensor, self._devices, (self.mesh.data_axis, *[None] * (tensor.ndim - 1)))

    def split_weights(self, network: nn.Module) -> None:
        """Split the weights that the patterns name.

        Raises:
            UserError: a pattern that names none, or axes that do not fit a weight.
        """
        import torch_xla.distributed.spmd as spmd

        unused = {sharding.pattern for sharding in self.mesh.shardings}
        for name, module in network.named_modules():
            weight = getattr(module, "weight", None)
            # An adapted layer shows the weight of the layer inside it, which comes under its own name.
            if not isinstance(weight, nn.Parameter) or hasattr(module, "base_layer"):
                continue
            found = self.mesh.axes_of(name)
            if found is None:
                continue
            axes, pattern = found
            if len(axes) != weight.ndim:
                raise UserError(
                    f"`{pattern}` gives {len(axes)} axes for `{name}.weight`, which has {weight.ndim} dimensions",
                    where=self._where,
                    next_step="write one axis, or null, for each dimension",
                )
            spmd.mark_sharding(weight, self._devices, axes)
            unused.discard(pattern)
        if unused:
            raise UserError(
                f"no weight of this model is named by {', '.join(f'`{pattern}`' for pattern in sorted(unused))}",
                where=self._where,
                next_step="names look like `model.layers.0.self_attn.q_proj`; patterns are searched in them",
            )
