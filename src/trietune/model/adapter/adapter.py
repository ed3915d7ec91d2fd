"""LoRA adapters: made on a base model, turned into the two files that PEFT reads, and read back without trust.

    adapter_config.json         rank, scale, which modules, and the base model with its revision
    adapter_model.safetensors   `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, ... and nothing else

The adapter's weights are fp32 over a base in any dtype: an update of 1e-5 on a weight of 1 is lost in bfloat16, which
keeps three digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.directory import FileContent
from trietune.io.name_patterns import PatternError, matching
from trietune.io.safetensors import TensorError, check_names, parse
from trietune.model.adapter.config import CONFIG_FILE, MAX_CONFIG_BYTES, config_for_file, parse_config
from trietune.model.adapter.folder import MAX_WEIGHTS_BYTES, WEIGHTS_FILE, Listed, read_plain_file, read_shapes
from trietune.model.adapter.targets import linear_modules, resolve_targets
from trietune.model.adapter.tensors import copy_into, tensors_to_content
from trietune.model.base.folder import ModelFolder
from trietune.model.module_names import resolve_patterns

_FLOATING_POINT = ("F64", "F32", "F16", "BF16")

Bias = Literal["none", "all", "lora_only"]


def add_adapter(
    network: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    target_parameters: Sequence[str] | Literal["auto"] = "auto",
    use_rslora: bool = False,
    use_dora: bool = False,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | None = None,
    base: ModelFolder,
    seed: int = 0,
) -> PeftModel:
    """Put a new LoRA adapter onto `network`, whose own weights are frozen; what is trained is fp32.

    Args:
        target_modules: `all-linear` (all but the output head), a pattern that matches whole module names, or names
            that module names end with.
        target_parameters: names that parameters end with, for experts that are one tensor; `auto` takes those that
            PEFT finds under `target_modules`, without the routers.
        seed: only for the initialization; the global random state is neither read nor changed.

    Raises:
        UserError: a name matches nothing, a module is of a kind that LoRA cannot wrap, biases are to be trained on a
            base that is not fp32, or a module that is held in 4 bits is to be trained whole.
    """
    if bias != "none" and network.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"`lora_bias: {bias}` trains biases of the base model itself, which are {_name(network.dtype)} here",
            where="in that precision most of their updates would be rounded away",
            next_step="dtype: float32   (or lora_bias: none)",
        )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    _check_matches("lora_target_modules", network, targets)
    saved_whole = _full_names(network, modules_to_save or ())
    _check_not_tied(network, saved_whole)
    _check_not_quantized(network, saved_whole)
    resolved = resolve_targets(network, targets, target_parameters, r=r, alpha=alpha)
    _check_experts_allow(resolved.parameters, dropout=dropout, use_dora=use_dora)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions, its annotation does not
        lora_dropout=dropout,
        target_modules=resolved.modules,
        target_parameters=resolved.parameters or None,
        rank_pattern=resolved.rank_pattern,
        alpha_pattern=resolved.alpha_pattern,
        use_rslora=use_rslora,
        use_dora=use_dora,
        bias=bias,
        modules_to_save=saved_whole or None,
        task_type="CAUSAL_LM",
    )
    return _wrap(network, config, base=base, seed=seed, where="lora_target_modules")


def _check_experts_allow(parameters: Sequence[str], *, dropout: float, use_dora: bool) -> None:
    """PEFT adds an adapter of experts to their weights, so nothing can happen to the adapter's own inputs."""
    for key, is_on, off in (("lora_dropout", dropout > 0, "0"), ("use_dora", use_dora, "False")):
        if parameters and is_on:
            raise UserError(
                f"`{key}` is not possible on experts that are one parameter ({', '.join(parameters)})",
                where=f"PEFT has no `{key}` for them",
                next_step=f"`--set {key}={off}`, or `--set lora_target_parameters=[]` to leave the experts alone",
            )


def _check_not_quantized(network: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if any(not p.is_floating_point() for p in network.get_submodule(name).parameters()):
            raise UserError(
                f"`modules_to_save` would train `{name}` whole, and it is held in 4 bits",
                next_step="remove it from the list (an adapter can be on it), or `--set load_in_4bit=False`",
            )


def adapter_files(peft_model: PeftModel, base: ModelFolder) -> dict[str, FileContent]:
    """The two files of the adapter; equal weights give equal bytes. Weights of many megabytes are taken as written."""
    lora_config = peft_model.peft_config["default"]
    assert isinstance(lora_config, LoraConfig)
    config = config_for_file(lora_config, base_name=base.name, revision=base.revision)
    return {
        CONFIG_FILE: strict_json.serialize(config),
        WEIGHTS_FILE: tensors_to_content(adapter_tensors(peft_model)),
    }


def load_adapter(
    network: PreTrainedModel, folder: Path, *, listed: Listed | None = None, is_trainable: bool = False
) -> PeftModel:
    """Put the adapter in `folder` onto `network`; every tensor of the file has its place, and every place its tensor.

    The weights are read after their header has been found to fit, so an absurd header cannot exhaust memory.

    Args:
        listed: what its files must hold, see `adapter_folder.read_listed`.

    Raises:
        UserError: no adapter there, a configuration that is not LoRA as we know it, tensors missing, unexpected or of
            another shape than this network's, other bytes than those `listed`.
    """
    config = read_plain_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, listed=listed)
    weights = folder / WEIGHTS_FILE

    def read_weights() -> bytes:
        return read_plain_file(folder, WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES, listed=listed)

    try:
        shapes = read_shapes(folder)
    except TensorError as error:
        raise _does_not_fit(str(weights), error) from error
    return _load(network, config, shapes, read_weights, where=str(folder), is_trainable=is_trainable)


def load_adapter_files(
    network: PreTrainedModel, files: Mapping[str, bytes], *, where: str, is_trainable: bool = False
) -> PeftModel:
    """As `load_adapter`, from bytes that have been read and verified already; `where` is named in errors."""
    weights = files[WEIGHTS_FILE]
    try:
        shapes = {name: raw.shape for name, raw in parse(weights)[0].items()}
    except TensorError as error:
        raise _does_not_fit(f"{where}/{WEIGHTS_FILE}", error) from error
    return _load(network, files[CONFIG_FILE], shapes, lambda: weights, where=where, is_trainable=is_trainable)


def _load(
    network: PreTrainedModel,
    config_data: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    read_weights: Callable[[], bytes],
    *,
    where: str,
    is_trainable: bool,
) -> PeftModel:
    config = parse_config(config_data, where=f"{where}/{CONFIG_FILE}")
    _check_ranks(config, shapes, network, where=where)
    # PEFT freezes what is for inference at once, and what is frozen would not be made fp32.
    config.inference_mode = False
    base = ModelFolder(Path(), str(config.base_model_name_or_path or ""), "folder", revision=config.revision)
    peft_model = _wrap(network, config, base=base, seed=0, where=f"{where}/{CONFIG_FILE}")
    weights_place = f"{where}/{WEIGHTS_FILE}"
    _check_shapes(shapes, adapter_tensors(peft_model), where=weights_place)
    set_adapter_tensors(peft_model, read_weights(), where=weights_place)
    peft_model.peft_config["default"].inference_mode = not is_trainable
    if not is_trainable:
        peft_model.requires_grad_(False)
    peft_model.train(is_trainable)
    return peft_model


def adapter_tensors(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained tensors by the names that PEFT writes; views of the live ones."""
    # Left to itself PEFT asks the hub whether the vocabulary has grown, and warns if it cannot tell.
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return state


def set_adapter_tensors(peft_model: PeftModel, data: bytes, *, where: str) -> None:
    """Overwrite the adapter's tensors with those of a safetensors file. Raises `UserError` unless all of them fit."""
    live = adapter_tensors(peft_model)
    try:
        tensors, _ = parse(data)
    except TensorError as error:
        raise _does_not_fit(where, error) from error
    _check_shapes({name: raw.shape for name, raw in tensors.items()}, live, where=where)
    for name, raw in tensors.items():
        if raw.dtype not in _FLOATING_POINT:
            raise _does_not_fit(where, TensorError(f"`{name}` holds {raw.dtype}, not floating-point numbers"))
    with torch.no_grad():
        for name, raw in tensors.items():
            copy_into(live[name], raw)


def overwrite_tensors(live: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Give live tensors the values of others of the same names and shapes."""
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(values[name])


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], live: Mapping[str, torch.Tensor], *, where: str) -> None:
    try:
        check_names(shapes, live)
        for name, shape in shapes.items():
            if shape != tuple(live[name].shape):
                raise TensorError(f"`{name}` has the shape {list(shape)}, this model's has {list(live[name].shape)}")
    except TensorError as error:
        raise _does_not_fit(where, error) from error


def _check_ranks(config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], network: nn.Module, *, where: str) -> None:
    """Compare configuration and file before anything is allocated: a rank of thousands is written in four digits."""
    allowed = {config.r, *(config.rank_pattern or {}).values()}
    if config.target_parameters:  # the matrices of all experts lie under each other
        stacks = {len(p) for p in network.parameters() if p.dim() == 3}
        allowed |= {rank * number for rank in allowed for number in stacks}
    found = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and shape}
    if other := sorted(found - allowed):
        raise UserError(
            f"`{where}/{CONFIG_FILE}` says rank {config.r}, and {WEIGHTS_FILE} holds matrices of rank {other[0]}",
            next_step="take both files from the same place",
        )


def _does_not_fit(where: str, error: TensorError) -> UserError:
    return UserError(
        f"`{where}` does not fit: {error}",
        next_step="load it onto the base model that it was trained on, which adapter_config.json names",
    )


def _wrap(network: PreTrainedModel, config: LoraConfig, *, base: ModelFolder, seed: int, where: str) -> PeftModel:
    # PEFT writes the network's own name here, and warns about any other that it finds.
    config.base_model_name_or_path = None
    resolve_patterns(config, [name for name, _ in network.named_modules() if name], where=where)
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 under a name that the latter is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # It trains and loads; merging it is what fails, and `export` refuses that by comparing logits.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        # A pattern of ranks may mean modules that have no adapter, and was matched against all names.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        # It sets this itself, layer by layer, for GPT-2's kind of linear layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        torch.manual_seed(seed)
        try:
            peft_model: PeftModel = get_peft_model(network, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserError(
                f"the adapter cannot be put onto this model: {str(error).splitlines()[0]}",
                where=where,
                next_step=f"lora_target_modules: names among {', '.join(linear_modules(network))}",
            ) from error
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    _keep_saved_modules_in_fp32(peft_model, network.dtype)
    return peft_model


def _keep_saved_modules_in_fp32(peft_model: PeftModel, base_dtype: torch.dtype) -> None:
    """Let modules that are trained whole compute in fp32 between neighbors that do not."""
    if base_dtype not in (torch.bfloat16, torch.float16):
        return

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[object, ...]:
        return tuple(value.float() if _is_float(value) else value for value in inputs)

    def narrow(module: nn.Module, inputs: tuple[object, ...], output: Any) -> object:
        # A proof computes parts in fp32 for the time of a call, and says so here.
        return output.to(vars(module)["narrows_to"]) if _is_float(output) else output

    for name, module in peft_model.named_modules():
        if name.endswith("modules_to_save.default"):
            vars(module)["narrows_to"] = base_dtype
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _check_matches(key: str, network: nn.Module, targets: str | list[str]) -> None:
    """PEFT takes a list of which one name matches and drops the others without a word."""
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    names = [name for name, _ in network.named_modules() if name]
    patterns = [targets] if isinstance(targets, str) else targets
    for pattern in patterns:
        try:
            matches = (
                bool(matching(pattern, names))
                if isinstance(targets, str)
                else any(name == pattern or name.endswith(f".{pattern}") for name in names)
            )
        except PatternError as error:
            raise UserError(
                f"`{key}: {pattern[:80]}` {error}", next_step=f"{key}: all-linear   (or a list of names)"
            ) from error
        if not matches:
            raise UserError(
                f"`{key}`: nothing in this model is called `{pattern}`",
                where=f"its linear modules are {', '.join(linear_modules(network))}",
                next_step=f"{key}: all-linear" if key == "lora_target_modules" else f"remove the name from `{key}`",
            )


def _full_names(network: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """The modules meant: PEFT would take `norm` for every name that ends in these letters, `input_layernorm` too."""
    _check_matches("modules_to_save", network, list(modules_to_save))
    names = [name for name, _ in network.named_modules()]
    return [name for name in names if any(name == meant or name.endswith(f".{meant}") for meant in modules_to_save)]


def _check_not_tied(network: PreTrainedModel, modules_to_save: Sequence[str]) -> None:
    head: Any = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = network.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    for name, module in network.named_modules():
        if module in (head, embedding) and name in modules_to_save:
            raise UserError(
                f"`modules_to_save` names `{name}`, which shares its weights with another module of this model",
                where="the embedding and the output head are one tensor; a copy of one would separate them",
                next_step="remove it from `modules_to_save`; `lora_target_modules` may name it instead",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
