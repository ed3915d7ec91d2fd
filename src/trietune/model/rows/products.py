"""Run once a node what computes positions one by one: projections, norms, MLPs, experts.

    grid of rows [R, W, D] -> the module's nodes [T, D] -> its own code -> laid back [R, W, D']

The network itself runs on whole rows, so its masks, positions, windows, states and convolutions are its own. Which
modules may be shared is found by a trial: given the positions of a short grid in another order, they give the same
numbers in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from trietune.model.decoder_layers import decoder_of
from trietune.model.replaced import replace_forward
from trietune.model.rows.grid import RowGrid
from trietune.trie import Trie

# What a trial may differ by: sums of another order round, what mixes positions gives other numbers altogether.
TOLERANCE = 0.02
_TRIAL_ROWS, _TRIAL_WIDTH = 3, 5


class SharedProducts:
    """`network` on whole rows, its products once a node.

    Attributes:
        names: of the modules that run once a node.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._grid: RowGrid | None = None
        self.names = tuple(name for name, _ in _shareable(network))
        for name in self.names:
            module = network.get_submodule(name)
            replace_forward(module, self._once_a_node(module.forward))
        for module in network.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = self._with_grid(module._gradient_checkpointing_func)

    def hidden_states(self, trie: Trie, to_device: Callable[[Tensor], Tensor]) -> Tensor:
        """Last hidden states of all nodes: [1, T, D]."""
        grid = RowGrid(trie, to_device)
        return grid.to_nodes(self.of_rows(grid).flatten(0, 1))[None]

    def of_rows(self, grid: RowGrid) -> Tensor:
        """Last hidden states of all positions of the grid: [R, W, D]."""
        with self._over(grid):
            output = decoder_of(self._network)(input_ids=grid.tokens, attention_mask=grid.mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def _over(self, grid: RowGrid | None) -> Iterator[None]:
        before, self._grid = self._grid, grid
        try:
            yield
        finally:
            self._grid = before

    def _with_grid(self, recompute: Callable[..., object]) -> Callable[..., object]:
        """Checkpointed layers run again in the backward pass, when another grid may be there."""

        def checkpoint(function: Callable[..., object], *args: object, **kwargs: object) -> object:
            grid = self._grid

            def again(*inner: object, **more: object) -> object:
                with self._over(grid):
                    return function(*inner, **more)

            return recompute(again, *args, **kwargs)

        return checkpoint

    def _once_a_node(self, own: Callable[..., Any]) -> Callable[..., object]:
        def forward(*args: Any, **kwargs: object) -> object:
            grid = self._grid
            flat = _flat(args[0], grid.shape) if grid is not None and len(args) == 1 and not kwargs else None
            if grid is None or flat is None:
                return own(*args, **kwargs)
            x, nodes = args[0], grid.to_nodes(flat)
            # As it was given: one row of positions, or only positions.
            output = own(nodes if x.dim() == 2 else nodes[None])
            first = output[0] if isinstance(output, tuple) else output
            laid = grid.to_rows(first.reshape(grid.num_nodes, -1)).view(*x.shape[:-1], -1)
            return (laid, *output[1:]) if isinstance(output, tuple) else laid

        return forward


def _flat(x: object, shape: tuple[int, int]) -> Tensor | None:
    """[R * W, D] of a floating tensor that holds something of each position of the grid."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.dim() == 3 and tuple(x.shape[:2]) == shape:
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == 2 and len(x) == shape[0] * shape[1] else None


def _shareable(network: Any) -> list[tuple[str, nn.Module]]:
    """The outermost modules that compute positions one by one, by name; each is called in the trial."""
    decoder = decoder_of(network)
    trial = _Trial()
    handles = [module.register_forward_hook(trial.note, with_kwargs=True) for module in decoder.modules()]
    shape = (_TRIAL_ROWS, _TRIAL_WIDTH)
    device = network.get_input_embeddings().weight.device
    tokens = torch.arange(_TRIAL_ROWS * _TRIAL_WIDTH, device=device).view(shape) + 3
    inputs = {"input_ids": tokens % network.get_input_embeddings().weight.shape[0], "use_cache": False}
    try:
        # What raises here raises in the proof, too, which has the words for it.
        with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            decoder(**inputs, attention_mask=torch.ones_like(tokens))
    finally:
        for handle in handles:
            handle.remove()
    found: list[tuple[str, nn.Module]] = []
    prefix = next(name for name, module in network.named_modules() if module is decoder)
    outer = {id(decoder)}

    def look(module: nn.Module, name: str) -> None:
        if id(module) not in outer and _is_pointwise(module, trial.inputs.get(module), shape):
            found.append((name, module))
            return
        for child_name, child in module.named_children():
            look(child, f"{name}.{child_name}" if name else child_name)

    look(decoder, prefix)
    return list({id(module): (name, module) for name, module in found}.values())


class _Trial:
    """Notes what each module was given, where that was one tensor and it returned one."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor | None] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        is_alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        first = output[0] if isinstance(output, tuple) and output else output
        if module in self.inputs and self.inputs[module] is None:
            return
        self.inputs[module] = args[0] if is_alone and isinstance(first, Tensor) else None


@torch.no_grad()
def _is_pointwise(module: nn.Module, x: Tensor | None, shape: tuple[int, int]) -> bool:
    if x is None or not any(True for _ in module.parameters()):
        return False
    flat = _flat(x, shape)
    if flat is None:
        return False
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).to(flat.device)
    try:
        straight = _first(module(flat if x.dim() == 2 else flat[None]))
        mixed = _first(module(flat[order] if x.dim() == 2 else flat[order][None]))
        as_given = _first(module(x))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    if not all(isinstance(y, Tensor) and y.is_floating_point() for y in (straight, mixed, as_given)):
        return False
    if straight.numel() % len(flat) or straight.shape != mixed.shape or straight.shape[:-1].numel() != len(flat):
        return False
    straight, mixed, as_given = (y.reshape(len(flat), -1).float() for y in (straight, mixed, as_given))
    bound = TOLERANCE * float(straight.norm().clamp_min(1e-30))
    return float((straight[order] - mixed).norm()) <= bound and float((straight - as_given).norm()) <= bound


def _first(output: object) -> Any:
    return output[0] if isinstance(output, tuple) and output else output
