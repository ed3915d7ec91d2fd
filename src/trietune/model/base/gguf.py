"""A GGUF file becomes, once, a folder that every tool can load: safetensors, config and tokenizer.

The folder lies under `TRIETUNE_CACHE` (or `~/.cache/trietune`), named by the SHA-256 of the file, so a file that
moves is not converted again and one that changes is never mistaken for its former self. The digests of what was written
are kept with it and compared at each use: a folder that has changed since is made again.

Weights are stored in bfloat16, except those of a file that is itself fp32 or fp16. A block format such as Q4_1 is off
the original weights by several per cent; rounding its values to bfloat16 adds 0.14% (measured on SmolLM2-135M,
relative norm, worst tensor). In return the folder is half as large, and it is mapped into memory in the dtype that
training uses, without a conversion.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from trietune.data.encoder import adds_bos
from trietune.errors import StopRequested, UserError
from trietune.io.cache_folder import cache_folder, mark_used
from trietune.io.causes import first_line
from trietune.io.whole_folder import whole_folder, write_error
from trietune.model.base.folder import MOST_LAYERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Part of the folder's name: a change of what is written here must not meet folders of an older version.
_LAYOUT = "3"
_DIGESTS = "digests.json"
# Byte-level vocabularies whose texts llama.cpp begins so where the file does not say it (llama-vocab.cpp, `load`).
_BEGIN_WITH_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
_MAGIC = b"GGUF"
_ALONE = "model.gguf"


@dataclass(frozen=True, slots=True)
class Converted:
    """What a GGUF file became.

    Attributes:
        folder: safetensors, config and tokenizer.
        digest: SHA-256 of the GGUF file, in hex.
        weights_digest: SHA-256 over the names and digests of the safetensors, in hex.
    """

    folder: Path
    digest: str
    weights_digest: str


def convert_gguf(file: Path, *, report: Callable[[str], None] = lambda text: None) -> Converted:
    """The weights of `file` in a folder that is what was once converted, to the byte; converted now if need be.

    Raises:
        UserError: not a GGUF file, damaged, one part of several, an architecture that is not read, a full disk.
    """
    digest = _check_and_hash(file)
    folder = cache_folder() / "gguf" / f"{digest[:32]}-{_LAYOUT}"
    if folder.is_dir() and (damage := _damage_of(folder)) is not None:
        report(f"{folder} is not as it was written ({damage}), so {file.name} is converted again")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise write_error(error, folder) from error
    if not folder.is_dir():
        report(f"converting {file.name} to safetensors, once; kept in {folder}")
        with whole_folder(folder) as staging:
            _convert(file, staging)
            if _check_and_hash(file) != digest:
                raise UserError(
                    f"`{file}` changed while it was being converted",
                    where="nothing was kept",
                    next_step="wait until the file is complete, then run the same command again",
                )
            (staging / _DIGESTS).write_text(json.dumps(_digests(staging), indent=1) + "\n")
    mark_used(folder)
    weights = {name: digest for name, digest in _recorded(folder).items() if name.endswith(".safetensors")}
    return Converted(folder, digest, hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest())


def _damage_of(folder: Path) -> str | None:
    """What of a converted folder is not as it was written; None if every byte is."""
    try:
        recorded, found = _recorded(folder), _digests(folder)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{_DIGESTS}: {first_line(error).rstrip('.')}"
    return next((name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)), None)


def _recorded(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / _DIGESTS).read_text()).items())


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256, in hex, of each file in `folder`, links and folders included as what they are."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            found[path.name] = "not a plain file"
        elif path.name != _DIGESTS:
            with path.open("rb") as stream:
                found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


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
    try:
        # transformers draws bars of its own on stderr, some of them whatever its settings say.
        with redirect_stderr(io.StringIO()), _alone(file) as folder_of_file:
            source: dict[str, Any] = {
                "pretrained_model_name_or_path": str(folder_of_file),
                "gguf_file": _ALONE,
                "trust_remote_code": False,
                "local_files_only": True,
            }
            network = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype_name)
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (UserError, StopRequested, MemoryError):
        raise
    except Exception as error:  # each architecture's reader raises classes of its own over odd metadata
        raise UserError(
            f"`{file}` could not be converted: {first_line(error).rstrip('.')}",
            where=f"architecture `{metadata.get('general.architecture', 'unknown')}`",
            next_step="use the model's safetensors instead: its hub id or a folder as `model_name`",
        ) from error
    _restore_pre_tokenizer(cast("PreTrainedTokenizerFast", tokenizer), str(metadata.get("tokenizer.ggml.pre", "")))
    _restore_habit(cast("PreTrainedTokenizerFast", tokenizer), metadata)
    # A title that the file's author gave it; transformers would take it for a place to load from.
    vars(network.config).pop("_model_name_or_path", None)
    with redirect_stderr(io.StringIO()):
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_readme(file, metadata), encoding="utf-8")


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder that holds nothing but a link to `file`: transformers reads what lies beside it, code included."""
    with TemporaryDirectory(prefix="trietune-gguf-") as folder:
        (Path(folder) / _ALONE).symlink_to(file.resolve())
        yield Path(folder)


def _read_metadata(file: Path) -> tuple[dict[str, object], str]:
    """The file's scalar metadata, and the dtype to store its weights in."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        kinds = Counter[str]()
        for tensor in reader.tensors:
            if len(tensor.shape) > 1:
                kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # the reader checks nothing, and raises whatever NumPy raises
        if isinstance(error, MemoryError):
            raise
        raise UserError(
            f"`{file}` is damaged or only partly downloaded: {first_line(error).rstrip('.')}",
            where=f"{file.stat().st_size:,} bytes",
            next_step="download it again and compare its size with the page that it comes from",
        ) from error
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"`{file}` is one of {metadata['split.count']} parts of a model",
            next_step="join them with llama.cpp's `llama-gguf-split --merge`, then give the joined file",
        )
    for name, value in metadata.items():
        if name.endswith((".block_count", ".expert_count")) and not (isinstance(value, int) and value <= MOST_LAYERS):
            raise UserError(
                f"`{file}` describes {value} parts of a network (`{name}`), more than the {MOST_LAYERS:,} allowed",
                next_step="download it again from the page that it comes from",
            )
    if set(kinds) == {"F32"}:
        return metadata, "float32"
    return metadata, "float16" if set(kinds) <= {"F32", "F16"} else "bfloat16"


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """The splitting rule that the file names but transformers' converter leaves at GPT-2's.

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


def _restore_habit(tokenizer: PreTrainedTokenizerFast, metadata: Mapping[str, object]) -> None:
    """Whether a text begins with the beginning-of-sequence token, which transformers' converter does not read."""
    from tokenizers import processors

    pre, bos = str(metadata.get("tokenizer.ggml.pre", "")), tokenizer.bos_token
    by_default = metadata.get("tokenizer.ggml.model") == "llama" or pre in _BEGIN_WITH_BOS
    is_wanted = metadata.get("tokenizer.ggml.add_bos_token", by_default) is True
    if bos is None or is_wanted is adds_bos(tokenizer):
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if is_wanted else "$A",
        pair=f"{bos} $A {bos} $B:1" if is_wanted else "$A $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)] if is_wanted else [],
    )


def _readme(file: Path, metadata: Mapping[str, object]) -> str:
    """A model card that carries the license on, for the card of the adapter."""
    lines = ["---"]
    if license := metadata.get("general.license"):
        lines.append(f"license: {license}")
    lines += ["---", "", f"Weights of `{file.name}`, dequantized by TrieTune.", ""]
    return "\n".join(lines)
