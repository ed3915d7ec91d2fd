"""A model that was loaded to be measured or asked: its weights, its adapter, and the proof of what it computes.

Imported once a device has been chosen: transformers starts XLA devices when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from trietune.config.settings import Settings
from trietune.data import make_encoder, make_plain_format
from trietune.data.templates import PromptFormat
from trietune.device import bytes_per_position, micro_batch_bound, widths_of
from trietune.errors import UserError
from trietune.model.adapter.adapter import load_adapter
from trietune.model.adapter.export import base_name_of
from trietune.model.adapter.folder import MAX_TEXT_BYTES, PROMPT_FILE, read_listed, read_plain_file
from trietune.model.architecture import check_architecture, longest_of_one_rope, why_whole_rows
from trietune.model.assemble import assemble
from trietune.model.base.load import load_network, reading_config
from trietune.model.base.randomness import silence_rates
from trietune.model.states import carries_states
from trietune.model.states.memory import STATES_HAVE_MANY_LENGTHS, with_scans
from trietune.run.device_plan import check_device, largest_under_mask, shapes_for_any_data
from trietune.run.opening import Machine, choose_attention, open_base
from trietune.run.proving import (
    length_to_prove,
    positions_on_rows,
    positions_under_masks,
    prove_for_length,
    prove_on_data,
    prove_on_host,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from trietune.data.encoder import Encoder
    from trietune.device import Device
    from trietune.model.base.folder import ModelFolder
    from trietune.model.causal_lm import TrieModel
    from trietune.tracking.tracker import Tracker
    from trietune.trie import Sequences


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be asked.

    Attributes:
        name: for people: the run, the adapter or the base model.
        settings: settings of the run; for anything else, the defaults with overrides.
        prompt_format: the format that the adapter or merged model was trained with; None for a base model.
        max_positions: most positions computed at once.
        say: takes what a user should read.
        proven: under `length`, tokens of the longest row that layers have been proven on.
    """

    name: str
    model: TrieModel
    tokenizer: PreTrainedTokenizerFast
    base: ModelFolder
    settings: Settings
    prompt_format: PromptFormat | None
    device: Device
    max_positions: int
    say: Callable[[str], None] = lambda text: None
    proven: dict[str, int] = field(default_factory=dict)

    @property
    def num_embeddings(self) -> int:
        """Tokens that the model has a vector for."""
        network = cast("PreTrainedModel", self.model.network)
        weight = cast("Tensor", network.get_input_embeddings().weight)
        return int(weight.shape[0])

    def encoder(self, prompt_format: PromptFormat | None = None) -> Encoder:
        """Texts to tokens in `prompt_format`, or the adapter's, or as a conversation, or as they are."""
        return make_encoder(self.tokenizer, prompt_format or self.prompt_format or make_plain_format(self.tokenizer))

    def with_system_prompt(self, text: str) -> LoadedModel:
        """The same model, asked with another system prompt; an empty text is none.

        Raises:
            UserError: it takes no conversations.
        """
        prompt_format = self.encoder().prompt_format
        if prompt_format.kind != "chat":
            raise UserError(
                f"`{self.name}` takes no conversations, so it has no system prompt",
                next_step="leave out `--system`, and write it into the text",
            )
        return replace(self, prompt_format=replace(prompt_format, system_prompt=text))

    def prove_on(self, sequences: Sequences) -> int:
        """Prove the model on a data set, once, unless `self_check` is off.

        Returns:
            Most positions computed at once: fewer than `max_positions` if some layers attend under a mask.

        Raises:
            UserError: the model cannot be computed as it would be here.
        """
        longest = int(np.diff(np.asarray(sequences.offsets)).max(initial=1))
        return self._prove(
            longest,
            lambda: prove_on_data(
                self.model,
                sequences,
                None,
                batching=self.settings.batching,
                with_gradients=False,
                free_bytes=self.device.free_memory_bytes(),
                say=self.say,
            ),
        )

    def prove_for(self, longest: int) -> int:
        """As `prove_on`, for questions that become rows of up to `longest` tokens with their answers."""
        return self._prove(
            longest,
            lambda: prove_for_length(self.model, longest, free_bytes=self.device.free_memory_bytes(), say=self.say),
        )

    def _prove(self, longest: int, prove: Callable[[], object]) -> int:
        length = length_to_prove(self.model.config, longest)
        most = longest_of_one_rope(self.model.config)
        if self.model.attention is not None and most is not None and longest > most:
            raise UserError(
                f"rows of {longest:,} tokens are longer than {most:,}, beyond which this model rotates all rows of a "
                "call by other angles (`rope_type`), so a trie is not what a row by itself is",
                next_step="`--set batching=padded`, or shorter texts",
            )
        # On static shapes the layers were proven on the host, when the model was opened.
        if self.settings.self_check and self.model.shapes is None and length > self.proven.get("length", 0):
            prove()
            self.proven["length"] = length
        if self.model.whole_rows is not None:
            self.model.most_cells = positions_on_rows(
                self.settings, self.model, self.device.free_memory_bytes(), gradient_checkpointing=True
            )
        if not self.model.needs_masks:
            return self.max_positions
        free_bytes, dtype = self.device.free_memory_bytes(), self.model.network.dtype
        bound = positions_under_masks(self.settings, self.model.config, dtype, free_bytes, trains=False)
        return min(bound, self.max_positions)


def load_model(name: str, adapter: Path | None, settings: Settings, machine: Machine, tracker: Tracker) -> LoadedModel:
    """Load the base model and the adapter onto `machine`.

    Args:
        name: of what is loaded, for people; of the base model where there is no adapter.
        adapter: its folder.

    Raises:
        UserError: there is no such base model, or the adapter is not as its manifest says.
    """
    listed = read_listed(adapter, tracker.info) if adapter else None
    opened = open_base(machine, settings, base_name_of(adapter) if adapter else name, tracker)
    device, dtype, base = opened.device, opened.dtype, opened.base
    network = load_network(
        base, dtype=dtype, device=device.loading_device, load_in_4bit=settings.load_in_4bit, report=tracker.info
    )
    silence_rates(network)  # nothing is drawn in evaluation; what is left would have tries refused
    prompt_format = None
    with reading_config(base):
        refusal = check_architecture(network)
        on_rows = why_whole_rows(network)
        if device.has_static_shapes:
            refusal, on_rows = refusal or on_rows, None
            if refusal is None and carries_states(network):
                refusal = STATES_HAVE_MANY_LENGTHS
        widths = with_scans(widths_of(network.config.get_text_config(), network), network)
    if adapter is not None:
        load_adapter(network, adapter, listed=listed)
    # A merged model has it beside its weights.
    place = adapter or base.path
    if os.path.lexists(place / PROMPT_FILE):
        data = read_plain_file(place, PROMPT_FILE, max_bytes=MAX_TEXT_BYTES, listed=listed)
        prompt_format = PromptFormat.from_json(data, where=str(place / PROMPT_FILE))
    if settings.batching != "padded" and refusal is not None:
        settings = settings.model_copy(update={"batching": "padded"})
        check_device(settings, device, machine.options, tracker.info)
    attention, _ = choose_attention(settings, device, network.config.get_text_config(), dtype)
    config = network.config.get_text_config()
    bytes_with_scores = partial(bytes_per_position, config, dtype, widths=widths, gradient_checkpointing=True)
    shapes, max_positions = None, settings.max_tokens_per_micro_batch
    if device.has_static_shapes:
        bound = largest_under_mask(settings, device.free_memory_bytes(), bytes_with_scores)
        shapes = shapes_for_any_data(bound, deepest=config.max_position_embeddings - 1, num_rows=device.num_rows)
        max_positions = bound
    elif max_positions == "auto":
        max_positions = micro_batch_bound(device.free_memory_bytes(), bytes_with_scores())
    on_host = None
    if shapes is not None and settings.self_check:
        on_host = prove_on_host(
            network,
            partial(prove_for_length, longest=shapes.deepest, free_bytes=device.free_memory_bytes(), say=tracker.info),
            say=tracker.info,
        )
    model = assemble(
        network,
        device,
        attention=attention,
        fused_layers=settings.fused_layers,
        pack_weights=settings.pack_weights,
        shapes=shapes,
        why_whole_rows=on_rows,
    )
    if on_host is not None:
        model.needs_masks = on_host.needs_masks
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=opened.tokenizer,
        base=base,
        settings=settings,
        prompt_format=prompt_format,
        device=device,
        max_positions=max_positions,
        say=tracker.info,
    )
