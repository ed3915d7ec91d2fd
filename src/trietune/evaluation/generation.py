"""Greedy generation for many prompts at once, every distinct prefix computed once.

    sorted prompts -> chunks -> prefill as one trie -> decode all rows together -> token ids

Decoding steps are cheaper the more rows they have, so a new chunk is prefilled as soon as half of the rows have
finished, and what is left of older chunks decodes along with it. The tokens are those of greedy decoding one prompt at
a time. Models whose attention cannot be replaced go through the library's `generate` on padded rows instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trietune.data.examples import IGNORED_LABEL
from trietune.evaluation.decoding import Decoding, Prefill, register
from trietune.evaluation.scoring import CheckStop, FlatSequences, Progress, inference
from trietune.model.causal_lm import TrieModel
from trietune.trie import MicroBatch, common_prefix_lengths, make_micro_batches, sort_sequences


@dataclass(slots=True)
class _Row:
    """One distinct prompt while it decodes: `prompts` are the places of the equal prompts that it stands for."""

    prompts: np.ndarray
    prompt_length: int
    tokens: list[int] = field(default_factory=list)


def generate(
    model: TrieModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    max_nodes: int,
    batch_size: int,
    check_stop: CheckStop = lambda: None,
    progress: Progress = lambda phase, done, total: None,
) -> list[list[int]]:
    """The most likely next token of each prompt, again and again, up to a stop token.

    Args:
        prompts: token ids, at least one each.
        stop_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: an answer without a stop token ends here.
        max_nodes: most positions that are prefilled at once.
        batch_size: about how many prompts decode together.

    Returns:
        The new tokens of each prompt, in the order given.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    if max_new_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    run = _generate_padded if model.attention is None else _generate_by_trie
    answers: list[list[int]] = [[] for _ in prompts]
    num_done = 0
    with inference(model.network):
        for finished, tokens in run(
            model,
            prompts,
            stop_ids=frozenset(stop_ids),
            max_new_tokens=max_new_tokens,
            max_nodes=max_nodes,
            batch_size=batch_size,
            check_stop=check_stop,
        ):
            for prompt in finished:
                answers[prompt] = _before_stop(tokens, stop_ids)
            num_done += len(finished)
            progress("answers", num_done, len(prompts))
    return answers


def _generate_by_trie(
    model: TrieModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    max_nodes: int,
    batch_size: int,
    check_stop: CheckStop,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the places of equal prompts and their new tokens, as soon as they have finished."""
    waiting = _prompt_tries(prompts, max_nodes=max_nodes, batch_size=batch_size)
    decoding = Decoding(max_new_tokens=max_new_tokens, device=model.device)
    rows: list[_Row] = []
    with _attention(model.network, register()):
        while True:
            check_stop()
            micro_batch = next(waiting, None) if len(rows) <= batch_size // 2 else None
            if micro_batch is not None:
                joining, next_tokens = _prefill(model, decoding, micro_batch)
                rows += joining
                changed = joining
            elif rows:
                next_tokens = _decode(model, decoding, [row.tokens[-1] for row in rows])
                changed = rows
            else:
                return
            for row, token in zip(changed, next_tokens, strict=True):
                row.tokens.append(token)
            has_finished = [row.tokens[-1] in stop_ids or len(row.tokens) == max_new_tokens for row in rows]
            decoding.keep(~np.array(has_finished))
            yield from ((row.prompts, row.tokens) for row, done in zip(rows, has_finished, strict=True) if done)
            rows = [row for row, done in zip(rows, has_finished, strict=True) if not done]


def _prompt_tries(
    prompts: Sequence[Sequence[int] | np.ndarray], *, max_nodes: int, batch_size: int
) -> Iterator[MicroBatch]:
    """Tries of about `batch_size` neighbours each, in sorted order; prompts of one paragraph stay together if they can.

    A trie ends with the node that predicts the last label. So each prompt is followed by one token, which is never
    computed, and the nodes that predict it are the ends of the prompts.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths + 1)))
    ends = offsets[1:] - 1
    input_ids = np.zeros(offsets[-1], np.int32)
    labels = np.full(offsets[-1], IGNORED_LABEL, np.int32)
    labels[ends] = 0
    is_prompt = np.ones(offsets[-1], bool)
    is_prompt[ends] = False
    input_ids[is_prompt] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    sequences = FlatSequences(input_ids, labels, offsets)
    order = sort_sequences(input_ids, offsets[:-1], lengths)
    shared = common_prefix_lengths(input_ids, offsets[:-1][order], lengths[order])
    first = 0
    while first < len(order):
        last = first + batch_size
        if last < len(order):
            # The cut that repeats least, in the second half of the batch; the latest of several.
            candidates = np.arange(last, first + batch_size // 2, -1)
            last = int(candidates[shared[candidates].argmin()])
        yield from make_micro_batches(sequences, order[first:last], batching="trie", max_nodes=max_nodes)
        first = last


def _prefill(model: TrieModel, decoding: Decoding, micro_batch: MicroBatch) -> tuple[list[_Row], list[int]]:
    """Compute a trie of prompts; its distinct prompts join the decoding rows. Returns them with their first tokens."""
    trie = micro_batch.trie
    assert trie is not None
    ends = micro_batch.label_index
    prefill = Prefill(trie, ends, model.layout(trie), model.device)
    hidden = _hidden_states(model, micro_batch.input_ids, micro_batch.position_ids, attends=prefill)
    prompt_lengths = trie.position_ids[ends].astype(np.int64) + 1
    decoding.join(prefill.groups, prompt_lengths)
    row_of_prompt = np.empty(len(micro_batch.sequence_indices), np.int64)
    row_of_prompt[micro_batch.sequence_of_label] = micro_batch.pair_of_label
    rows = [
        _Row(micro_batch.sequence_indices[row_of_prompt == number], int(length))
        for number, length in enumerate(prompt_lengths)
    ]
    return rows, _most_likely(model, hidden[0, torch.from_numpy(ends.astype(np.int64)).to(model.device)])


def _decode(model: TrieModel, decoding: Decoding, tokens: list[int]) -> list[int]:
    """The token after `tokens`, one a row."""
    decoding.begin_step()
    hidden = _hidden_states(model, np.array([tokens]), decoding.position_ids, attends=decoding)
    decoding.end_step()
    return _most_likely(model, hidden[0])


def _hidden_states(
    model: TrieModel, input_ids: np.ndarray, position_ids: np.ndarray | Tensor, *, attends: Prefill | Decoding
) -> Tensor:
    decoder = model.network.get_decoder()  # type: ignore[operator]  # of transformers, which is untyped
    output = decoder(
        input_ids=torch.as_tensor(input_ids, dtype=torch.long, device=model.device),
        position_ids=torch.as_tensor(position_ids, dtype=torch.long, device=model.device),
        # A mask with four axes is passed through by the library as it is: `attends` says what is seen.
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),
        use_cache=False,
        attends=attends,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _most_likely(model: TrieModel, hidden_BD: Tensor) -> list[int]:
    tokens: list[int] = model.project(hidden_BD).argmax(dim=-1).tolist()
    return tokens


@contextmanager
def _attention(network: Any, name: str) -> Iterator[None]:
    before = network.config._attn_implementation
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _generate_padded(
    model: TrieModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    max_nodes: int,
    batch_size: int,
    check_stop: CheckStop,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The library's `generate` on rows padded at the left, prompts of similar length together."""
    from transformers import GenerationConfig

    def stop_between_tokens(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        check_stop()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    # Whatever a model's own file asks for besides, such as a repetition penalty: greedy is greedy.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=0,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
    )
    lengths = np.array([len(prompt) for prompt in prompts])
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        check_stop()
        width = int(lengths[order[first]])
        batch = order[first : first + max(1, min(batch_size, max_nodes // width))]
        first += len(batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        is_real = torch.zeros(len(batch), width, dtype=torch.long)
        for row, prompt in enumerate(batch):
            input_ids[row, width - lengths[prompt] :] = torch.as_tensor(np.asarray(prompts[prompt], np.int64))
            is_real[row, width - lengths[prompt] :] = 1
        output = model.network.generate(  # type: ignore[operator]  # of transformers, which is untyped
            input_ids=input_ids.to(model.device),
            attention_mask=is_real.to(model.device),
            generation_config=greedy,
            stopping_criteria=[stop_between_tokens],
        )
        for prompt, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            yield np.array([prompt]), tokens


def _before_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stop_ids, tokens))
