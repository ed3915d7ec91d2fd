"""Run by the Python of the environment for hand-overs: what its transformers makes of a model's folder.

read_with_transformers.py FOLDER  <  {"tokens": [[...]], "text": "...", "messages": [...]}
read_with_transformers.py  <  {"folders": {FOLDER: {"tokens": ...}, ...}}, for an answer to each
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(folder: str, asked: dict) -> dict[str, object]:
    answer: dict[str, object] = {"version": transformers.__version__}
    if "tokens" in asked:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        losses, likeliest = [], []
        for row in asked["tokens"]:
            ids = torch.tensor([row])
            with torch.no_grad():
                logits = network(input_ids=ids).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
            likeliest.append(logits.argmax(-1).tolist())
        answer |= {"losses": losses, "likeliest": likeliest}
    if "text" in asked:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        answer["ids"] = tokenizer(asked["text"], add_special_tokens=False).input_ids
        answer["tokenizer"] = type(tokenizer).__name__
        if "messages" in asked:
            answer["prompt"] = tokenizer.apply_chat_template(
                asked["messages"], tokenize=False, add_generation_prompt=True
            )
    return answer


transformers.logging.set_verbosity_error()
asked = json.load(sys.stdin)
if "folders" in asked:
    answer = {folder: read(folder, one) for folder, one in asked["folders"].items()}
else:
    answer = read(sys.argv[1], asked)
json.dump(answer, sys.stdout)
