"""Begin with an adapter that has been trained already."""

from __future__ import annotations

import hashlib
from pathlib import Path

from peft import LoraConfig, PeftModel

from trietune.errors import UserError
from trietune.io.json_types import JsonObject
from trietune.io.safetensors import TensorError
from trietune.model.adapter.adapter import set_adapter_tensors
from trietune.model.adapter.config import CONFIG_FILE, MAX_CONFIG_BYTES, parse_config
from trietune.model.adapter.folder import WEIGHTS_FILE, read_plain_file, read_shapes

# Of an adapter's configuration, the keys of a run that must agree with it.
_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "bias": "lora_bias",
}


def keys_of(folder: Path) -> JsonObject:
    """The keys of a run that the adapter in `folder` was trained with: rank, scale, and what it is on.

    Raises:
        UserError: it cannot be read.
    """
    config = parse_config(read_plain_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES), where=str(folder))
    found: JsonObject = {key: getattr(config, name) for name, key in _KEYS.items()}
    found["modules_to_save"] = tuple(config.modules_to_save or ())
    targets = config.target_modules
    if config.exclude_modules or config.layers_to_transform is not None:
        # No key says which modules are left out: these are those that are in.
        targets = _modules_of(folder)
    if targets:
        found["lora_target_modules"] = targets if isinstance(targets, str) else tuple(sorted(targets))
    if config.target_parameters:
        found["lora_target_parameters"] = tuple(config.target_parameters)
    return found


def _modules_of(folder: Path) -> list[str]:
    """Whole names of the modules that an adapter's tensors are on."""
    try:
        names = read_shapes(folder)
    except TensorError as error:
        raise UserError(f"`{folder / WEIGHTS_FILE}` cannot be read: {error}") from error
    whole = (name.removeprefix("base_model.model.").split(".lora_")[0] for name in names if ".lora_" in name)
    return list(dict.fromkeys(whole))


def start_from(peft_model: PeftModel, folder: Path) -> None:
    """Give the new adapter on a model the weights of the one in `folder`.

    Raises:
        UserError: it is of another rank or scale than the run's, sits on other layers, or cannot be read.
    """
    config = parse_config(read_plain_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES), where=str(folder))
    live = peft_model.peft_config["default"]
    assert isinstance(live, LoraConfig)
    different = [
        (key, getattr(config, name), getattr(live, name))
        for name, key in _KEYS.items()
        if getattr(config, name) != getattr(live, name)
    ]
    if different:
        raise UserError(
            f"the adapter in `{folder}` does not have the shape of this run's: "
            + ", ".join(f"`{key}` is {theirs} there and {ours} here" for key, theirs, ours in different),
            next_step="write what it was trained with: "
            + " ".join(f"`--set {key}={theirs}`" for key, theirs, _ in different),
        )
    if config.rank_pattern or config.alpha_pattern:
        raise UserError(
            f"the adapter in `{folder}` has ranks or scales of their own for some layers",
            where=f"`rank_pattern` or `alpha_pattern` in {folder / CONFIG_FILE}",
            next_step="start from an adapter whose layers have one rank",
        )
    set_adapter_tensors(peft_model, (folder / WEIGHTS_FILE).read_bytes(), where=str(folder / WEIGHTS_FILE))


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's two files. Raises `UserError` if one cannot be read."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(
                f"`{folder / name}` cannot be read: {error.strerror or error}",
                next_step="give a run's folder or an adapter's, such as runs/NAME or runs/NAME/adapter",
            ) from None
    return digest.hexdigest()
