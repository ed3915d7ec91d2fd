"""Prove, before a run trains, that plain PEFT makes the same model of the files that the run will write.

    base  --twin: the same tensors, once in memory-->  plain PEFT reads the two files  -->  logits of 16 tokens
    base + adapter of the run                                                          -->  the same logits

A configuration that leaves out where an adapter belongs loads without an error and computes something else, so nothing
short of loading it tells. The adapter's weights are random while it is tried: at its start an adapter changes nothing.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from trietune.errors import UserError
from trietune.io.directory import FileContent
from trietune.model.adapter.adapter import adapter_tensors
from trietune.model.base.load import quiet_library

NUM_TOKENS = 16
# Differences of logits, as a part of what the adapter changes in them. Both sides run the same code on the same
# numbers; modules trained whole are fp32 in a run and of the base's dtype in plain PEFT.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# Of the logits' own size: below this an adapter has changed nothing that could be compared.
LEAST_EFFECT = 0.02
_SEED = 17


def twin_of(network: PreTrainedModel) -> PreTrainedModel:
    """A second network of the same modules over the same tensors, which are frozen there.

    Call it before an adapter or other functions are put onto `network`: both would be in the copy.
    """
    shared: dict[int, object] = {}
    for parameter in network.parameters():
        # Weights in 4 bits carry what they were packed with, and are never trained.
        is_plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if is_plain else parameter
    shared |= {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, shared)


def check_reread(
    peft_model: PeftModel, twin: PreTrainedModel, make_files: Callable[[PeftModel], Mapping[str, FileContent]]
) -> float:
    """Raise `UserError` unless plain PEFT, on `twin`, gives the logits of `peft_model` from the files of `make_files`.

    The adapter is as before afterwards, bit for bit; `twin` is used up. Returns the largest difference of logits, as a
    part of the largest change that the adapter makes.
    """
    network: Any = peft_model.get_base_model()
    tokens = _tokens(network)
    plain = _logits(twin.train(False), tokens)
    was_training = {module: module.training for module in peft_model.modules()}
    peft_model.eval()
    try:
        with _random_adapter(peft_model, network.dtype) as scale_up:
            expected = _logits(peft_model, tokens)
            while (effect := _size(expected - plain)) < LEAST_EFFECT * _size(plain) and scale_up():
                expected = _logits(peft_model, tokens)
            live = adapter_tensors(peft_model)
            written = {name: tensor.detach().clone() for name, tensor in live.items()}
            reread, said = _reread(twin, make_files(peft_model))
            found = _logits(reread, tokens)
            _check_tensors(reread, written, said)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    difference = _size(found - expected) / max(effect, 1e-30)
    tolerance = TOLERANCES.get(network.dtype, 5e-2)
    if not (difference <= tolerance and effect > 0):
        raise _unusable(
            f"its logits differ from the trained model's by {difference:.0%} of what the adapter changes"
            if effect > 0
            else "the adapter changes no logit, whatever its weights are"
        )
    return difference


def _tokens(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    embedding: Any = network.get_input_embeddings()
    count = int(getattr(network.config.get_text_config(), "vocab_size", 0) or len(embedding.weight))
    return torch.randint(count, (1, NUM_TOKENS), generator=generator).to(embedding.weight.device)


def _logits(network: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), quiet_library():
        logits: Tensor = network(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max())


@contextmanager
def _random_adapter(peft_model: PeftModel, dtype: torch.dtype) -> Any:
    """Random numbers instead of the trained tensors, whose own are put back; gives a function that makes them larger.

    Biases of the base are left: the twin holds the same ones.
    """
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad and "lora_" in n}
    trained |= {n: p for n, p in peft_model.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    generator = torch.Generator().manual_seed(_SEED)
    noise = {name: torch.randn(parameter.shape, generator=generator) for name, parameter in trained.items()}
    strength = 0.05

    def fill() -> None:
        with torch.no_grad():
            for name, parameter in trained.items():
                drawn = noise[name].to(parameter.device, parameter.dtype)
                if "lora_" not in name:
                    parameter.copy_(kept[name] * (1 + 0.1 * drawn))
                elif "lora_magnitude_vector" in name:
                    parameter.copy_(kept[name] * (1 + strength * drawn))
                elif "lora_B" in name or "lora_embedding_B" in name:
                    parameter.copy_(strength * drawn)

    def scale_up() -> bool:
        nonlocal strength
        strength *= 4
        fill()
        return strength < 100

    fill()
    try:
        yield scale_up
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(kept[name])


def _reread(twin: PreTrainedModel, files: Mapping[str, FileContent]) -> tuple[PeftModel, list[str]]:
    """What plain PEFT makes of the files, and what it warned of."""
    devices = [twin.device] if twin.device.type == "cuda" else []
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=devices), quiet_library():
            for name, content in files.items():
                _write(Path(folder) / name, content)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                reread = PeftModel.from_pretrained(twin, folder, torch_device=str(twin.device))
    except OSError as error:
        raise UserError(
            f"the adapter's files could not be tried: {error}",
            where=f"in {tempfile.gettempdir()}",
            next_step="make room there, or name another folder in TMPDIR",
        ) from error
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return reread.eval(), [str(one.message) for one in caught]


def _write(path: Path, content: FileContent) -> None:
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            for part in content.pieces():
                file.write(part)


def _check_tensors(reread: PeftModel, written: Mapping[str, Tensor], said: list[str]) -> None:
    """Every tensor of the file is in its place, with its numbers."""
    there = get_peft_model_state_dict(reread, save_embedding_layers=False)
    if missing := sorted(set(written) ^ set(there)):
        notes = [note for note in said if "adapter keys" in note]
        raise _unusable(f"`{missing[0]}` has no place" + (f" ({notes[0][:120]})" if notes else ""))
    for name, tensor in written.items():
        if not torch.equal(there[name].to(tensor.dtype), tensor.to(there[name].dtype).to(tensor.dtype)):
            raise _unusable(f"`{name}` has other numbers there")


def _unusable(what: str) -> UserError:
    return UserError(
        f"plain PEFT would not read this run's adapter as the model that was trained: {what}",
        where="tried before the first step, with random weights in the adapter; nothing was kept",
        next_step="adapt fewer kinds of layers, such as `--set lora_target_modules=q_proj,v_proj --set "
        "lora_target_parameters=[]`, and please report the family",
    )
