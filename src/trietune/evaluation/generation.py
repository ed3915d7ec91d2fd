"""Greedy generation for many prompts at once, every distinct prefix computed once.

    sorted prompts -> tries of about `batch_size` prompts -> prefill -> decode all rows together -> token ids

Decoding steps are cheaper the more rows they have, so the next trie is prefilled as soon as half of the rows have
finished, and what is left of the older ones decodes along with it. The tokens are those of greedy decoding one prompt
at a time. Where the gold completions are known, they are branches of the same tries, so that an evaluation gets its
loss and its answers from one computation of each context.

Models whose attention cannot be replaced, in all layers or in some, go through transformers' `generate` on padded rows
instead. On devices of
static shapes each token comes from another pass over all tries: nothing is kept from token to token, because what is
kept grows, and every size would be a program of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trietune.data.examples import IGNORED_LABEL
from trietune.errors import UserError
from trietune.evaluation.decoding import Decoding, Prefill, register
from trietune.evaluation.sampling import Sampling
from trietune.evaluation.scoring import (
    CheckStop,
    FlatSequences,
    Progress,
    add_up,
    find_prompt_lengths,
    inference,
    no_progress,
    no_stop,
    sequence_losses,
)
from trietune.model.causal_lm import TrieModel
from trietune.model.decoder_layers import decoder_of
from trietune.model.loss import label_losses
from trietune.trie import MicroBatch, Sequences, common_prefix_lengths, make_micro_batches, sort_sequences

OnToken = Callable[[np.ndarray, int], None]


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Where answers end, and how much is computed at once.

    Attributes:
        stop_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: an answer without a stop token ends here.
        max_positions: most positions that are prefilled at once.
        batch_size: about how many prompts decode together.
        sampling: how tokens are drawn; None takes the likeliest.
    """

    stop_ids: frozenset[int]
    max_new_tokens: int
    max_positions: int
    batch_size: int
    sampling: Sampling | None = None


@dataclass(slots=True)
class _Row:
    """A distinct prompt while it decodes, and the sequences that it stands for: those with this very prompt."""

    sequences: np.ndarray
    tokens: list[int] = field(default_factory=list)


def generate(
    model: TrieModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    limits: GenerationLimits,
    *,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The most likely next token of each prompt, again and again, up to a stop token.

    Args:
        prompts: token ids, at least one each.
        on_token: called with the places of equal prompts and their next token, stop tokens included, as they come.

    Returns:
        The new tokens of each prompt, in the order given.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    if not prompts:
        return []
    sequences = _end_in_a_label(prompts)
    run = _way_to_generate(model)
    with inference(model.network):
        finished = run(model, sequences, np.arange(len(prompts)), limits, check_stop=check_stop, on_token=on_token)
        return _collect(finished, len(prompts), limits, progress)


def generate_and_score(
    model: TrieModel,
    sequences: Sequences,
    indices: np.ndarray,
    limits: GenerationLimits,
    *,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Answers to the prompts of `sequences[indices]`, and how likely their gold completions are, in one pass.

    A prompt ends before the first labeled token, and every sequence has one.

    Returns:
        New tokens of each, the summed loss of its label tokens (float64 [B]), and their number (float64 [B]).
    """
    if (run := _way_to_generate(model)) is not _run_tries:
        losses, weights = sequence_losses(
            model,
            sequences,
            indices,
            batching="padded" if model.attention is None else "trie",
            max_positions=limits.max_positions,
            check_stop=check_stop,
            progress=progress,
        )
        with inference(model.network):
            finished = run(model, sequences, indices, limits, check_stop=check_stop)
            return _collect(finished, len(indices), limits, progress), losses, weights
    losses, weights = np.zeros(len(indices)), np.zeros(len(indices))
    with inference(model.network):
        finished = _run_tries(
            model, sequences, indices, limits, check_stop=check_stop, on_losses=partial(add_up, losses, weights)
        )
        return _collect(finished, len(indices), limits, progress), losses, weights


def _way_to_generate(model: TrieModel) -> Callable[..., Iterator[tuple[np.ndarray, list[int]]]]:
    if model.shapes is not None:
        return _run_static
    return _run_tries if model.attention is not None and model.can_decode else _run_padded


def _end_in_a_label(prompts: Sequence[Sequence[int] | np.ndarray]) -> FlatSequences:
    """Each prompt followed by one labeled token, which is never computed: a trie ends where its last label begins."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths + 1)))
    is_prompt = np.ones(offsets[-1], bool)
    is_prompt[offsets[1:] - 1] = False
    input_ids = np.zeros(offsets[-1], np.int32)
    input_ids[is_prompt] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    return FlatSequences(input_ids, np.where(is_prompt, np.int32(IGNORED_LABEL), np.int32(0)), offsets)


def _collect(
    finished: Iterator[tuple[np.ndarray, list[int]]], num_sequences: int, limits: GenerationLimits, progress: Progress
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(num_sequences)]
    num_done = 0
    for places, tokens in finished:
        answer = list(takewhile(lambda token: token not in limits.stop_ids, tokens))
        for place in places:
            answers[place] = answer
        num_done += len(places)
        progress("answers", num_done, num_sequences)
    return answers


def _run_tries(
    model: TrieModel,
    sequences: Sequences,
    indices: np.ndarray,
    limits: GenerationLimits,
    *,
    check_stop: CheckStop,
    on_losses: Callable[[MicroBatch, np.ndarray, np.ndarray], None] | None = None,
    on_token: OnToken | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the places in `indices` of sequences with one prompt, and their new tokens, as soon as these have ended."""
    place = np.zeros(len(sequences.offsets) - 1, np.int64)
    place[indices] = np.arange(len(indices))
    waiting = _plan_tries(sequences, indices, limits)
    decoding = Decoding(model.device)
    rows: list[_Row] = []
    with _attention(model.network, register()):
        while True:
            check_stop()
            micro_batch = next(waiting, None) if len(rows) <= limits.batch_size // 2 else None
            if micro_batch is not None:
                joining, hidden_ND, ends_of_prompts = _prefill(model, decoding, micro_batch, place)
                if on_losses is not None:
                    on_losses(micro_batch, place[micro_batch.sequence_indices], _losses(model, micro_batch, hidden_ND))
                next_tokens = _choose(model, hidden_ND[ends_of_prompts], limits.sampling)
                rows += joining
                changed = joining
            elif rows:
                next_tokens = _decode(model, decoding, [row.tokens[-1] for row in rows], limits.sampling)
                changed = rows
            else:
                return
            for row, token in zip(changed, next_tokens, strict=True):
                row.tokens.append(token)
                if on_token is not None:
                    on_token(row.sequences, token)
            has_ended = [row.tokens[-1] in limits.stop_ids or len(row.tokens) == limits.max_new_tokens for row in rows]
            decoding.keep(~np.array(has_ended))
            yield from ((row.sequences, row.tokens) for row, ended in zip(rows, has_ended, strict=True) if ended)
            rows = [row for row, ended in zip(rows, has_ended, strict=True) if not ended]


def _plan_tries(sequences: Sequences, indices: np.ndarray, limits: GenerationLimits) -> Iterator[MicroBatch]:
    """Tries of about `batch_size` neighbors in sorted order, cut where neighboring prompts share least."""
    input_ids, starts = np.asarray(sequences.input_ids), np.asarray(sequences.offsets)[indices]
    lengths = find_prompt_lengths(sequences)[indices]
    order = sort_sequences(input_ids, starts, lengths)
    shared = common_prefix_lengths(input_ids, starts[order], lengths[order])
    first = 0
    while first < len(order):
        last = first + limits.batch_size
        if last < len(order):
            # Anywhere in the second half of the batch; the latest of several equal cuts.
            candidates = np.arange(last, first + limits.batch_size // 2, -1)
            last = int(candidates[shared[candidates].argmin()])
        yield from make_micro_batches(
            sequences, indices[order[first:last]], batching="trie", max_positions=limits.max_positions
        )
        first = last


def _prefill(
    model: TrieModel, decoding: Decoding, micro_batch: MicroBatch, place: np.ndarray
) -> tuple[list[_Row], Tensor, Tensor]:
    """Compute a trie; its distinct prompts join the rows that decode.

    Returns:
        Their rows, the hidden states at all labels [N, D], and which of these end a prompt, in the order of the rows.
    """
    trie = micro_batch.trie
    assert trie is not None
    # A sequence's labels are listed from its first to its last, and the first is predicted where the prompt ends.
    sequence, first_label = np.unique(micro_batch.sequence_of_label, return_index=True)
    end_of_sequence = micro_batch.label_index[micro_batch.pair_of_label[first_label]]
    ends, row_of_sequence = np.unique(end_of_sequence, return_inverse=True)
    prefill = Prefill(trie, ends, model.layout(trie), model.device)
    hidden = _hidden_states(model, micro_batch.input_ids, micro_batch.position_ids, attends=prefill)
    decoding.join(prefill, trie.position_ids[ends].astype(np.int64) + 1)
    places = place[micro_batch.sequence_indices[sequence]]
    rows = [_Row(places[row_of_sequence == number]) for number in range(len(ends))]
    at_labels = hidden[0, torch.from_numpy(micro_batch.label_index.astype(np.int64)).to(model.device)]
    return rows, at_labels, torch.from_numpy(np.searchsorted(micro_batch.label_index, ends)).to(model.device)


def _losses(model: TrieModel, micro_batch: MicroBatch, hidden_ND: Tensor) -> np.ndarray:
    labels = torch.from_numpy(micro_batch.labels.astype(np.int64)).to(model.device)
    losses = label_losses(hidden_ND, labels, model.project, model.vocabulary_size)
    return np.asarray(losses.double().cpu().numpy())


def _decode(model: TrieModel, decoding: Decoding, tokens: list[int], sampling: Sampling | None) -> list[int]:
    """The token after `tokens`, one per row."""
    decoding.begin_step()
    hidden = _hidden_states(model, np.array([tokens]), decoding.position_ids, attends=decoding)
    decoding.end_step()
    return _choose(model, hidden[0], sampling)


def _hidden_states(
    model: TrieModel, input_ids: np.ndarray, position_ids: np.ndarray | Tensor, *, attends: Prefill | Decoding
) -> Tensor:
    decoder = decoder_of(model.network)
    output = decoder(
        input_ids=torch.as_tensor(input_ids, dtype=torch.long, device=model.device),
        position_ids=torch.as_tensor(position_ids, dtype=torch.long, device=model.device),
        # A mask with four axes is passed through by transformers as it is: `attends` says what is seen.
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),
        use_cache=False,
        attends=attends,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _choose(model: TrieModel, hidden_BD: Tensor, sampling: Sampling | None) -> list[int]:
    logits_BV = model.project(hidden_BD)
    chosen = logits_BV.argmax(dim=-1) if sampling is None else sampling.choose(logits_BV)
    tokens: list[int] = chosen.tolist()
    return tokens


@contextmanager
def _attention(network: Any, name: str) -> Iterator[None]:
    before = network.config._attn_implementation
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _run_static(
    model: TrieModel,
    sequences: Sequences,
    indices: np.ndarray,
    limits: GenerationLimits,
    *,
    check_stop: CheckStop,
    on_token: OnToken | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Each token of all rows from one pass over tries of their prompts and what they have said so far."""
    if limits.sampling is not None:
        raise UserError(
            "a device of static shapes only takes the likeliest token",
            next_step="leave out `--temperature` and `--top-p`",
        )
    starts, lengths = np.asarray(sequences.offsets)[indices], find_prompt_lengths(sequences)[indices]
    tokens = [np.asarray(sequences.input_ids[a : a + n]).tolist() for a, n in zip(starts, lengths, strict=True)]
    waiting = sort_sequences(np.asarray(sequences.input_ids), starts, lengths)
    while len(waiting):
        batch, waiting = waiting[: limits.batch_size], waiting[limits.batch_size :]
        rows = {int(place): list(tokens[place]) for place in batch}
        while rows:
            check_stop()
            places = list(rows)
            for place, token in zip(places, _next_tokens(model, [rows[p] for p in places], limits), strict=True):
                rows[place].append(token)
                if on_token is not None:
                    on_token(np.array([place]), token)
                num_new = len(rows[place]) - len(tokens[place])
                if token in limits.stop_ids or num_new == limits.max_new_tokens:
                    yield np.array([place]), rows.pop(place)[-num_new:]


def _next_tokens(model: TrieModel, rows: list[list[int]], limits: GenerationLimits) -> list[int]:
    """The most likely token after each row."""
    sequences = _end_in_a_label(rows)
    following = [0] * len(rows)
    micro_batches = make_micro_batches(
        sequences, np.arange(len(rows)), batching="trie", max_positions=limits.max_positions
    )
    for micro_batch in model.pad_to_shapes(micro_batches):
        chosen = model.likeliest(micro_batch).cpu().numpy()
        of_label = chosen[micro_batch.pair_of_label]
        for sequence, token in zip(micro_batch.sequence_of_label, of_label, strict=True):
            following[micro_batch.sequence_indices[sequence]] = int(token)
    return following


def _run_padded(
    model: TrieModel,
    sequences: Sequences,
    indices: np.ndarray,
    limits: GenerationLimits,
    *,
    check_stop: CheckStop,
    on_token: OnToken | None = None,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The library's `generate` on rows padded at the left, prompts of similar length together."""
    from transformers import GenerationConfig

    sampling = limits.sampling
    # Whatever a model's own file asks for besides, such as a repetition penalty: greedy is greedy.
    rules = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=limits.max_new_tokens,
        eos_token_id=sorted(limits.stop_ids),
        pad_token_id=0,
        do_sample=sampling is not None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0 if sampling is None else sampling.temperature,
        top_p=1.0 if sampling is None else sampling.top_p,
        top_k=0 if sampling is not None else 50,
    )
    starts, lengths = np.asarray(sequences.offsets)[indices], find_prompt_lengths(sequences)[indices]
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        width = int(lengths[order[first]])
        batch = order[first : first + max(1, min(limits.batch_size, limits.max_positions // width))]
        if model.whole_rows is not None:
            # What such a model makes of padding in front of a prompt was not proven, so there is none.
            batch = batch[lengths[batch] == width]
        first += len(batch)
        input_ids = np.zeros((len(batch), width), np.int64)
        is_real = np.arange(width) >= width - lengths[batch, None]
        input_ids[is_real] = np.concatenate(
            [sequences.input_ids[starts[at] : starts[at] + lengths[at]] for at in batch]
        )

        def between_tokens(so_far: Tensor, scores: Tensor, batch: np.ndarray = batch, **_: object) -> Tensor:
            check_stop()
            if on_token is not None:
                for at, token in zip(batch, so_far[:, -1].tolist(), strict=True):
                    on_token(np.array([at]), token)
            return torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)

        check_stop()
        with _attention(model.network, model.library_attention):
            output = model.network.generate(  # type: ignore[operator]  # of transformers, which is untyped
                input_ids=torch.from_numpy(input_ids).to(model.device),
                attention_mask=torch.from_numpy(is_real.astype(np.int64)).to(model.device),
                generation_config=rules,
                stopping_criteria=[between_tokens],
            )
        for at, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            yield np.array([at]), tokens
