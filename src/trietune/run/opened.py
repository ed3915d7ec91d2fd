"""Use what was trained, or a base model as it comes: open it, evaluate it, ask it, export it.

runs/NAME            a run: its final adapter, its data, its prompt format
runs/NAME/adapter    an adapter: its base model and prompt format; data must be named
sst2-merged          a merged model: its prompt format; data must be named
google/gemma-...     a base model: data, or plain text
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trietune.config import load_config
from trietune.config.settings import Settings
from trietune.errors import UserError
from trietune.io.outputs import check_output, write_output
from trietune.io.places import expand
from trietune.ranks.launched import refuse_several_processes
from trietune.run.device_plan import check_device, device_options, largest_under_mask, shapes_for_any_data
from trietune.run.fitting import check_ids, check_vocabulary, with_max_length
from trietune.run.objective import evaluate_preferences
from trietune.run.prepare import choose_attention, locate_base, make_deterministic, progress_of
from trietune.run.proving import (
    length_to_prove,
    positions_on_rows,
    positions_under_masks,
    prove_for_length,
    prove_on_data,
    prove_on_host,
)

if TYPE_CHECKING:
    from trietune.data.encoder import Encoder
    from trietune.data.examples import TokenSequences
    from trietune.data.templates import PromptFormat
    from trietune.device import Device
    from trietune.evaluation.evaluate import Evaluation
    from trietune.model.base.folder import ModelFolder
    from trietune.model.causal_lm import TrieModel
    from trietune.tracking.tracker import Tracker
    from trietune.trie import Sequences

ANSWERS_AT_ONCE = 32


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
    tokenizer: Any
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
        network: Any = self.model.network
        return int(network.get_input_embeddings().weight.shape[0])

    def encoder(self, prompt_format: PromptFormat | None = None) -> Encoder:
        """Texts to tokens in `prompt_format`, or the adapter's, or as a conversation, or as they are."""
        from trietune.data import make_encoder, make_plain_format

        return make_encoder(self.tokenizer, prompt_format or self.prompt_format or make_plain_format(self.tokenizer))

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
        from trietune.model.architecture import longest_of_one_rope

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


def evaluate(
    target: str | Path,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    split: str | None = None,
    max_examples: int | None = None,
    tracker: Tracker | None = None,
    keep: Path | None = None,
) -> Evaluation:
    """Measure a run, an adapter or a base model.

    Args:
        target: a run's folder, an adapter's folder, or a base model as in `model_name`.
        overrides: changes to the run's settings, such as `dataset_id=...` or `validation_file=...`.
        split: `train`, `validation` or `test`, as a run splits the data. None takes the validation examples of a run's
            own data, and of other data its validation split, or every row where it has none.
        max_examples: a random subset of this size; None takes all.
        keep: file for what was said to each example: SQuAD's JSON for questions, JSONL otherwise.

    Raises:
        UserError: there is no such model or data.
    """
    from trietune.data.load import load_split
    from trietune.evaluation.evaluate import evaluate_model
    from trietune.io.cache_folder import cache_folder
    from trietune.run.signals import StopSignals

    tracker = tracker or Tracker()
    if split not in (None, "train", "validation", "test"):
        raise UserError(f"there is no split `{split}`", next_step="--split validation   (or train, or test)")
    if keep is not None:
        check_output(keep, "--predictions")
    with StopSignals() as signals:
        opened = open_model(target, overrides, tracker)
        if not _names_data(opened, target, overrides):
            raise UserError(
                f"`{target}` belongs to no run, so name the data to evaluate it on",
                next_step=f"trietune evaluate {target} --dataset stanfordnlp/sst2   (a hub id, a file or a folder)",
            )
        if split is None and not _overridden_data(overrides):
            split = "validation"
        settings = opened.settings
        if _overridden_data(overrides) == {"validation_file"} and not _is_run(target):
            # Nothing else is to be looked up, least of all the default data set.
            settings = settings.model_copy(update={"train_file": settings.validation_file, "dataset_id": None})
        settings = with_max_length(settings, opened.model.config)
        sequences, prompt_format = load_split(
            settings,
            opened.tokenizer,
            split,  # type: ignore[arg-type]  # checked above
            prompt_format=opened.prompt_format,
            cache_folder=cache_folder() / "data",
            report=tracker.info,
            progress=progress_of(tracker, "examples"),
            check_stop=signals.check,
        )
        check_vocabulary(sequences, opened.num_embeddings)
        max_positions = opened.prove_on(sequences)
        if opened.settings.learns_preferences:
            return evaluate_preferences(
                opened.model,
                opened.settings,
                sequences,
                max_positions=max_positions,
                max_examples=max_examples,
                report=tracker.info,
                check_stop=signals.check,
                progress=progress_of(tracker, "examples"),
            )
        size = opened.settings.eval_batch_size
        encoder = opened.encoder(prompt_format)
        found = evaluate_model(
            opened.model,
            sequences,
            encoder,
            batching=opened.settings.batching,
            max_positions=max_positions,
            batch_size=ANSWERS_AT_ONCE if size == "auto" else size,
            max_examples=max_examples,
            seed=opened.settings.seed,
            check_stop=signals.check,
            progress=progress_of(tracker, "examples"),
        )
    if keep is not None:
        _keep_predictions(found, sequences, encoder, keep)
    return found


def _keep_predictions(found: Evaluation, sequences: TokenSequences, encoder: Encoder, file: Path) -> None:
    from trietune.run.predictions import described, predictions_file

    task = encoder.prompt_format.task
    if not found.predictions:
        raise UserError(
            f"there is nothing to write to `{file}`: this data has no labels and no questions, so the model was only "
            "measured by its loss",
            next_step="leave `--predictions` out, or ask with `trietune predict --input FILE`",
        )
    told = described(found.predictions, sequences.examples, task)
    write_output(file, predictions_file(told, is_squad=task.kind == "answers"), "--predictions")


def predict(
    opened: LoadedModel,
    inputs: Sequence[str | Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """What the model says to each input: `{"label", "probabilities"}` for a task with labels, else `{"text"}`."""
    from trietune.evaluation.predict import (
        DEFAULT_MAX_NEW_TOKENS,
        encode_prompt,
        longest_prompt,
        make_examples,
        predict_labels,
        predict_text,
    )

    encoder = opened.encoder()
    check_ids(
        [encode_prompt(encoder, one) for one in make_examples(encoder.prompt_format, inputs)], opened.num_embeddings
    )
    new_tokens = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    max_positions = opened.prove_for(longest_prompt(encoder, inputs) + new_tokens)
    if encoder.prompt_format.task.kind == "labels":
        labels = predict_labels(
            opened.model,
            encoder,
            inputs,
            batching=opened.settings.batching,
            max_positions=max_positions,
            check_stop=check_stop,
        )
        return [{"label": found.label, "probabilities": dict(found.probabilities)} for found in labels]
    texts = predict_text(
        opened.model,
        encoder,
        inputs,
        max_positions=max_positions,
        batch_size=ANSWERS_AT_ONCE,
        max_new_tokens=new_tokens,
        check_stop=check_stop,
    )
    return [{"text": text} for text in texts]


def open_model(target: str | Path, overrides: Sequence[str] | Mapping[str, Any], tracker: Tracker) -> LoadedModel:
    """Load the base model and the adapter that `target` names.

    Raises:
        UserError: `target` is none of a run, an adapter or a base model, its adapter is not as the manifest says, or a
            launcher started several processes.
    """
    refuse_several_processes()
    from trietune.data.encoder import load_tokenizer
    from trietune.data.templates import PromptFormat
    from trietune.device import bytes_per_position, choose_device, choose_dtype, micro_batch_bound, widths_of

    path = expand(target)
    adapter = _find_adapter(path)
    run = path if (path / "config.yaml").is_file() else None
    if path.is_dir() and adapter is None and run is not None:
        raise UserError(
            f"`{target}` has no final adapter: the run did not finish",
            next_step="`trietune train ... --resume` finishes it, or name one of its checkpoints: "
            f"{path}/checkpoints/step-...",
        )
    settings = load_config(run / "config.yaml" if run else None, overrides)
    if settings.deterministic:
        make_deterministic()
    options = device_options(settings)
    device = choose_device(settings.device, use_tt=settings.use_tt, options=options, where=settings.where)
    check_device(settings, device, options, tracker.info)
    # transformers starts an XLA device when it is imported, so these wait until one has been chosen.
    from trietune.model.adapter.adapter import load_adapter
    from trietune.model.adapter.export import base_name_of
    from trietune.model.adapter.folder import MAX_TEXT_BYTES, PROMPT_FILE, read_listed, read_plain_file
    from trietune.model.architecture import check_architecture, why_whole_rows
    from trietune.model.assemble import assemble
    from trietune.model.base.four_bits import check_four_bits
    from trietune.model.base.load import load_network, reading_config
    from trietune.model.base.randomness import silence_rates

    dtype = choose_dtype(settings.dtype, device, where=settings.where("dtype"))
    if settings.load_in_4bit:
        check_four_bits(device, where=settings.where("load_in_4bit"))
    listed = read_listed(adapter, tracker.info) if adapter else None
    base = locate_base(base_name_of(adapter) if adapter else str(target), tracker)
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
        widths = widths_of(network.config.get_text_config(), network)
    if adapter is not None:
        load_adapter(network, adapter, listed=listed)
    # A merged model has it beside its weights.
    place = adapter or base.path
    if os.path.lexists(place / PROMPT_FILE):
        data = read_plain_file(place, PROMPT_FILE, max_bytes=MAX_TEXT_BYTES, listed=listed)
        prompt_format = PromptFormat.from_json(data, where=str(place / PROMPT_FILE))
    if settings.batching != "padded" and refusal is not None:
        settings = settings.model_copy(update={"batching": "padded"})
        check_device(settings, device, options, tracker.info)
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
        name=str(target),
        model=model,
        tokenizer=load_tokenizer(base.path),
        base=base,
        settings=settings,
        prompt_format=prompt_format,
        device=device,
        max_positions=max_positions,
        say=tracker.info,
    )


def _find_adapter(path: Path) -> Path | None:
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def _names_data(opened: LoadedModel, target: str | Path, overrides: Sequence[str] | Mapping[str, Any]) -> bool:
    return _is_run(target) or bool(_overridden_data(overrides))


def _is_run(target: str | Path) -> bool:
    return (expand(target) / "config.yaml").is_file()


def _overridden_data(overrides: Sequence[str] | Mapping[str, Any]) -> set[str]:
    """The keys of `overrides` that name data."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else (item.split("=", 1) for item in overrides)
    named = {key.strip() for key, *value in pairs if value not in ([None], ["null"], [""])}
    return named & {"dataset_id", "train_file", "validation_file"}
