"""What is fuzzed: for each reader a real file, a way to spoil it, and the function that a command would call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mutator import Mutator

from tiny_model import write_tiny_model
from trietune.config import load_config


@dataclass(frozen=True)
class Seeds:
    """Real files of every kind."""

    folder: Path
    model: Path
    tokenizer: Any

    @classmethod
    def write(cls, folder: Path) -> Seeds:
        from trietune.data.encoder import load_tokenizer

        model = write_tiny_model(folder / "model")
        return cls(folder, model, load_tokenizer(model))


@dataclass(frozen=True)
class Reader:
    """`whole` and `mutated` write an input below a folder and return what `read` is given."""

    whole: Callable[[Path], Path]
    mutated: Callable[[Path, Mutator], Path]
    read: Callable[[Path], object]


def _file(name: str, whole: bytes, mutate: Callable[[Mutator], bytes], read: Callable[[Path], object]) -> Reader:
    def write(folder: Path, data: bytes) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return folder / name

    return Reader(lambda folder: write(folder, whole), lambda folder, m: write(folder, mutate(m)), read)


# Data


def _load(seeds: Seeds, **keys: Any) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        from trietune.data.load import load_data

        settings = load_config(overrides={"train_file": str(path), "max_length": 64, **keys}, environ={})
        return load_data(
            settings,
            seeds.tokenizer,
            cache_folder=path.parent / "cache",
            report=lambda text: None,
            progress=lambda phase, done, total: None,
            check_stop=lambda: None,
        )

    return read


_SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"the film {number} is fine",
                    "qas": [
                        {
                            "id": f"q{number}",
                            "question": "is it?",
                            "answers": [{"text": "fine", "answer_start": 14}],
                            "is_impossible": False,
                        },
                        {"id": f"r{number}", "question": "why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
        for number in range(4)
    ],
}
_REVIEWS = [{"sentence": f"film {number}", "label": number % 2} for number in range(12)]
_PAIRS = [{"prompt": f"p {number}", "completion": "yes" if number % 2 else "no"} for number in range(12)]
_CHATS = [
    {"messages": [{"role": "user", "content": f"a{number}"}, {"role": "assistant", "content": "b"}], "weight": 1.0}
    for number in range(12)
]
_PREFERENCES = [{"prompt": f"p{number}", "chosen": "good", "rejected": "bad"} for number in range(12)]


def _lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _json_lines(rows: list[Any], **keys: Any) -> Callable[[Seeds], Reader]:
    return lambda seeds: _file("rows.jsonl", _lines(rows), lambda m: m.of_json_lines(rows), _load(seeds, **keys))


def _json_list(seeds: Seeds) -> Reader:
    return _file("rows.json", json.dumps(_PAIRS).encode(), lambda m: m.of_json(_PAIRS), _load(seeds))


def _squad(seeds: Seeds) -> Reader:
    return _file("rows.json", json.dumps(_SQUAD).encode(), lambda m: m.of_json(_SQUAD), _load(seeds))


def _table(name: str, separator: str) -> Callable[[Seeds], Reader]:
    text = (
        "\n".join([f"sentence{separator}label", *(f'"a, {n}"{separator}{n % 2}' for n in range(12))]).encode() + b"\n"
    )
    return lambda seeds: _file(name, text, lambda m: m.of_bytes(text), _load(seeds, dataset_id="sst2"))


def _parquet(seeds: Seeds) -> Reader:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(value: Any) -> bytes:
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(value), out)
        return out.getvalue()

    tables = [written(rows) for rows in (_PAIRS, _CHATS, [{"prompt": "a", "completion": "b", "x": {"y": [1]}}] * 3)]
    twice = pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["z", "z"])
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["a", "b"], "more": twice}), out)
    tables.append(out.getvalue())
    return _file(
        "rows.parquet",
        tables[0],
        lambda m: m.choice(tables) if m.draw.random() < 0.05 else m.of_bytes(m.choice(tables)),
        _load(seeds),
    )


_TEMPLATES = [
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ m.content }}"
    "{% endfor %}",
]
_PIECES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ x.y.z }}",
    "{{ 1/0 }}",
    "{{ messages[99].role }}",
    "{% for i in range(200000) %}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ messages | tojson }}",
    "{{ strftime_now('%Y') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
    "{{ 'a' * 1000000 }}",
    "{{ messages.append(1) }}",
    "{{ [].__init__.__globals__ }}",
    "{% extends 'x' %}",
    "{{ lipsum(5) }}",
    "{{ cycler }}",
    "{{ '%s' | format }}",
    "{% break %}",
    "{% generation %}a{% endgeneration %}",
    "{{ messages[0].update({'role': 1}) }}",
    "{{ none.x }}",
    "{{ ''.join(1) }}",
    "{% if",
    "{{ '\ud83d' }}",
    "{{ (1).__add__ }}",
    "{{ messages | sum }}",
    "{{ 10 ** 10 ** 3 }}",
    "{{ {}|xmlattr }}",
    "{{ self }}",
]


def _chat_template(seeds: Seeds) -> Reader:
    def spoiled(mutator: Mutator) -> bytes:
        text = mutator.choice(_TEMPLATES)
        place = mutator.draw.randrange(len(text))
        text = text[:place] + mutator.choice(_PIECES) + text[place:]
        data = text.encode("utf-8", "surrogatepass")
        return mutator.of_bytes(data) if mutator.draw.random() < 0.4 else data

    def read(path: Path) -> object:
        rows = path.with_name("rows.jsonl")
        rows.write_bytes(_lines(_CHATS))
        return _load(seeds, chat_template=str(path))(rows)

    return _file("template.jinja", _TEMPLATES[0].encode(), spoiled, read)


# Base models


def _in_model(seeds: Seeds, name: str, read: Callable[[Path], object], binary: bool = False) -> Reader:
    original = (seeds.model / name).read_bytes()

    def write(folder: Path, data: bytes) -> Path:
        shutil.copytree(seeds.model, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(data)
        return folder

    def mutated(folder: Path, mutator: Mutator) -> Path:
        data = mutator.of_bytes(original) if binary else mutator.of_json(json.loads(original))
        return write(folder, data)

    return Reader(lambda folder: write(folder, original), mutated, read)


def _describe(folder: Path) -> object:
    import torch

    from trietune.model.base.locate import locate_model
    from trietune.model.base.shape import describe_network

    base = locate_model(str(folder))
    return describe_network(
        base,
        dtype=torch.float32,
        adapter={
            "r": 4,
            "alpha": 8,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "target_parameters": "auto",
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "modules_to_save": None,
            "seed": 1,
        },
    )


def _load_weights(folder: Path) -> object:
    import torch

    from trietune.model.base.load import load_network
    from trietune.model.base.locate import locate_model

    return load_network(locate_model(str(folder)), dtype=torch.float32, device=torch.device("cpu"))


def _base_config(seeds: Seeds) -> Reader:
    return _in_model(seeds, "config.json", _describe)


def _base_weights(seeds: Seeds) -> Reader:
    reader = _in_model(seeds, "model.safetensors", _load_weights, binary=True)
    original = (seeds.model / "model.safetensors").read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])

    def mutated(folder: Path, mutator: Mutator) -> Path:
        if mutator.draw.random() < 0.3:
            return reader.mutated(folder, mutator)
        text = mutator.of_json(header)
        shutil.copytree(seeds.model, folder, dirs_exist_ok=True)
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + original[8 + length :])
        return folder

    return Reader(reader.whole, mutated, _load_weights)


def _use_tokenizer(folder: Path) -> object:
    from trietune.data.encoder import find_stop_ids, hash_tokenizer, load_tokenizer, make_encoder
    from trietune.data.examples import Example
    from trietune.data.prompt_formats import make_plain_format

    tokenizer = load_tokenizer(folder)
    prompt_format = make_plain_format(tokenizer)
    find_stop_ids(tokenizer, prompt_format)
    encoder = make_encoder(tokenizer, prompt_format)
    encoder.encode([Example("1", "a film", "fine"), Example("2", "ё", "😀")])
    return hash_tokenizer(tokenizer)


def _tokenizer(name: str) -> Callable[[Seeds], Reader]:
    return lambda seeds: _in_model(seeds, name, _use_tokenizer)


def _generation_config(seeds: Seeds) -> Reader:
    return _in_model(seeds, "generation_config.json", _load_weights)


def _gguf(seeds: Seeds) -> Reader:
    import gguf

    path = seeds.folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 8),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 16),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, 4),
        (writer.add_rope_dimension_count, 4),
    ):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<eos>", "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    rows = {
        "token_embd": (4, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (8, 8),
        "blk.0.attn_v": (8, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    for name, shape in rows.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    head = len(data) - sum(4 * int(np.prod(shape)) for shape in rows.values()) - 64

    def spoiled(mutator: Mutator) -> bytes:
        return mutator.of_bytes(data[:head]) + data[head:] if mutator.draw.random() < 0.8 else mutator.of_bytes(data)

    def read(file: Path) -> object:
        from trietune.model.base.locate import locate_model

        base = locate_model(str(file))
        _describe(base.path)
        return _use_tokenizer(base.path)

    return _file("tiny.gguf", data, spoiled, read)


# What TrieTune writes itself


def _prompt_format(seeds: Seeds) -> Reader:
    from trietune.data.prompt_formats import make_plain_format
    from trietune.data.templates import PromptFormat

    whole = make_plain_format(seeds.tokenizer).to_json().encode()

    def read(path: Path) -> object:
        from trietune.data.encoder import make_encoder
        from trietune.evaluation.predict import encode_prompt, make_examples

        found = PromptFormat.from_json(path.read_bytes(), where=str(path))
        encoder = make_encoder(seeds.tokenizer, found)
        return [encode_prompt(encoder, example) for example in make_examples(found, ["a film"])]

    return _file("prompt_format.json", whole, lambda m: m.of_json(json.loads(whole)), read)


_METRICS: list[Any] = [
    {"event": "start", "step": 0, "time": 1.0, "name": "r", "num_steps": 4, "plan": [["model", "m"], ["data", "d"]]},
    {"event": "info", "step": 0, "time": 1.5, "text": "hello"},
    {
        "event": "evaluation",
        "step": 0,
        "epoch": 0.0,
        "time": 2.0,
        "when": "before",
        "eval/loss": 2.0,
        "eval/accuracy": 0.5,
        "num_examples": 20,
        "intervals": {"eval/loss": [1.0, 3.0]},
    },
    *(
        {
            "event": "step",
            "step": n,
            "epoch": n / 4,
            "time": 2.0 + n,
            "train/loss": 1.0 / n,
            "speed/examples_per_second": 5.0,
        }
        for n in range(1, 5)
    ),
    {
        "event": "saved",
        "step": 4,
        "time": 7.0,
        "kind": "checkpoint",
        "eval/loss": 1.0,
        "directory": "checkpoints/x",
        "seconds": 0.1,
    },
    {
        "event": "evaluation",
        "step": 4,
        "epoch": 1.0,
        "time": 8.0,
        "when": "after",
        "eval/loss": 1.0,
        "eval/accuracy": 0.8,
        "num_examples": 20,
        "intervals": {},
        "weights_step": 2,
    },
    {"event": "end", "step": 4, "time": 9.0, "status": "finished", "seconds": 8.0, "summary": {"eval/loss": 1.0}},
]
_PREDICTIONS: list[Any] = [
    {
        "step": step,
        "when": when,
        "id": f"d:{n}",
        "prompt": "p",
        "expected": "a",
        "predicted": "b" if n % 2 else "a",
        "is_right": n % 2 == 0,
        "probabilities": {"a": 0.6, "b": 0.4},
        "f1": 0.5,
        "kind": "labels",
    }
    for step, when in ((0, "before"), (4, "after"))
    for n in range(4)
]
_BATCH: dict[str, Any] = {"rows": [[{"text": "a", "begin": 0, "end": 1}]], "ids": ["a"], "nodes": []}


def _run_files(name: str) -> Callable[[Seeds], Reader]:
    contents: dict[str, bytes] = {
        "metrics.jsonl": _lines(_METRICS),
        "predictions.jsonl": _lines(_PREDICTIONS),
        "config.yaml": b"lora_r: 8\nwandb_tags:\n- a\n",
        "environment.json": b'{"versions": {"torch": "2"}, "python": "3"}',
    }

    def make(seeds: Seeds) -> Reader:
        batch = _real_batch_picture(seeds)

        def write(folder: Path, changed: bytes | None = None) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in {**contents, "batch.json": batch}.items():
                (folder / file).write_bytes(data if changed is None or file != name else changed)
            return folder

        def mutated(folder: Path, mutator: Mutator) -> Path:
            original = {**contents, "batch.json": batch}[name]
            if name.endswith(".jsonl"):
                return write(folder, mutator.of_json_lines([json.loads(line) for line in original.splitlines()]))
            if name.endswith(".json"):
                return write(folder, mutator.of_json(json.loads(original)))
            return write(folder, mutator.of_bytes(original))

        def read(folder: Path) -> object:
            from trietune.tracking.report.report import compare_text, render_runs, report_text

            pages = [render_runs([folder]), report_text([folder])]
            if len((folder / name).read_bytes()) % 4 == 0:  # two runs take several times as long
                other = write(folder.parent / "other")
                pages += [render_runs([folder, other]), compare_text([folder, other])]
            return [page.encode() for page in pages]

        return Reader(write, mutated, read)

    return make


def _real_batch_picture(seeds: Seeds) -> bytes:
    from trietune.run.batch_picture import write_batch_picture

    path = seeds.folder / "reviews.jsonl"
    path.write_bytes(_lines(_PAIRS))
    data: Any = _load(seeds)(path)
    ids = [data.train.row_id(row) for row in range(4)]
    write_batch_picture(seeds.folder, data.train, np.arange(4), ids, seeds.tokenizer)
    return (seeds.folder / "batch.json").read_bytes()


def _state(seeds: Seeds) -> Reader:
    whole = {
        "step": 4,
        "epoch": 0.5,
        "has_optimizer": True,
        "num_warmup_steps": 0,
        "max_positions": 512,
        "packed_bytes": 0,
        "loss_scale": {"scale": 2.0},
        "reference": "abc",
    }

    def read(path: Path) -> object:
        from trietune.run.resuming import parse_state

        state = parse_state(path.read_bytes(), path.parent)
        return float(state["epoch"]), min(512, state.get("max_positions") or 512)

    return _file("trainer_state.json", json.dumps(whole).encode(), lambda m: m.of_json(whole), read)


def _optimizer(seeds: Seeds) -> Reader:
    import torch

    from trietune.checkpoints.messages import wrong_optimizer
    from trietune.model.adapter.tensors import bytes_to_tensors, tensors_to_content
    from trietune.training.state import optimizer_tensors, restore_optimizer

    def fresh() -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    content = tensors_to_content(optimizer_tensors(fresh()))
    whole = content if isinstance(content, bytes) else b"".join(bytes(piece) for piece in content.pieces())
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def spoiled(mutator: Mutator) -> bytes:
        if mutator.draw.random() < 0.4:
            return mutator.of_bytes(whole)
        text = mutator.of_json(header)
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    def read(path: Path) -> object:
        optimizer = fresh()
        try:
            restore_optimizer(optimizer, bytes_to_tensors(path.read_bytes()))
        except (ValueError, RuntimeError, TypeError) as error:  # as the run that resumes does
            raise wrong_optimizer(path.parent, str(error)) from error
        return optimizer.step()

    return _file("optimizer.safetensors", whole, spoiled, read)


def _adapter(name: str) -> Callable[[Seeds], Reader]:
    def make(seeds: Seeds) -> Reader:
        import torch

        from trietune.model.adapter.adapter import adapter_files, add_adapter, load_adapter
        from trietune.model.base.load import load_network
        from trietune.model.base.locate import locate_model

        base = locate_model(str(seeds.model))

        def network() -> Any:
            return load_network(base, dtype=torch.float32, device=torch.device("cpu"))

        peft_model = add_adapter(
            network(),
            base=base,
            r=2,
            alpha=4,
            dropout=0.0,
            target_modules=("q_proj",),
            target_parameters="auto",
            use_rslora=False,
            use_dora=False,
            bias="none",
            modules_to_save=None,
            seed=1,
        )
        files = {
            file: data if isinstance(data, bytes) else b"".join(bytes(piece) for piece in data.pieces())
            for file, data in adapter_files(peft_model, base).items()
        }

        def write(folder: Path, changed: bytes | None = None) -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data if changed is None or file != name else changed)
            return folder

        def mutated(folder: Path, mutator: Mutator) -> Path:
            data = files[name]
            return write(
                folder, mutator.of_json(json.loads(data)) if name.endswith(".json") else mutator.of_bytes(data)
            )

        def read(folder: Path) -> object:
            from trietune.model.adapter.folder import read_listed

            listed = read_listed(folder)
            return load_adapter(network(), folder, listed=listed)

        return Reader(write, mutated, read)

    return make


def _configuration(seeds: Seeds) -> Reader:
    from trietune.config.template import render_template

    whole = render_template("sst2").encode()

    def read(path: Path) -> object:
        return load_config(path, environ={}).dump_public()

    extras = [
        b"a: &a [x]\nb: *a\n",
        b"? [1]\n: 2\n",
        b"!!python/object:os.system x\n",
        b"%YAML 1.1\n---\n",
        b"<<: {a: 1}\n",
        b"lora_r: [[[[[[[[[[[[[[[[[[1\n",
        b'seed: "\\ud83d"\n',
        b"batch_size: 99999999999999999999999\n",
    ]

    def spoiled(mutator: Mutator) -> bytes:
        data = mutator.of_bytes(whole)
        return mutator.choice(extras) + data if mutator.draw.random() < 0.2 else data

    return _file("config.yaml", whole, spoiled, read)


def _manifest(seeds: Seeds) -> Reader:
    from trietune.checkpoints.store import CheckpointStore

    def store(folder: Path) -> CheckpointStore:
        return CheckpointStore(folder, "abc", 3, 1, "eval/loss", "min")

    whole = seeds.folder / "run"
    if not whole.exists():
        whole.mkdir()
        store(whole).save(1, {"weights": b"x" * 10}, metrics={"eval/loss": 1.0}, details={"a": 1})
    data = (whole / "checkpoints" / "step-00000001" / "manifest.json").read_bytes()

    def write(folder: Path, changed: bytes = data) -> Path:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / "checkpoints" / "step-00000001" / "manifest.json").write_bytes(changed)
        return folder

    def mutated(folder: Path, mutator: Mutator) -> Path:
        return write(folder, mutator.of_json(json.loads(data)))

    def read(folder: Path) -> object:
        from trietune.checkpoints.overview import list_checkpoints, verify_path

        found = store(folder)
        list_checkpoints(found)
        verify_path(folder)
        return found.load(fresh_if_none=True)

    return Reader(write, mutated, read)


READERS: dict[str, Callable[[Seeds], Reader]] = {
    "reviews.jsonl": _json_lines(_REVIEWS, dataset_id="sst2"),
    "pairs.jsonl": _json_lines(_PAIRS),
    "chats.jsonl": _json_lines(_CHATS),
    "preferences.jsonl": _json_lines(_PREFERENCES, objective="dpo"),
    "list.json": _json_list,
    "squad.json": _squad,
    "table.tsv": _table("rows.tsv", "\t"),
    "table.csv": _table("rows.csv", ","),
    "rows.parquet": _parquet,
    "chat template": _chat_template,
    "base config.json": _base_config,
    "base safetensors": _base_weights,
    "base generation_config.json": _generation_config,
    "tokenizer.json": _tokenizer("tokenizer.json"),
    "tokenizer_config.json": _tokenizer("tokenizer_config.json"),
    "gguf": _gguf,
    "prompt_format.json": _prompt_format,
    "metrics.jsonl": _run_files("metrics.jsonl"),
    "predictions.jsonl": _run_files("predictions.jsonl"),
    "environment.json": _run_files("environment.json"),
    "batch.json": _run_files("batch.json"),
    "a run's config.yaml": _run_files("config.yaml"),
    "trainer_state.json": _state,
    "optimizer.safetensors": _optimizer,
    "adapter_config.json": _adapter("adapter_config.json"),
    "adapter_model.safetensors": _adapter("adapter_model.safetensors"),
    "configuration": _configuration,
    "manifest.json": _manifest,
}
