"""Label tokens and loss of conversations, against a count by the chat template itself that knows nothing of segments.

Each template marks its answers in a second rendering: what stands between the marks, tokenized with the whole text, are
the labels. The loss of a plain model at those positions is the loss that evaluation must find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.test_preferences import Loader
from tiny_model import write_tiny_model
from trietune.data import make_encoder
from trietune.data.encoder import load_tokenizer
from trietune.evaluation.evaluate import evaluate_model
from trietune.model.causal_lm import TrieModel

BEGIN, END = "\ue000", "\ue001"
CALLS = (
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "({{ c.function.arguments | tojson }})</call>{% endfor %}"
)
TOOLS = "{%- if tools %}<tools>{{ tools | tojson }}<eos>{% endif %}"
SAID = "S{{ m.content or '' }}" + CALLS + "<eos>E"
TRIMMED = "S{{ (m.content or '') | trim }}" + CALLS + "<eos>E"
# `S` and `E` stand where what the assistant says begins and ends.
TEMPLATES = {
    "chatml": TOOLS + "{% for m in messages %}<|{{ m.role }}|>\n" + SAID + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama": TOOLS + "{% for m in messages %}[{{ m.role }}]\n\n" + TRIMMED + "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    "mistral": TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}" + SAID.replace("S{{", "S {{")
    + "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
    "{% endfor %}",
    "gemma": TOOLS + "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n" + TRIMMED
    + "\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
}  # fmt: skip
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": {"city": "Rome"}}}
DESCRIBED = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]


def conversation(with_tools: bool) -> dict[str, Any]:
    """Two answers to be learned, and one of each kind that says it is not."""
    messages: list[dict[str, Any]] = []
    for number, keys in enumerate(({}, {"weight": 0}, {"loss": False}, {"train": False}, {"weight": 1})):
        messages.append({"role": "user", "content": f"question {number}"})
        if with_tools:
            messages.append({"role": "assistant", "content": None, "tool_calls": [CALL], **keys})
            messages.append({"role": "tool", "tool_call_id": "abcdefghi", "content": f"result {number}"})
        messages.append({"role": "assistant", "content": f"answer {number}", **keys})
    return {"messages": messages, **({"tools": DESCRIBED} if with_tools else {})}


def is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not any(
        message.get(key) in (0, False) for key in ("weight", "loss", "train")
    )


def count_by_template(tokenizer: Any, template: str, row: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Token ids of the whole text, and which of them are labels, from one rendering with marks around the answers."""
    # As expressions: a line break behind a block would not be written.
    begin, end = (f"{{{{ '{mark}' if m.learned else '' }}}}" for mark in (BEGIN, END))
    marked = template.replace("S{{", begin + "{{").replace("S {{", begin + " {{").replace("<eos>E", "<eos>" + end)
    kept = ("role", "content", "tool_calls")
    messages = [
        {**{key: one[key] for key in kept if key in one}, "learned": is_learned(one)} for one in row["messages"]
    ]
    text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), chat_template=marked, tokenize=False)
    ids, labels, inside = [tokenizer.bos_token_id], [False], False
    for piece in text.replace(BEGIN, f"\0{BEGIN}\0").replace(END, f"\0{END}\0").split("\0"):
        if piece in (BEGIN, END):
            inside = piece == BEGIN
            continue
        own = tokenizer(piece, add_special_tokens=False).input_ids
        ids += own
        labels += [inside] * len(own)
    return ids, np.array(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("with_tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_and_loss_are_those_that_the_template_counts(
    name: str, with_tools: bool, folder: Path, tmp_path: Path
) -> None:
    tokenizer, template, row = load_tokenizer(folder), TEMPLATES[name], conversation(with_tools)
    plain = template.replace("S{{", "{{").replace("S {{", " {{").replace("<eos>E", "<eos>")
    data = Loader(tokenizer, tmp_path)([row], objective="sft", chat_template=plain, max_length=4096)
    ids, is_label = count_by_template(tokenizer, template, row)
    length = len(data.train.input_ids) if ids[-1] != tokenizer.eos_token_id else len(ids)
    assert 0 < is_label.sum() < sum(len(str(one)) for one in row["messages"])
    for split in (data.train, data.validation):
        assert split is not None
        # What a template writes behind its last answer comes after the model has stopped.
        common = min(length, len(split.input_ids))
        assert split.input_ids[:common].tolist() == ids[:common]
        assert (split.labels[:common] != -100).tolist() == is_label[:common].tolist()
        assert not is_label[common:].any()
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = np.flatnonzero(is_label)
    expected = -sum(float(logits[place - 1, ids[place]]) for place in places) / len(places)
    assert data.validation is not None
    found = evaluate_model(
        TrieModel(network, device=torch.device("cpu")),
        data.validation,
        make_encoder(tokenizer, data.prompt_format),
        batching="trie",
        max_positions=4096,
        batch_size=1,
    )
    assert found.metrics["eval/loss"] == pytest.approx(expected, rel=1e-9)
