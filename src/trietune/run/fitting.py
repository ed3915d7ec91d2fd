"""Whether token sequences fit into a model: its vocabulary and its positions. Asked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trietune.errors import UserError

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.data.examples import TokenSequences


# No sequence is longer: offsets are counted in these.
LONGEST = 2**31 - 1


def with_max_length(settings: Settings, config: object) -> Settings:
    """The settings with a number for `max_length: auto`: as many tokens as the model has positions.

    Args:
        config: the text config of a causal model of transformers.
    """
    if settings.max_length != "auto":
        return settings
    most = getattr(config, "max_position_embeddings", None)
    longest = most if isinstance(most, int) and most >= 2 else LONGEST
    return settings.model_copy(update={"max_length": longest})


def check_vocabulary(sequences: TokenSequences, num_embeddings: int) -> None:
    """Refuse ids that the model has no vector for, as a tokenizer with added tokens gives.

    Raises:
        UserError: naming the first example with one.
    """
    if not len(sequences.input_ids) or int(sequences.input_ids.max()) < num_embeddings:
        return
    first = int(np.argmax(np.asarray(sequences.input_ids) >= num_embeddings))
    index = int(np.searchsorted(sequences.offsets, first, side="right")) - 1
    raise _outside(int(sequences.input_ids[first]), num_embeddings, f"first in {sequences.ids[index]}")


def check_ids(prompts: Sequence[Sequence[int]], num_embeddings: int) -> None:
    """`check_vocabulary` for prompts.

    Raises:
        UserError: naming the first input with such an id.
    """
    for number, prompt in enumerate(prompts, start=1):
        if prompt and max(prompt) >= num_embeddings:
            raise _outside(max(prompt), num_embeddings, f"input {number}")


def check_positions(longest: int, most: int | None, *, are_learnt: bool, report: Callable[[str], None]) -> None:
    """Refuse sequences that are longer than the positions a model has; say so where they are only unfamiliar to it.

    Args:
        longest: tokens of the longest sequence.
        most: `max_position_embeddings` of the model, if it says so.
        report: takes a line for the user.

    Raises:
        UserError: the model has a vector for each position, and too few of them.
    """
    if most is None or longest <= most:
        return
    if are_learnt:
        raise UserError(
            f"the longest example has {longest:,} tokens, and this model has {most:,} positions",
            next_step=f"shorten or leave out longer examples; `max_length: {most}` does that for training data",
        )
    report(
        f"the longest example has {longest:,} tokens, and this model was made for at most {most:,} "
        "(`max_position_embeddings`): beyond them it knows nothing"
    )


def _outside(token: int, num_embeddings: int, where: str) -> UserError:
    return UserError(
        f"token {token:,} is not in this model, which has {num_embeddings:,} tokens: tokenizer and model do not match",
        where=where,
        next_step="take the tokenizer that belongs to the model, or resize the model's embedding and save it again "
        "(`model.resize_token_embeddings(len(tokenizer))`)",
    )
