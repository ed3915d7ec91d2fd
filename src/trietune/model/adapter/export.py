"""Hand a trained adapter over: as the folder that PEFT and its friends load, or merged into its base model.

Merging is done in fp32, whatever the base was held in, and proved: the logits of the merged model are compared with
those of base and adapter, in fp32 and in the dtype that is saved.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.adapter_place import adapter_in
from trietune.io.directory import DamagedDirectory, read_manifest
from trietune.io.run_folders import checkpoints_in, nearest_runs, next_of_stopped, which_run
from trietune.io.safetensors import RawTensor, from_numpy, parse, serialize
from trietune.io.whole_folder import whole_folder
from trietune.model.adapter.adapter import load_adapter_files
from trietune.model.adapter.card import merged_card
from trietune.model.adapter.config import CONFIG_FILE, MAX_CONFIG_BYTES, config_for_file, parse_config
from trietune.model.adapter.folder import (
    CHAT_FILE,
    CHECKED_FILES,
    MAX_TEXT_BYTES,
    PROMPT_FILE,
    WEIGHTS_FILE,
    copied_file,
    read_adapter,
    read_listed,
    read_plain_file,
)
from trietune.model.adapter.portable import write_portable
from trietune.model.base.folder import TOKENIZER_FILES, ModelFolder
from trietune.model.base.load import load_network, quiet_library
from trietune.model.base.locate import locate_model

Report = Callable[[str], None]

# What belongs to an adapter beside its two files, where it is there.
_COMPANIONS = (PROMPT_FILE, CHAT_FILE, "README.md")
_COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
# fp32 keeps 24 bits; a product of a few thousand terms through some dozen layers leaves about five digits of logits.
_MERGE_TOLERANCE = 1e-3
_NUM_CHECKED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and by how much the merged model's logits differ from base and adapter, by dtype."""

    folder: Path
    num_bytes: int
    logit_differences: Mapping[str, float]


def find_adapter(path: Path) -> Path:
    """The adapter's folder: `path` itself, or `adapter/` in a run. Raises `UserError` if there is none."""
    if (found := adapter_in(path)) is not None:
        return found
    raise UserError(
        f"`{path}` holds no adapter" if path.exists() else f"`{path}` does not exist",
        where=f"looked for {CONFIG_FILE} there and in its `adapter` folder",
        next_step=_instead_of(path),
    )


def _instead_of(path: Path) -> str:
    """A checkpoint of a run that has no adapter yet, a run with a name that is near, or where adapters are."""
    if checkpoints_in(path):
        return next_of_stopped(path)
    near = nearest_runs(path)
    if near and not path.exists():
        return which_run(path)
    return "give a run's folder or an adapter's, such as runs/NAME or runs/NAME/adapter"


def base_name_of(adapter: Path) -> str:
    """What to give to `locate_model` for the base of this adapter, with its revision. Raises `UserError`."""
    data = read_plain_file(adapter, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, listed=read_listed(adapter))
    config = parse_config(data, where=str(adapter / CONFIG_FILE))
    if not config.base_model_name_or_path:
        raise UserError(
            f"`{adapter / CONFIG_FILE}` does not say which base model the adapter belongs to",
            next_step="write it there as `base_model_name_or_path`",
        )
    revision = f"@{config.revision}" if config.revision else ""
    return f"{config.base_model_name_or_path}{revision}"


def export_adapter(
    adapter: Path,
    out: Path,
    *,
    merge: bool = False,
    plain: bool = False,
    base: ModelFolder | None = None,
    report: Report = lambda text: None,
) -> Exported:
    """Write the adapter of the folder or run `adapter` to the new folder `out`, whole or not at all.

    Args:
        merge: write a whole model, in the dtype of the base's own weights; it needs the base.
        plain: fold the scale into the weights (`lora_alpha` = `r`, no rsLoRA), for programs that ignore either.
        base: where the base model is; by default it is located by the name in the adapter's configuration.

    Raises:
        UserError: no adapter, one that is not as its manifest says, `out` is taken, an adapter that cannot be folded, a
            full disk, or a merge that would change the model.
    """
    folder = find_adapter(adapter)
    listed = read_listed(folder, report)
    files = read_adapter(folder, listed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`{out}` exists already", next_step="choose another name, or remove it first")
    parse_config(files[CONFIG_FILE], where=str(folder / CONFIG_FILE))
    companions = {
        name: read_plain_file(folder, name, max_bytes=MAX_TEXT_BYTES, listed=listed if name in CHECKED_FILES else None)
        for name in _COMPANIONS
        if os.path.lexists(folder / name)
    }
    companions |= _chat_template_of(companions, where=folder)
    if merge:
        base = base or locate_model(base_name_of(folder), report=report)
        if "README.md" in companions:
            companions["README.md"] = merged_card(companions["README.md"].decode(errors="replace")).encode()
        was_in_4bit = _was_trained_in_4bit(folder)
        return _write_merged(files, companions, base, out, where=str(folder), was_in_4bit=was_in_4bit, report=report)
    if plain:
        files = fold_scale(files, where=str(folder))
    return _write_files({**companions, **files}, out)


def _chat_template_of(companions: Mapping[str, bytes], *, where: Path) -> dict[str, bytes]:
    """The chat template of training, for programs that know nothing of `prompt_format.json`; empty without one."""
    try:
        own = strict_json.parse(companions["prompt_format.json"])
        # Of several data sets, only one may have had conversations.
        templates = [one.get("chat_template") for one in (own, *own.get("others", ()))]
    except KeyError:
        return {}
    except (strict_json.NotStrict, AttributeError, TypeError) as error:
        raise UserError(
            f"`{where / 'prompt_format.json'}` is not what TrieTune writes beside an adapter: {error}",
            next_step="take the adapter folder again from the run that made it",
        ) from None
    template = next((one for one in templates if isinstance(one, str) and one), None)
    return {} if template is None else {CHAT_FILE: template.encode()}


def fold_scale(files: Mapping[str, bytes], *, where: str) -> dict[str, bytes]:
    """The same adapter with its scale inside `lora_B`, so that a reader who takes `alpha / r` for 1 is right.

    Raises:
        UserError: DoRA, modules trained whole, biases, or ranks that differ by module: not only LoRA.
    """
    config = parse_config(files[CONFIG_FILE], where=f"{where}/{CONFIG_FILE}")
    obstacles = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "bias": config.bias != "none",
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    if present := [name for name, is_there in obstacles.items() if is_there]:
        raise UserError(
            f"`{where}` cannot be made plain: it has `{present[0]}`, which is more than two matrices per module",
            next_step="trietune export ADAPTER OUT --merge",
        )
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    tensors, metadata = parse(files[WEIGHTS_FILE])
    folded = {
        name: _scaled(tensor, scale) if "lora_B" in name or "lora_embedding_B" in name else tensor
        for name, tensor in tensors.items()
    }
    config.lora_alpha, config.use_rslora = config.r, False
    document = config_for_file(config, base_name=config.base_model_name_or_path or "", revision=config.revision)
    return {CONFIG_FILE: strict_json.serialize(document), WEIGHTS_FILE: serialize(folded, metadata=metadata)}


def _scaled(tensor: RawTensor, scale: float) -> RawTensor:
    if tensor.dtype != "F32":
        raise UserError(f"the adapter's weights are {tensor.dtype}, and only F32 can be scaled without loss")
    return from_numpy((tensor.to_numpy().astype("float64") * scale).astype("float32"))


def _write_files(contents: Mapping[str, bytes], out: Path) -> Exported:
    with whole_folder(out) as staging:
        for name, data in contents.items():
            (staging / name).write_bytes(data)
    return Exported(out, sum(len(data) for data in contents.values()), {})


def _write_merged(
    files: Mapping[str, bytes],
    companions: Mapping[str, bytes],
    base: ModelFolder,
    out: Path,
    *,
    where: str,
    was_in_4bit: bool,
    report: Report,
) -> Exported:
    if was_in_4bit:
        report(
            "this adapter was trained on its base in 4 bits and is merged into the base's own weights, which are not "
            "quite those: evaluate the merged model again"
        )
    network = load_network(base, dtype=torch.float32, device=torch.device("cpu"), report=report)
    tokens = _checked_tokens(network.config.get_text_config().vocab_size)
    adapted = load_adapter_files(network, files, where=where)
    expected = _logits(adapted, tokens)
    merged = _merge(adapted)
    differences = {"float32": _difference(_logits(merged, tokens), expected)}
    if not differences["float32"] <= _MERGE_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"the merged model would not be the trained one: its logits differ by {differences['float32']:.2g}",
            where="an adapter on the embedding of a model whose output head is the same tensor cannot be merged",
            next_step=f"trietune export {where} OUT   (without --merge) keeps adapter and base apart",
        )
    dtype = _stored_dtype(base)
    merged.to(dtype)
    if dtype != torch.float32:
        differences[str(dtype).removeprefix("torch.")] = _difference(_logits(merged, tokens), expected)
    with whole_folder(out) as staging:
        with quiet_library():
            merged.save_pretrained(staging)
        for name in _COPIED_FILES:
            if os.path.lexists(base.path / name):
                shutil.copyfile(copied_file(base.path, name), staging / name)
        for name, data in companions.items():
            (staging / name).write_bytes(data)
        write_portable(
            staging,
            base.path,
            dtype=str(dtype).removeprefix("torch."),
            chat_template=companions.get(CHAT_FILE, b"").decode(),
        )
        num_bytes = sum(path.stat().st_size for path in staging.iterdir())
    for name, difference in differences.items():
        report(f"merged logits differ from base and adapter by at most {difference:.2g} in {name}")
    return Exported(out, num_bytes, differences)


def _was_trained_in_4bit(folder: Path) -> bool:
    """What the manifest beside an adapter of ours says; other adapters say nothing of it."""
    try:
        return bool(read_manifest(folder).info.details.get("load_in_4bit"))
    except DamagedDirectory:
        return False


def _merge(adapted: PeftModel) -> Any:
    with warnings.catch_warnings():
        # What it warns about, on a model whose embedding is its head, is measured by the caller.
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`", category=UserWarning)
        return adapted.merge_and_unload(safe_merge=True)


def _checked_tokens(vocabulary_size: int) -> Tensor:
    """One sequence of tokens from all over the vocabulary, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size, (1, _NUM_CHECKED_TOKENS), generator=generator)


def _logits(network: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _stored_dtype(base: ModelFolder) -> torch.dtype:
    """The dtype of the base's own weight matrices on disk."""
    sizes: dict[str, int] = {}
    for file in sorted(base.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                entry = opened.get_slice(name)
                sizes[entry.get_dtype()] = sizes.get(entry.get_dtype(), 0) + torch.Size(entry.get_shape()).numel()
    largest = max(sizes, key=lambda name: sizes[name])
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(largest, torch.float32)
