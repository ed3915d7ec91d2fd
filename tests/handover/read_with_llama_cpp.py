"""Run by the Python of the environment for hand-overs: what llama.cpp makes of a GGUF file.

read_with_llama_cpp.py MODEL.gguf [ADAPTER.gguf]  <  {"tokens": [[...]], "text": "...", "exact_cache": true}

Keys and values are kept in f16, as llama.cpp does by itself, unless `exact_cache` asks for f32.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as lib
import numpy as np


@lib.llama_log_callback
def _log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level >= 3:
        sys.stderr.write(text.decode(errors="replace"))


lib.llama_log_set(_log, ctypes.c_void_p(0))
lib.llama_backend_init()
asked = json.load(sys.stdin)
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
assert model, "llama.cpp cannot load the model"
vocab = lib.llama_model_get_vocab(model)
num_vocab = lib.llama_vocab_n_tokens(vocab)
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 512, 1, 1
if asked.get("exact_cache"):
    params.type_k = params.type_v = lib.GGML_TYPE_F32
answer: dict[str, object] = {"adds_bos": bool(lib.llama_vocab_get_add_bos(vocab))}
adapter = None
if len(sys.argv) > 2:
    adapter = lib.llama_adapter_lora_init(model, sys.argv[2].encode())
    assert adapter, "llama.cpp cannot load the adapter"
likeliest = []
for row in asked.get("tokens", []):
    context = lib.llama_init_from_model(model, params)
    if adapter is not None:
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
    batch = lib.llama_batch_init(len(row), 0, 1)
    for position, token in enumerate(row):
        batch.token[position], batch.pos[position], batch.n_seq_id[position] = token, position, 1
        batch.seq_id[position][0], batch.logits[position] = 0, 1
    batch.n_tokens = len(row)
    assert lib.llama_decode(context, batch) == 0
    found = []
    for position in range(len(row)):
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, position), shape=(num_vocab,))
        found.append(int(logits.argmax()))
    likeliest.append(found)
    lib.llama_batch_free(batch)
    lib.llama_free(context)
answer["likeliest"] = likeliest
if "text" in asked:
    text = asked["text"].encode()
    tokens = (lib.llama_token * 4096)()
    size = lib.llama_tokenize(vocab, text, len(text), tokens, 4096, False, False)
    answer["ids"] = list(tokens[:size])
json.dump(answer, sys.stdout)
