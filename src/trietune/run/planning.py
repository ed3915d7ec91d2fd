"""From a device and settings to a plan: the model is found, the data read, every `auto` resolved.

Imported once a device has been chosen: transformers starts XLA devices when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trietune.data.answers import AnswerSets
from trietune.data.examples import TokenSequences
from trietune.data.load import load_data
from trietune.data.loaded_data import Data
from trietune.device import bytes_per_position, micro_batch_bound
from trietune.errors import UserError
from trietune.io.cache_folder import cache_folder
from trietune.model.base.load import reading_config
from trietune.run.describing import (
    check_longest,
    check_trie,
    check_trie_on,
    describe,
    find_start,
    uncovered,
    with_start,
)
from trietune.run.device_plan import plan_shapes
from trietune.run.fitting import check_positions, check_vocabulary, with_max_length
from trietune.run.grouping import choose_groups, measure_batches, num_sampled_of, plan_processes, sharing_of
from trietune.run.objective import Learning, make_objective, rows_of, rows_to_rank
from trietune.run.opening import Machine, choose_attention, open_base, progress_of
from trietune.run.plan import Plan, describe_defaults, num_steps_of, run_directory
from trietune.run.prepared import Chosen, Prepared
from trietune.run.resuming import begins_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trietune.config.settings import Settings
    from trietune.data.loaded_data import Data
    from trietune.device import Device
    from trietune.tracking.tracker import Tracker

# With `eval_max_examples: auto`, a periodic validation takes about a tenth of the training between two of them; a
# training example costs three forward passes.
VALIDATION_SHARE = 0.1
FEWEST_VALIDATED = 32
DEFAULT_EVAL_BATCH = 32
# Of a parameter of the adapter, in fp32: itself, its gradient, and two moments of the optimizer.
BYTES_PER_TRAINED_PARAMETER = 16
# Ways to attend whose kernels compute probabilities again in the backward pass.
KEEP_NO_SCORES = ("varlen", "flex")


def plan_run(
    machine: Machine,
    settings: Settings,
    tracker: Tracker,
    check_stop: Callable[[], None],
    *,
    num_processes: int,
    chosen: Chosen | None,
) -> Prepared:
    """Find the model, read the data, and choose how it is laid out on `machine`."""
    opened = open_base(machine, settings, settings.model_name, tracker, dtype=None if chosen is None else chosen.dtype)
    device, dtype, base, tokenizer = opened.device, opened.dtype, opened.base, opened.tokenizer
    start = find_start(settings)
    settings = with_start(settings, start, tracker.info)
    shape = describe(settings, opened)
    for sentence in uncovered(settings, shape.coverage):
        tracker.warn(sentence)
    check_trie(settings, base.name, shape)
    check_trie_on(settings, base.name, shape, device)
    keeps_dropout = settings.base_dropout and bool(shape.base_rates)
    with reading_config(base):
        attention, attention_reason = choose_attention(settings, device, shape.config, dtype)
    settings = with_max_length(settings, shape.config)

    kept = cache_folder() / "data"
    data = load_data(
        _as_it_began(settings, run_directory(settings) if chosen is None else chosen.directory),
        tokenizer,
        cache_folder=kept,
        report=tracker.info,
        progress=progress_of(tracker, "examples"),
        check_stop=check_stop,
    )
    if settings.early_stopping_patience is not None and data.validation is None:
        raise UserError(
            "`early_stopping_patience` waits for evaluations, and there is no validation data",
            where=settings.where("early_stopping_patience"),
            next_step="write `validation_file: valid.jsonl`, or remove the key",
        )
    learning, data = _plan_learning(settings, data, tokenizer)
    check_vocabulary(data.train, shape.num_embeddings)
    longest = data.counts.train.longest
    if data.validation is not None and data.counts.validation is not None:
        check_vocabulary(data.validation, shape.num_embeddings)
        longest = max(longest, data.counts.validation.longest)
    most = getattr(shape.config, "max_position_embeddings", None)
    check_positions(longest, most, are_learnt=shape.has_learnt_positions, report=tracker.info)
    check_longest(settings, base.name, shape, longest)
    rows = learning.rows
    num_train = rows.num_rows
    groups, work = choose_groups(settings, data, rows, kept, tracker)
    steps_per_epoch, num_steps = num_steps_of(settings, num_train)
    in_all_epochs = steps_per_epoch * settings.num_epochs
    if settings.max_steps is not None and settings.max_steps > in_all_epochs:
        tracker.info(f"`num_epochs: {settings.num_epochs}` ends after {in_all_epochs:,} steps, before `max_steps`")
    bytes_with_scores = partial(
        bytes_per_position,
        shape.config,
        dtype,
        widths=shape.widths,
        labels_per_position=work.labels_per_position,
        gradient_checkpointing=settings.gradient_checkpointing,
        is_fused=settings.fused_layers
        and device.runs_own_backwards
        and shape.why_whole_rows is None
        and not settings.lora_dropout
        and not settings.use_dora
        and not settings.load_in_4bit
        and not keeps_dropout,
    )
    kept_scores = 0.0 if attention in KEEP_NO_SCORES else work.scores_per_position
    position_bytes = bytes_with_scores(scores_per_position=kept_scores)
    base_bytes = shape.num_bytes(dtype, load_in_4bit=settings.load_in_4bit)
    if settings.parallelism_strategy == "fsdp":
        base_bytes -= shape.num_in_layers * dtype.itemsize * (num_processes - 1) // num_processes
    model_bytes = base_bytes + BYTES_PER_TRAINED_PARAMETER * shape.num_trainable
    if num_processes > 1 and chosen is None:
        # Now, while nothing has been loaded: later each process would see what the others have taken.
        _check_base_fits(base.name, base_bytes, device, num_processes)
    free_bytes = device.free_memory_bytes() - model_bytes
    max_positions = settings.max_tokens_per_micro_batch
    if max_positions == "auto":
        max_positions = micro_batch_bound(free_bytes, position_bytes)
    static = None
    if device.has_static_shapes:
        static = plan_shapes(
            settings, device, rows, learning.validation or data.validation, groups, free_bytes, bytes_with_scores
        )
        max_positions = static.shapes.max_positions
        position_bytes = bytes_with_scores(scores_per_position=max_positions)
    if work.largest > max_positions:
        work = measure_batches(settings, rows, groups, max_positions)
    # Multiplications of one label at the head, over those of one token in the layers.
    label_cost = shape.config.vocab_size * shape.config.hidden_size / max(shape.num_in_layers, 1)
    processes = None
    num_sampled = num_sampled_of(settings, num_train)
    sharing = sharing_of(work, num_sampled)
    if num_processes > 1:
        processes, work, num_sampled = plan_processes(settings, rows, groups, num_processes, label_cost, max_positions)
    plan = Plan(
        directory=run_directory(settings) if chosen is None else chosen.directory,
        model_name=base.name,
        model_revision=base.revision,
        num_parameters=shape.num_parameters,
        num_trainable=shape.num_trainable,
        adapted_share=shape.coverage.share,
        base_rates=shape.base_rates,
        keeps_dropout=settings.base_dropout,
        device=device,
        dtype=dtype,
        load_in_4bit=settings.load_in_4bit,
        batching=settings.batching,
        attention=attention,
        attention_reason=attention_reason,
        why_whole_rows=None if settings.batching == "padded" else shape.why_whole_rows,
        is_grouped=groups is not None,
        max_positions=max_positions,
        num_train=num_train,
        num_validation=data.validation.num_rows if data.validation is not None else 0,
        batch_size=settings.batch_size,
        batches_per_step=settings.gradient_accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=settings.num_warmup_steps(num_steps),
        eval_max_examples=validation_bound(settings, data),
        eval_batch_size=DEFAULT_EVAL_BATCH if settings.eval_batch_size == "auto" else settings.eval_batch_size,
        sharing=sharing,
        model_bytes=model_bytes,
        position_bytes=position_bytes,
        largest_micro_batch=work.largest,
        static=static,
        objective=_describe_objective(settings, learning),
        label_cost=label_cost,
        processes=processes,
        max_length=cast("int", settings.max_length),
        longest=data.counts.train.longest,
        defaults=describe_defaults(settings),
        data_lines=data.lines,
    )
    return Prepared(settings, plan, base, tokenizer, data, groups, learning, shape, work, num_sampled, start)


def _as_it_began(settings: Settings, directory: Path) -> Settings:
    """The settings to read data with, for a run that may go on."""
    begins = begins_with_bos(directory) if settings.add_bos == "auto" and settings.resume_from_checkpoint else None
    return settings if begins is None else settings.model_copy(update={"add_bos": begins})


def _plan_learning(settings: Settings, data: Data, tokenizer: PreTrainedTokenizerFast) -> tuple[Learning, Data]:
    """What is learned from the data; ranking may find that it is a task with labels."""
    objective = make_objective(settings)
    if settings.objective == "rank":
        rows, data = rows_to_rank(data, tokenizer)
        return Learning(settings, objective, rows, None), data
    validation = None if objective is None or data.validation is None else rows_of(settings, data.validation)
    assert validation is None or isinstance(validation, AnswerSets)
    parts = [(part.name, part.sequences.num_rows) for part in data.parts if len(data.parts) > 1]
    return Learning(settings, objective, rows_of(settings, data.train), validation, parts=parts), data


def _describe_objective(settings: Settings, learning: Learning) -> str | None:
    """For the plan; None for `sft` without weights."""
    rows = learning.rows
    if learning.objective is None:
        has_weights = isinstance(rows, TokenSequences) and rows.weights is not None
        return "sft, the loss of each label times its `weight`" if has_weights else None
    assert isinstance(rows, AnswerSets)
    answers = f"{int(rows.is_trained.sum()):,} answers in {rows.num_rows:,} rows"
    reference = ""
    if learning.objective.needs_reference:
        reference = f", against {'`' + settings.start_adapter + '`' if settings.start_adapter else 'the base model'}"
    return f"{settings.objective}, {answers}{reference}"


def _check_base_fits(name: str, base_bytes: int, device: Device, num_processes: int) -> None:
    """Refuse several whole base models where even their weights do not fit."""
    free_bytes = device.free_memory_bytes()
    if base_bytes > free_bytes:
        raise UserError(
            f"`{name}` needs {base_bytes / 1e9:.1f} GB for its weights in each of {num_processes} processes, and "
            f"{free_bytes / 1e9:.1f} GB are free for each",
            where=f"on {device.name}",
            next_step="fewer processes (`--nproc`), a smaller model, or `--set dtype=bfloat16`",
        )


def validation_bound(settings: Settings, data: Data) -> int | None:
    """Examples of a periodic validation; None takes all."""
    if settings.eval_max_examples != "auto":
        return settings.eval_max_examples
    # Without periodic validation, that of checkpoints is the only one.
    between = (
        (settings.val_steps_freq or settings.steps_freq) * settings.batch_size * settings.gradient_accumulation_steps
    )
    bound = max(FEWEST_VALIDATED, int(3 * VALIDATION_SHARE * between))
    return None if data.validation is None or bound >= data.validation.num_rows else bound
