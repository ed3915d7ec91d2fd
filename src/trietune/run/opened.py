"""Use what was trained, or a base model as it comes: open it, evaluate it, ask it, export it.

runs/NAME            a run: its final adapter, its data, its prompt format
runs/NAME/adapter    an adapter: its base model and prompt format; data must be named
sst2-merged          a merged model: its prompt format; data must be named
google/gemma-...     a base model: data, or plain text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trietune.config import load_config
from trietune.config.settings import Settings
from trietune.errors import UserError
from trietune.ranks.launched import refuse_several_processes
from trietune.run.device_plan import check_device, device_options, largest_under_mask, shapes_for_any_data
from trietune.run.prepare import choose_attention, locate_base, make_deterministic, progress_of

if TYPE_CHECKING:
    from trietune.data.encoder import Encoder
    from trietune.data.examples import TokenSequences
    from trietune.data.templates import PromptFormat
    from trietune.device import Device
    from trietune.evaluation.evaluate import Evaluation
    from trietune.model.base.folder import ModelFolder
    from trietune.model.causal_lm import TrieModel
    from trietune.tracking.tracker import Tracker

ANSWERS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to be asked.

    Attributes:
        name: for people: the run, the adapter or the base model.
        settings: of the run; for other things the defaults with what was overridden.
        prompt_format: that the adapter or the merged model was trained with; None for a base model.
        max_positions: most positions computed at once.
    """

    name: str
    model: TrieModel
    tokenizer: Any
    base: ModelFolder
    settings: Settings
    prompt_format: PromptFormat | None
    device: Device
    max_positions: int

    def encoder(self, prompt_format: PromptFormat | None = None) -> Encoder:
        """Texts to tokens in `prompt_format`, or the adapter's, or as a conversation, or as they are."""
        from trietune.data import make_encoder, make_plain_format

        return make_encoder(self.tokenizer, prompt_format or self.prompt_format or make_plain_format(self.tokenizer))


def evaluate(
    target: str | Path,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    split: str = "validation",
    max_examples: int | None = None,
    tracker: Tracker | None = None,
    keep: Path | None = None,
) -> Evaluation:
    """Measure a run, an adapter or a base model.

    Args:
        target: a run's folder, an adapter's folder, or a base model as in `model_name`.
        overrides: of the run's settings, such as `dataset_id=...` or `validation_file=...`.
        split: `train`, `validation` or `test`.
        max_examples: a random subset of this size; None takes all.
        keep: file for what was said to each example: SQuAD's JSON for questions, JSONL otherwise.

    Raises:
        UserError: there is no such model or data.
    """
    from trietune.data.load import load_split
    from trietune.evaluation.evaluate import evaluate as measure
    from trietune.model.base.gguf import cache_folder
    from trietune.run.signals import StopSignals
    from trietune.tracking.tracker import Tracker as Hub

    hub = tracker or Hub()
    if split not in ("train", "validation", "test"):
        raise UserError(f"there is no split `{split}`", next_step="--split validation   (or train, or test)")
    with StopSignals() as signals:
        opened = open_model(target, overrides, hub)
        if opened.prompt_format is not None and not _names_data(opened, target, overrides):
            raise UserError(
                f"`{target}` is a model without a run, so the data to evaluate it on must be named",
                next_step=f"trietune evaluate {target} --dataset stanfordnlp/sst2   (a hub id, a file or a folder)",
            )
        sequences, prompt_format = load_split(
            opened.settings,
            opened.tokenizer,
            split,  # type: ignore[arg-type]  # checked above
            prompt_format=opened.prompt_format,
            cache_folder=cache_folder() / "data",
            report=hub.say,
            progress=progress_of(hub, "examples"),
            check_stop=signals.check,
        )
        size = opened.settings.eval_batch_size
        encoder = opened.encoder(prompt_format)
        found = measure(
            opened.model,
            sequences,
            encoder,
            batching=opened.settings.batching,
            max_nodes=opened.max_positions,
            batch_size=ANSWERS_AT_ONCE if size == "auto" else size,
            max_examples=max_examples,
            seed=opened.settings.seed,
            check_stop=signals.check,
            progress=progress_of(hub, "examples"),
        )
    if keep is not None:
        _keep_predictions(found, sequences, encoder, keep)
    return found


def _keep_predictions(found: Evaluation, sequences: TokenSequences, encoder: Encoder, file: Path) -> None:
    from trietune.io import files
    from trietune.run.predictions import described, predictions_file

    task = encoder.prompt_format.task
    if not found.predictions:
        raise UserError(
            f"there is nothing to write to `{file}`: this data has no labels and no questions, so the model was only "
            "measured by its loss",
            next_step="leave `--predictions` out, or ask with `trietune predict --input FILE`",
        )
    told = described(found.predictions, sequences.examples, task)
    files.replace_file(file, predictions_file(told, is_squad=task.kind == "answers"))


def predict(
    opened: Opened,
    inputs: Sequence[str | Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """What the model says to each input: `{"label", "probabilities"}` for a task with labels, else `{"text"}`."""
    from trietune.evaluation.predict import DEFAULT_MAX_NEW_TOKENS, predict_labels, predict_text

    encoder = opened.encoder()
    if encoder.prompt_format.task.kind == "labels":
        labels = predict_labels(
            opened.model,
            encoder,
            inputs,
            batching=opened.settings.batching,
            max_nodes=opened.max_positions,
            check_stop=check_stop,
        )
        return [{"label": found.label, "probabilities": dict(found.probabilities)} for found in labels]
    texts = predict_text(
        opened.model,
        encoder,
        inputs,
        max_nodes=opened.max_positions,
        batch_size=ANSWERS_AT_ONCE,
        max_new_tokens=max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        check_stop=check_stop,
    )
    return [{"text": text} for text in texts]


def open_model(target: str | Path, overrides: Sequence[str] | Mapping[str, Any], hub: Tracker) -> Opened:
    """Load the base model and the adapter that `target` names.

    Raises:
        UserError: `target` is none of a run, an adapter or a base model; a launcher started several processes.
    """
    refuse_several_processes()
    from trietune.data.encoder import load_tokenizer
    from trietune.data.templates import PromptFormat
    from trietune.device import bytes_per_position, choose_device, choose_dtype, micro_batch_bound

    path = Path(target).expanduser()
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
    check_device(settings, device, options, hub.say)
    # transformers starts an XLA device when it is imported, so these wait until one has been chosen.
    from trietune.model.adapter.adapter import load_adapter
    from trietune.model.adapter.export import base_name_of
    from trietune.model.architecture import check_architecture
    from trietune.model.assemble import assemble
    from trietune.model.base.four_bits import check_four_bits
    from trietune.model.base.load import load_network

    dtype = choose_dtype(settings.dtype, device, where=settings.where("dtype"))
    if settings.load_in_4bit:
        check_four_bits(device, where=settings.where("load_in_4bit"))
    base = locate_base(base_name_of(adapter) if adapter else str(target), hub)
    network = load_network(
        base, dtype=dtype, device=device.loading_device, load_in_4bit=settings.load_in_4bit, report=hub.say
    )
    prompt_format = None
    if adapter is not None:
        load_adapter(network, adapter)
    # A merged model has it beside its weights.
    file = (adapter or base.path) / "prompt_format.json"
    if file.is_file():
        prompt_format = PromptFormat.from_json(file.read_text("utf-8"), where=str(file))
    attention, _ = choose_attention(settings, device, network.config.get_text_config(), dtype)
    if attention is not None and check_architecture(network) is not None:
        settings, attention = settings.model_copy(update={"batching": "padded"}), None
        check_device(settings, device, options, hub.say)
    config = network.config.get_text_config()
    bytes_with_scores = partial(bytes_per_position, config, dtype, gradient_checkpointing=True)
    shapes, max_positions = None, settings.max_tokens_per_micro_batch
    if device.has_static_shapes:
        bound = largest_under_mask(settings, device.free_memory_bytes(), bytes_with_scores)
        shapes = shapes_for_any_data(bound, deepest=config.max_position_embeddings - 1, num_rows=device.num_rows)
        max_positions = bound
    elif max_positions == "auto":
        max_positions = micro_batch_bound(device.free_memory_bytes(), bytes_with_scores())
    return Opened(
        name=str(target),
        model=assemble(
            network,
            device,
            attention=attention,
            fused_layers=settings.fused_layers,
            pack_weights=settings.pack_weights,
            shapes=shapes,
        ),
        tokenizer=load_tokenizer(base.path),
        base=base,
        settings=settings,
        prompt_format=prompt_format,
        device=device,
        max_positions=max_positions,
    )


def _find_adapter(path: Path) -> Path | None:
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def _names_data(opened: Opened, target: str | Path, overrides: Sequence[str] | Mapping[str, Any]) -> bool:
    if (Path(target).expanduser() / "config.yaml").is_file():
        return True
    keys = {item.partition("=")[0] for item in overrides} if not isinstance(overrides, Mapping) else set(overrides)
    return bool(keys & {"dataset_id", "train_file", "validation_file"})
