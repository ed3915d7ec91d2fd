"""Which weights get an adapter: `lora_target_modules` and `lora_target_parameters` against one network.

    model.layers.0.self_attn.q_proj           a linear layer, adapted as a module
    model.layers.0.mlp.experts.gate_up_proj   all experts in one parameter [E, out, in], adapted as a parameter
    model.layers.0.mlp.gate                   a router, which chooses experts: left out unless it is named

PEFT reads `all-linear` differently in different families: in some it adapts the experts and the router and drops dense
layers and shared experts without a word, in others it leaves the experts alone. So the names are worked out here, once,
and what stays without an adapter is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trietune.errors import UserError
from trietune.model.decoder_layers import decoder_of

ALL_LINEAR = "all-linear"
# Groups of weights without an adapter that are named: each at least this part of the layers' weights.
SMALLEST_NAMED = 0.01


@dataclass(frozen=True, slots=True)
class Targets:
    """What to hand to PEFT.

    Attributes:
        modules: `LoraConfig.target_modules`.
        parameters: `LoraConfig.target_parameters`.
        rank_pattern, alpha_pattern: what PEFT gives to weights that hold two layers in one.
    """

    modules: str | list[str]
    parameters: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def resolve_targets(
    network: PreTrainedModel,
    modules: str | Sequence[str],
    parameters: Sequence[str] | Literal["auto"],
    *,
    r: int,
    alpha: float,
) -> Targets:
    """The names that PEFT is given.

    Args:
        parameters: names that end in these; `auto` takes the experts where PEFT maps `modules` to them.

    Raises:
        UserError: a parameter that is not there or no stack of matrices, or a module that cannot carry an adapter.
    """
    given = modules if isinstance(modules, str) else list(modules)
    towers = names_of_towers(network)
    is_all = isinstance(given, str) and given.lower() == ALL_LINEAR
    routers = find_routers(network)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=given, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    try:
        convert_peft_config_for_transformers(config, model=network, conversions=None)
    except ValueError as error:
        raise UserError(
            f"the adapter cannot be put onto this model: {str(error).splitlines()[0]}",
            where="lora_target_modules",
            next_step="name all of them, or `lora_target_modules: all-linear`",
        ) from error
    is_mapped = bool(config.target_parameters)
    if parameters == "auto":
        found = sorted(config.target_parameters or ())
        if is_all:
            found = [name for name in found if not _is_router_weight(name, network, routers)]
    else:
        found = list(parameters)
        _check_parameters(network, found)
    kept_patterns = is_mapped and parameters == "auto"
    ranks = {**(config.rank_pattern or {})} if kept_patterns else {}
    alphas = {**(config.alpha_pattern or {})} if kept_patterns else {}
    if not is_all:
        named: Any = config.target_modules if is_mapped else given
        if towers:
            named = _in_the_decoder(network, named, towers)
        _check_can_be_wrapped(network, named)
        # A name that means experts here is a module's name elsewhere: PEFT must not be given it a second time.
        listed = sorted(named) if isinstance(named, set) else named
        return Targets(listed, found, ranks, alphas)
    mapped = config.target_modules if is_mapped else None
    chosen = []
    for name, module in _linear(network):
        if name in routers or is_within(name, towers) or not _is_allowed(network, name):
            continue
        if _gives_one_tensor(module) and (mapped is None or name.rpartition(".")[2] in mapped or name in mapped):
            chosen.append(name)
    everything = [name for name, _ in _linear(network)]
    if towers:
        found = _only_in_the_decoder(network, found, towers)
    names: str | list[str] = ALL_LINEAR if chosen == everything and not is_mapped else chosen
    return Targets(names, found, ranks, alphas)


def names_of_towers(network: Any) -> tuple[str, ...]:
    """Names of the modules that a network has beside its decoder and its head; none where text is all that it takes.

    Towers for images or sounds compute nothing of text, so an adapter on them would never train.
    """
    if network.config.get_text_config() is network.config:
        return ()
    decoder, head = decoder_of(network), network.get_output_embeddings()
    own = {id(module) for module in decoder.modules()} | ({id(head)} if head is not None else set())
    around = {name for name, module in network.named_modules() if module is decoder or module is head}
    outside: list[str] = []
    for name, module in network.named_modules():
        holds = not name or any(is_within(other, (name,)) for other in around)
        if id(module) not in own and not holds and not is_within(name, outside):
            outside.append(name)
    return tuple(outside)


def is_within(name: str, outer: Sequence[str]) -> bool:
    """Whether `name` is one of the modules `outer`, or lies in one."""
    return any(name == one or name.startswith(f"{one}.") for one in outer)


def _in_the_decoder(network: nn.Module, named: object, towers: tuple[str, ...]) -> list[str]:
    """Full names of what `named` means outside the towers: the same words name parts of both."""
    meant = [name for name, _ in network.named_modules() if name and _is_meant(name, named)]
    found = [name for name in meant if not is_within(name, towers)]
    if not found and meant:
        raise UserError(
            f"`lora_target_modules` names parts of the model that text does not pass, such as `{meant[0]}`",
            where="an adapter there would never train",
            next_step="lora_target_modules: all-linear, which is the text decoder's",
        )
    return found or (named if isinstance(named, list) else [named])


def _only_in_the_decoder(network: nn.Module, parameters: list[str], towers: tuple[str, ...]) -> list[str]:
    names = [name for name, _ in network.named_parameters()]
    meant = [name for name in names if any(name == one or name.endswith(f".{one}") for one in parameters)]
    return [name for name in meant if not is_within(name, towers)] if len(meant) else parameters


def find_routers(network: nn.Module) -> list[str]:
    """Modules that choose experts: beside a stack of E experts, they have one output for each.

    Found by shapes: a weight [E, in] outside the experts, within the module that holds them.
    """
    found: dict[str, None] = {}
    for block_name, experts_name, num_experts in _blocks(network):
        block = network.get_submodule(block_name)
        for name, parameter in block.named_parameters():
            full = f"{block_name}.{name}" if block_name else name
            if full.startswith(f"{experts_name}.") or parameter.dim() != 2 or parameter.shape[0] != num_experts:
                continue
            found[full.rpartition(".")[0]] = None
    return list(found)


def _blocks(network: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(the module that holds experts, the experts, how many there are): experts in one tensor, or in a list."""
    for full_name, module in network.named_modules():
        name = full_name.replace(".base_layer", "")
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if is_experts(module) and stacked:
            yield name.rpartition(".")[0], name, len(stacked[0])
        elif isinstance(module, nn.ModuleList) and len(module) > 1 and name.rpartition(".")[2] == "experts":
            yield name.rpartition(".")[0], name, len(module)


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds matrices of several experts in one parameter, each product chosen by a router.

    Told from convolutions and from gates by heads: transformers marks such modules with how their matrices lie, or
    calls them by a count of experts.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    marks = ("is_transposed", "has_gate", "num_experts")
    return any(mark in vars(module) or hasattr(type(module), mark) for mark in marks)


def linear_modules(network: nn.Module) -> list[str]:
    """What the modules that LoRA can wrap are called, each name once, without the path of its layer."""
    return sorted({name.rpartition(".")[2] for name, module in network.named_modules() if _is_linear(module)})


def expert_parameters(network: nn.Module) -> list[str]:
    """Last names of the parameters that hold all experts in one, each once."""
    return sorted(
        {
            name
            for module in network.modules()
            if is_experts(module)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        }
    )


def _linear(network: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer but the output head."""
    head: object = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, module in network.named_modules():
        if _is_linear(module) and module is not head:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_allowed(network: nn.Module, name: str) -> bool:
    """Whether PEFT puts adapters on modules of this name: in Mamba, kernels read the weights of some and pass by."""
    check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return True
    try:
        check(LoraConfig(), network, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _gives_one_tensor(module: nn.Module) -> bool:
    """Whether the layer's forward gives only the product: routers of some families are linear layers that give more.

    Tried on a copy without weights, so that a class of any name is understood.
    """
    if type(module) in (nn.Linear, Conv1D) or type(module).__module__.partition(".")[0] != "transformers":
        return True
    copied: Any = type(module).__new__(type(module))
    copied.__dict__.update({k: v for k, v in vars(module).items() if k != "_parameters"})
    copied._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    weight = copied._parameters["weight"]
    try:
        output = copied(torch.empty(2, weight.shape[1], dtype=weight.dtype, device="meta"))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return False
    return isinstance(output, torch.Tensor) and tuple(output.shape) == (2, weight.shape[0])


def _is_router_weight(target: str, network: nn.Module, routers: Sequence[str]) -> bool:
    """Whether a name of PEFT's ends only the weights of routers."""
    met = [name for name, _ in network.named_parameters() if name == target or name.endswith(f".{target}")]
    return all(name.rpartition(".")[0] in routers for name in met)


def _check_parameters(network: nn.Module, names: Sequence[str]) -> None:
    for target in names:
        met = [(n, p) for n, p in network.named_parameters() if n == target or n.endswith(f".{target}")]
        if not met:
            experts = expert_parameters(network)
            raise UserError(
                f"`lora_target_parameters`: no parameter of this model is called `{target}`",
                where=f"its experts are {', '.join(experts)}" if experts else "it has no experts in one parameter",
                next_step=f"lora_target_parameters: [{', '.join(experts)}]" if experts else "remove the key",
            )
        for name, parameter in met:
            owner = network.get_submodule(name.rpartition(".")[0])
            if parameter.dim() not in (2, 3) or isinstance(owner, nn.modules.conv._ConvNd | nn.Embedding):
                raise UserError(
                    f"`lora_target_parameters`: `{name}` is not a matrix, nor a stack of them, of a linear layer",
                    where=f"its shape is {list(parameter.shape)}",
                    next_step="name the experts, such as `gate_up_proj` and `down_proj`",
                )


def _check_can_be_wrapped(network: nn.Module, named: object) -> None:
    for name, module in network.named_modules():
        if not _is_linear(module) or not _is_meant(name, named) or _gives_one_tensor(module):
            continue
        raise UserError(
            f"`lora_target_modules` names `{name}`, which cannot carry an adapter",
            where=f"a `{type(module).__name__}` gives more than the product of its weight: it chooses experts",
            next_step="lora_target_modules: all-linear, which leaves it out",
        )


def _is_meant(name: str, named: Any) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in named or ())


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which of the layers' weights carry adapters; embeddings and the output head are not counted.

    Attributes:
        num_weights: in matrices of the layers.
        num_adapted: how many of these are in matrices with an adapter or trained whole.
        without: share of `num_weights` by group without an adapter, `mlp.experts.gate_up_proj` and the like, the
            largest first; routers are not among them.
        routers: the routers' groups without an adapter.
    """

    num_weights: int
    num_adapted: int
    without: tuple[tuple[str, float], ...]
    routers: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.num_adapted / max(self.num_weights, 1)


def measure_coverage(network: nn.Module) -> Coverage:
    """Count a network whose adapter is in place."""
    adapted: set[int] = set()
    for module in network.modules():
        if isinstance(module, ParamWrapper):
            adapted.add(id(module.get_param()))  # type: ignore[no-untyped-call]
        elif isinstance(module, LoraLayer) and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            adapted.add(id(weight))
    outside = _outside_layers(network)
    outside |= {id(p) for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    routers = {name.replace(".base_layer", "") for name in find_routers(network)}
    num_weights = num_adapted = 0
    without: Counter[str] = Counter()
    left_out: dict[str, None] = {}
    seen: set[int] = set()
    for name, parameter in network.named_parameters():
        plain = name.replace(".base_layer", "")
        is_own = ".lora_" in name or ".modules_to_save." in name or name.endswith("bias")
        if parameter.dim() < 2 or is_own or id(parameter) in seen or id(parameter) in outside:
            continue
        seen.add(id(parameter))
        num_weights += parameter.numel()
        if id(parameter) in adapted or ".original_module" in name:
            num_adapted += parameter.numel()
        elif plain.rpartition(".")[0] in routers:
            left_out[_group(plain)] = None
        else:
            without[_group(plain)] += parameter.numel()
    shares = tuple((name, count / max(num_weights, 1)) for name, count in without.most_common())
    return Coverage(num_weights, num_adapted, shares, tuple(left_out))


def _outside_layers(network: nn.Module) -> set[int]:
    """Embeddings of any kind and the output head."""
    found = {id(p) for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head: object = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    if isinstance(network, PreTrainedModel) and (towers := names_of_towers(network)):
        found |= {id(p) for name, p in network.named_parameters() if is_within(name, towers)}
    return found | ({id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set())


def _group(name: str) -> str:
    """`model.layers.3.mlp.experts.7.w1.weight` -> `mlp.experts.w1`."""
    after = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+(?=\.|$)", "", after).removesuffix(".weight")
