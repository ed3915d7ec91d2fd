"""A GGUF file becomes a folder with the same numbers, once, or nothing at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trietune.checkpoints.resume import compare
from trietune.data.encoder import find_bos_id
from trietune.demo import DEMO_MODEL
from trietune.errors import UserError
from trietune.io.cache_folder import cache_folder
from trietune.model.base import gguf as gguf_module
from trietune.model.base.folder import ModelFolder
from trietune.model.base.gguf import convert_gguf
from trietune.model.base.load import load_network
from trietune.model.base.locate import locate_model

HIDDEN, HEADS, KEY_HEADS, LAYERS, MIDDLE = 64, 4, 2, 2, 96
# GPT-2's way to write bytes as letters: the tokenizer of the tiny model knows every byte and four merges.
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))] + [
    chr(256 + n) for n in range(68)
]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    network.train(False)
    return network


@pytest.fixture
def write(network: LlamaForCausalLM, tmp_path: Path) -> Callable[..., Path]:
    def write_file(name: str = "tiny.gguf", kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
        path = tmp_path / name
        _write(network, path, kind)
        return path

    return write_file


def _write(
    network: LlamaForCausalLM,
    path: Path,
    kind: gguf.GGMLQuantizationType,
    *,
    adds_bos: bool | None = False,
    pre: str = "smollm",
) -> None:
    """As llama.cpp's converter does it: its names, its order of the rotary halves, its tokenizer fields."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A title that is no place")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, parameter in network.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = parameter.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _permute(array, HEADS if "q_proj" in name else KEY_HEADS)
        if array.ndim == 1:
            writer.add_tensor(_gguf_name(name), array)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permute(array: np.ndarray, num_heads: int) -> np.ndarray:
    rows, columns = array.shape
    return array.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(ours, theirs)
    return name


def _load(path: Path) -> LlamaForCausalLM:
    found = locate_model(str(path))
    assert found.source == "gguf"
    return load_network(found, dtype=torch.float32, device=torch.device("cpu"))


def test_weights_of_an_fp32_file_are_the_same_bits(network: LlamaForCausalLM, write: Callable[..., Path]) -> None:
    loaded = _load(write()).state_dict()
    for name, parameter in network.state_dict().items():
        assert torch.equal(loaded[name], parameter), name


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [("F16", "float16", 1e-3), ("Q8_0", "bfloat16", 0.02)])
def test_weights_of_shorter_kinds_are_near(
    network: LlamaForCausalLM, write: Callable[..., Path], kind: str, dtype: str, tolerance: float
) -> None:
    path = write(kind=gguf.GGMLQuantizationType[kind])
    assert locate_model(str(path)).path.joinpath("config.json").read_text().count(f'"{dtype}"') == 1
    loaded = _load(path).state_dict()
    for name, parameter in network.state_dict().items():
        difference = (loaded[name] - parameter).norm() / parameter.norm()
        assert difference < tolerance, f"{name}: {difference:.1e}"


def test_logits_are_those_of_the_original(network: LlamaForCausalLM, write: Callable[..., Path]) -> None:
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        difference = (_load(write())(tokens).logits - network(tokens).logits).abs().max().item()
    assert difference == 0.0


def test_the_tokenizer_comes_along(write: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate_model(str(write())).path)
    assert tokenizer.tokenize(" the") == ["Ġthe"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer("the").input_ids[0] != 1, "the file says that no beginning-of-sequence token is put in front"


@pytest.mark.parametrize(
    ("said", "pre", "expected"),
    [(False, "llama-bpe", False), (True, "smollm", True), (None, "smollm", False), (None, "llama-bpe", True)],
)
def test_texts_begin_as_the_file_says(
    network: LlamaForCausalLM, tmp_path: Path, said: bool | None, pre: str, expected: bool
) -> None:
    _write(network, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, adds_bos=said, pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "m.gguf").folder)
    assert (tokenizer("a word")["input_ids"][0] == tokenizer.bos_token_id) is expected
    assert find_bos_id(tokenizer) == (tokenizer.bos_token_id if expected else None)
    assert tokenizer.decode(tokenizer("a word")["input_ids"], skip_special_tokens=True) == "a word"


def test_digits_are_split_off_as_the_file_says(write: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate_model(str(write())).path)
    assert tokenizer.tokenize("12") == ["1", "2"], "there is a merge of 1 and 2, which the pre-tokenizer forbids"


def test_a_title_is_not_taken_for_a_place(write: Callable[..., Path]) -> None:
    folder = locate_model(str(write())).path
    assert "A title" not in (folder / "config.json").read_text()
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_converted_once_whatever_the_file_is_called(write: Callable[..., Path], cache: Path) -> None:
    path = write()
    said: list[str] = []
    first = convert_gguf(path, report=said.append)
    moved = path.rename(path.with_name("elsewhere.gguf"))
    second = convert_gguf(moved, report=said.append)
    assert first == second
    assert len(said) == 1
    assert "once" in said[0]
    assert len(list((cache / "gguf").iterdir())) == 1


def test_a_changed_file_is_converted_anew(write: Callable[..., Path]) -> None:
    path = write()
    first = convert_gguf(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert convert_gguf(path) != first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "digests.json"])
def test_a_converted_folder_that_changed_is_made_again(
    network: LlamaForCausalLM, write: Callable[..., Path], name: str
) -> None:
    path = write()
    converted = convert_gguf(path)
    damaged = converted.folder / name
    as_written = damaged.read_bytes()
    damaged.write_bytes(as_written[:-3] + bytes([as_written[-3] ^ 0x40]) + as_written[-2:])
    if name == "model.safetensors":
        tampered = load_network(
            ModelFolder(converted.folder, "x", "folder"), dtype=torch.float32, device=torch.device("cpu")
        )
        assert any(
            not torch.equal(parameter, network.state_dict()[key]) for key, parameter in tampered.state_dict().items()
        ), "the flipped bit is in no weight"
    said: list[str] = []
    assert convert_gguf(path, report=said.append) == converted
    assert "is not as it was written" in said[0]
    assert name in said[0]
    assert damaged.read_bytes() == as_written
    assert convert_gguf(path, report=said.append) == converted
    assert len(said) == 2, "said once, and once that it is converted"


def test_a_resume_compares_what_the_file_was_converted_to(write: Callable[..., Path]) -> None:
    path = write()
    before = locate_model(str(path))
    weights = before.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x02
    weights.write_bytes(data)
    digests = json.loads((before.path / "digests.json").read_text())
    digests["model.safetensors"] = hashlib.sha256(data).hexdigest()
    (before.path / "digests.json").write_text(json.dumps(digests))
    now = locate_model(str(path))
    assert (now.path, now.digest) == (before.path, before.digest), "the conversion itself tells nothing"
    [difference] = compare({"base_weights": before.weights_digest}, {"base_weights": now.weights_digest})
    assert difference.verdict == "refuse"
    [unknown] = compare({}, {"base_weights": now.weights_digest})
    assert unknown.verdict == "warn", "checkpoints of before this was kept go on"


def test_a_file_put_into_a_converted_folder_or_taken_out_of_it_is_noticed(write: Callable[..., Path]) -> None:
    path = write()
    folder = convert_gguf(path).folder
    (folder / "generation_config.json").unlink()
    (folder / "chat_template.jinja").write_text("another")
    said: list[str] = []
    convert_gguf(path, report=said.append)
    assert "is not as it was written" in said[0]
    assert (folder / "generation_config.json").exists()
    (folder / "adapter_config.json").symlink_to("/etc/passwd")
    convert_gguf(path, report=said.append)
    assert "adapter_config.json" in said[2]
    assert not (folder / "adapter_config.json").is_symlink()


def test_a_file_that_changes_while_it_is_converted_is_not_kept_under_its_former_digest(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()

    def convert(file: Path, folder: Path, convert: Callable[..., None] = gguf_module._convert) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 0x02
        file.write_bytes(data)
        convert(file, folder)

    monkeypatch.setattr(gguf_module, "_convert", convert)
    with pytest.raises(UserError, match="changed while it was being converted"):
        convert_gguf(path)
    assert list((cache / "gguf").iterdir()) == []


def test_others_may_read_the_folder(write: Callable[..., Path]) -> None:
    folder = convert_gguf(write()).folder
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "safetensors writes files for their owner alone, the others follow the umask"


def test_nothing_remains_of_a_conversion_that_failed(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match="the disk is full"):
        convert_gguf(write())
    assert list((cache / "gguf").iterdir()) == []


def _error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        convert_gguf(path)
    return str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    assert "is not a GGUF file" in _error(path)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_part_of_a_download(write: Callable[..., Path], kept: float, cache: Path) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    error = _error(path)
    assert "is damaged or only partly downloaded" in error
    assert "download it again" in error
    assert not list((cache / "gguf").iterdir())


def test_an_architecture_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "clip.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = _error(path)
    assert "architecture `clip`" in error
    assert "use the model's safetensors" in error


def test_one_part_of_several(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "is one of 3 parts" in _error(path)


def test_where_the_cache_is() -> None:
    assert cache_folder({"TRIETUNE_CACHE": "/data/trietune"}) == Path("/data/trietune")
    assert cache_folder({"XDG_CACHE_HOME": "/data/cache"}) == Path("/data/cache/trietune")
    assert cache_folder({}) == Path.home() / ".cache" / "trietune"


@pytest.mark.slow
def test_the_sample_model_knows_a_capital() -> None:
    """The real file, if its package is installed: weights, rotary order and tokenizer are those of the model."""
    try:
        found = locate_model(DEMO_MODEL)
    except UserError as error:
        pytest.skip(str(error))
    assert found.name == DEMO_MODEL
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    network = load_network(found, dtype=torch.bfloat16, device=torch.device("cpu"))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = network.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"], "every digit alone, and the spaces before it together"
