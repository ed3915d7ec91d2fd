"""A GGUF file becomes, once, a folder that every tool can load: safetensors, config and tokenizer.

The folder lies under `TRIETUNE_CACHE` (or `~/.cache/trietune`), named by the SHA-256 of the file, so a file that
moves is not converted again and one that changes is never mistaken for its former self.

Weights are stored in bfloat16, except those of a file that is itself fp32 or fp16. A block format such as Q4_1 is off
the original weights by several per cent; rounding its values to bfloat16 adds 0.14 % (measured on SmolLM2-135M,
relative norm, worst tensor). In return the folder is half as large, and it is mapped into memory in the dtype that
training uses, without a conversion.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from trietune.errors import UserError
from trietune.io.whole_folder import whole_folder

# Part of the folder's name: a change of what is written here must not meet folders of an older version.
_LAYOUT = "1"
_MAGIC = b"GGUF"


def convert_gguf(file: Path, *, report: Callable[[str], None] = lambda text: None) -> tuple[Path, str]:
    """The folder with the weights of `file`, converted now if it never was, and the SHA-256 of `file` in hex.

    Raises:
        UserError: not a GGUF file, damaged, one part of several, an architecture that is not read, a full disk.
    """
    digest = _check_and_hash(file)
    folder = cache_folder() / "gguf" / f"{digest[:32]}-{_LAYOUT}"
    if not folder.is_dir():
        report(f"converting {file.name} to safetensors, once; kept in {folder}")
        with whole_folder(folder) as staging:
            _convert(file, staging)
    return folder, digest


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where TrieTune keeps what it can make again."""
    if chosen := environ.get("TRIETUNE_CACHE"):
        return Path(chosen).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "trietune"


def _check_and_hash(file: Path) -> str:
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise UserError(
                f"`{file}` is not a GGUF file: it does not begin with `GGUF`",
                next_step="`model_name` takes a hub id, a folder with config.json and safetensors, or a .gguf file",
            )
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(file: Path, folder: Path) -> None:
    # torch and transformers are loaded here, so that a folder that exists already costs a hash and no more.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    metadata, dtype_name = _read_metadata(file)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # The library draws bars of its own on stderr, some of them whatever its settings say.
        with redirect_stderr(io.StringIO()):
            network = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype_name)
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(
            f"`{file}` could not be converted: {_first_line(error)}",
            where=f"architecture `{metadata.get('general.architecture', 'unknown')}`",
            next_step="use the model's safetensors instead: its hub id or a folder as `model_name`",
        ) from error
    _restore_pre_tokenizer(tokenizer, str(metadata.get("tokenizer.ggml.pre", "")))
    # A title that the file's author gave it; the library would take it for a place to load from.
    vars(network.config).pop("_model_name_or_path", None)
    with redirect_stderr(io.StringIO()):
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_readme(file, metadata), encoding="utf-8")


def _read_metadata(file: Path) -> tuple[dict[str, Any], str]:
    """The file's scalar metadata, and the dtype to store its weights in."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        kinds = Counter[str]()
        for tensor in reader.tensors:
            if len(tensor.shape) > 1:
                kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(
            f"`{file}` is damaged or only a part of a download: {_first_line(error)}",
            where=f"{file.stat().st_size:,} bytes",
            next_step="download it again and compare its size with the page that it comes from",
        ) from error
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"`{file}` is one of {metadata['split.count']} parts of a model",
            next_step="join them with llama.cpp's `llama-gguf-split --merge`, then give the joined file",
        )
    if set(kinds) == {"F32"}:
        return metadata, "float32"
    return metadata, "float16" if set(kinds) <= {"F32", "F16"} else "bfloat16"


def _restore_pre_tokenizer(tokenizer: Any, name: str) -> None:
    """The splitting rule that the file names but the library's converter leaves at GPT-2's.

    SmolLM splits every digit off before anything else; without that, two spaces before a number become other tokens
    than those the model was trained on.
    """
    from tokenizers import pre_tokenizers

    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _readme(file: Path, metadata: Mapping[str, Any]) -> str:
    """A model card that carries the licence on, for the card of the adapter."""
    lines = ["---"]
    if licence := metadata.get("general.license"):
        lines.append(f"license: {licence}")
    lines += ["---", "", f"Weights of `{file.name}`, dequantized by TrieTune.", ""]
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
