"""The base model's own randomness: its dropout and the noise of its routers, found and turned off.

Fine-tuning has its own dropout (`lora_dropout`); what the base model was pretrained with is rarely meant, and some
configurations carry it still (GPT-2: 0.1 in three places). The network stays in training mode, which checkpointing
asks for. What is random is found in two ways: rates, wherever modules and configurations keep them, and a trial with
eyes on the random number generator, since some routers draw in training whatever their rates are.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from trietune.errors import UserError
from trietune.model.base.load import quiet_library

# What rates of dropout and of noise are called, in any module.
_WORDS = ("drop", "jitter", "pdrop", "router_noise", "noise_std")
# Names that hold these letters and are not rates.
_NO_RATES = ("first_k_dense_replace", "token_dropping", "drop_tokens")
# Parts of other models of the family: classifiers, and summaries of a whole text.
_OF_OTHER_MODELS = ("classifier", "summary")
_NUM_TOKENS = 8


def rates_of(network: PreTrainedModel) -> dict[str, float]:
    """The rates above 0 that this network would draw with, by the names that its configuration and modules give them.

    Call it before an adapter is put on: an adapter's dropout is not part of the base.
    """
    found: dict[str, float] = {}
    for holder, name, value in _rates(network):
        shown = name if not isinstance(holder, nn.modules.dropout._DropoutNd) else "dropout"
        if shown != "dropout" or value not in found.values():
            found.setdefault(shown, value)
    return found


def rates_in_attention(network: PreTrainedModel) -> dict[str, float]:
    """Of `rates_of`, those that attention weights are dropped with, which a trie has no one draw for."""
    found = {name: value for _, name, value in _rates(network) if "att" in name.lower() and "drop" in name.lower()}
    for name, module in network.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and "att" in last:
            found.setdefault(last, float(module.p))
    return found


def silence_rates(network: PreTrainedModel) -> None:
    """Set every rate of dropout to 0, in modules and in configurations.

    Noise is left to `silence_draws`: PhiMoE's router compares scores with its rate in evaluation, too.
    """
    for holder, name, _ in list(_rates(network)):
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
        elif "drop" in name.lower():
            setattr(holder, name, 0.0)


def silence_draws(network: PreTrainedModel) -> list[str]:
    """Keep modules that still draw random numbers in training in evaluation mode, for good; returns their names.

    Tried on a few tokens; the global random state is not changed. Call it with weights, before an adapter is put on.
    A model that cannot be run on so few tokens is left as it is.

    Raises:
        UserError: something keeps drawing.
    """
    kept: dict[str, None] = {}
    for _ in range(4):
        try:
            drawing = find_draws(network)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return list(kept)
        new = [name for name in drawing if name not in kept]
        if not drawing:
            return list(kept)
        if not new:
            break
        for name in new:
            kept[name] = None
            _stay_in_evaluation(network.get_submodule(name))
    raise UserError(
        f"`{network.config.model_type}` draws random numbers while it trains, and they cannot be turned off",
        where=f"in `{drawing[0] or type(network).__name__}`",
        next_step="`--set base_dropout=True` trains with them; please report the family",
    )


def find_draws(network: PreTrainedModel) -> list[str]:
    """Modules in whose own code, their parts' left out, the random state moves in training mode."""
    watch = _Watch(network.device)
    modes = {module: module.training for module in network.modules()}
    devices = [network.device] if network.device.type == "cuda" else []
    tokens = torch.arange(_NUM_TOKENS, device=network.device)[None] + 3
    network.train()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet_library(), ExitStack() as stack:
            for name, module in network.named_modules():
                stack.callback(module.register_forward_pre_hook(watch.entering(name)).remove)
                stack.callback(module.register_forward_hook(watch.leaving).remove)
            watch.begin()
            network(input_ids=tokens, use_cache=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return list(watch.drawing)


class _Watch:
    """Looks at the random state whenever a module begins or ends; what moved it was the module in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside: list[str] = []
        self.drawing: dict[str, None] = {}
        self._state = self._now()

    def begin(self) -> None:
        self._state = self._now()

    def entering(self, name: str) -> object:
        def hook(module: nn.Module, inputs: object) -> None:
            self._look()
            self._inside.append(name)

        return hook

    def leaving(self, module: nn.Module, inputs: object, output: object) -> None:
        self._look()
        self._inside.pop()

    def _look(self) -> None:
        state = self._now()
        if not torch.equal(state, self._state) and self._inside:
            self.drawing[self._inside[-1]] = None
        self._state = state

    def _now(self) -> torch.Tensor:
        state = torch.random.get_rng_state()
        return torch.cat([state, torch.cuda.get_rng_state(self._device)]) if self._device.type == "cuda" else state


def _stay_in_evaluation(module: nn.Module) -> None:
    """Only of this module's own code: its parts, which may be adapted and have dropout, change modes as ever."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        for child in self.children():
            child.train(mode)
        self.training = False
        return self

    module.train = types.MethodType(train, module)  # type: ignore[method-assign]
    module.training = False


def _rates(network: PreTrainedModel) -> Iterator[tuple[object, str, float]]:
    """Who holds a rate above 0, what it is called there, and the rate; each holder once."""
    seen: set[int] = set()
    configs = [network.config]
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                yield module, "p", float(module.p)
            continue
        for name, value in _numbers(module):
            yield module, name, value
        if (config := vars(module).get("config")) is not None:
            configs.append(config)
    while configs:
        config = configs.pop(0)
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        for name, value in _numbers(config):
            yield config, name, value
        configs += [value for name, value in vars(config).items() if name.endswith("config") and value is not None]


def _numbers(holder: object) -> list[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in vars(holder).items()
        if isinstance(value, float)
        and 0 < value <= 1
        and name not in _NO_RATES
        and not name.startswith(_OF_OTHER_MODELS)
        and any(word in name.lower() for word in _WORDS)
    ]
