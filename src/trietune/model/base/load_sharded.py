"""A base model of which each process holds a part: the decoder's layers are sharded by FSDP2, the rest is whole.

    process 0    embedding | rows 0.. of each weight of all layers | norm, head
    process 1    embedding | the other rows                        | norm, head

A layer is gathered when it is computed and let go afterwards. Embedding, head (often the embedding's own tensor) and
the last norm are used outside of the layers. Adapters are put on afterwards and are plain tensors, whole in each
process, so their gradients, optimizer and files are those of a model that is not sharded. Each process reads its own
rows from disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, PreTrainedModel

from trietune.errors import UserError
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import auto_class, check_config, check_loaded, quiet_library
from trietune.model.decoder_layers import decoder_of

WHOLE = "`--set parallelism_strategy=data_parallel` holds it whole in each process"


def load_sharded(
    folder: ModelFolder,
    *,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """The causal language model of `folder` in evaluation mode, its decoder layers sharded over all processes.

    Every process calls this; `torch.distributed` is set up.

    Raises:
        UserError: as `load_network` does, and for a family whose files transformers converts when it loads them.
    """
    check_config(folder)
    config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    with quiet_library(), torch.device("meta"):
        network = auto_class(config.model_type).from_config(config, dtype=dtype, trust_remote_code=False)
    network.requires_grad_(False)
    _shard(network, device)
    network.to_empty(device=device)
    network.tie_weights()
    with torch.no_grad():
        _read_weights(folder, network, report)
        _fill_buffers(folder, network, config, dtype)
    network.train(False)
    return network  # type: ignore[no-any-return]  # transformers is untyped


def gathering(network: nn.Module) -> Callable[[nn.Module], AbstractContextManager[object]]:
    """A context for any module of a sharded network, in which its weights are whole; every process enters it."""
    layer_of = {
        id(module): layer for layer in network.modules() if isinstance(layer, FSDPModule) for module in layer.modules()
    }

    @contextmanager
    def whole(module: nn.Module) -> Iterator[None]:
        # The innermost one: the decoder, which holds all layers, comes before them.
        layer = layer_of.get(id(module))
        if layer is None:
            yield
            return
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    return whole


def _shard(network: Any, device: torch.device) -> None:
    """Each decoder layer is one group, and the decoder their root, so that gathers are done ahead."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    decoder = decoder_of(network)
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in network.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=rest, reshard_after_forward=False)


def _read_weights(folder: ModelFolder, network: Any, report: Callable[[str], None]) -> None:
    parameters = dict(network.named_parameters())
    read: set[str] = set()
    unexpected: list[str] = []
    mismatched: list[tuple[str, object, object]] = []
    tied = set(network.state_dict(keep_vars=True)) - set(parameters)
    for file in sorted(folder.path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    source = opened.get_slice(name)
                    parameter = parameters.get(name)
                    if parameter is None:
                        unexpected += [] if name in tied else [name]
                    elif tuple(source.get_shape()) != tuple(parameter.shape):
                        mismatched.append((name, source.get_shape(), parameter.shape))
                    else:
                        _read_own_rows(parameter, source)
                        read.add(name)
        except SafetensorError as error:
            raise UserError(
                f"the weights of `{folder.name}` are damaged: {error}",
                where=str(file),
                next_step="download or copy them again",
            ) from error
    missing = sorted(set(parameters) - read)
    if missing and unexpected:
        raise UserError(
            f"the weights of `{folder.name}` have other names in its files than in the model, so they cannot be read "
            "in parts",
            where=f"the first is `{missing[0]}`",
            next_step=WHOLE,
        )
    check_loaded(
        folder, {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": unexpected}, report
    )


def _read_own_rows(parameter: Tensor, source: Any) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(source[:])
        return
    own = parameter.to_local()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if own.numel():
        own.copy_(source[offset[0] : offset[0] + len(own)])


def _fill_buffers(folder: ModelFolder, network: Any, config: Any, dtype: torch.dtype) -> None:
    """Buffers that no file holds, from a network of one layer of each kind that is made again."""
    if not any(True for _ in network.buffers()):
        return
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    text.num_hidden_layers = max(len(kinds), 1)
    if kinds:
        text.layer_types = kinds
    with quiet_library():
        whole = auto_class(config.model_type).from_config(small, dtype=dtype, trust_remote_code=False)
    made = dict(whole.named_buffers())
    for name, buffer in network.named_buffers():
        if name not in made or made[name].shape != buffer.shape:
            raise UserError(
                f"`{folder.name}` cannot be sharded: `{name}` is in none of its files",
                next_step=WHOLE,
            )
        buffer.copy_(made[name])
