"""From settings to a plan: the model is found, the data read, every `auto` resolved. Nothing is written but caches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trietune.data.answers import AnswerSets
from trietune.data.examples import TokenSequences
from trietune.errors import UserError
from trietune.io.places import expand
from trietune.run.device_plan import check_device, check_processes, check_sharding, device_options, plan_shapes
from trietune.run.environment import PACKAGES, installed_version, sampled_digest, start_adapter
from trietune.run.fitting import check_positions, check_vocabulary, with_max_length
from trietune.run.grouping import choose_groups, measure_batches, num_sampled_of, plan_processes, sharing_of
from trietune.run.objective import Learning, make_objective, rows_of, rows_to_rank
from trietune.run.plan import Plan, describe_defaults, num_steps_of
from trietune.tracking.events import PhaseProgress

if TYPE_CHECKING:
    import torch

    from trietune.config.settings import Settings
    from trietune.data.load import Data
    from trietune.device import Device
    from trietune.model.adapter.targets import Coverage
    from trietune.model.attention.layout import AttentionKind
    from trietune.model.base.folder import ModelFolder
    from trietune.model.base.shape import NetworkShape
    from trietune.ranks.ranks import Ranks
    from trietune.tracking.tracker import Tracker
    from trietune.trie.batch_stats import Work
    from trietune.trie.groups import PrefixGroups

# With `eval_max_examples: auto`, a periodic validation takes about a tenth of the training between two of them; a
# training example costs three forward passes.
VALIDATION_SHARE = 0.1
FEWEST_VALIDATED = 32
DEFAULT_EVAL_BATCH = 32
# Of a parameter of the adapter, in fp32: itself, its gradient, and two moments of the optimizer.
BYTES_PER_TRAINED_PARAMETER = 16
# Ways to attend whose kernels compute probabilities again in the backward pass.
KEEP_NO_SCORES = ("varlen", "flex")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and all that was read to make it.

    Attributes:
        learning: what is learned, before its reference has been scored.
        shape: counts of the network.
        work: work in a few steps, by all processes together.
        num_sampled: examples of these steps.
        start: folder of the initial adapter; None: a new one.
    """

    settings: Settings
    plan: Plan
    base: ModelFolder
    tokenizer: Any
    data: Data
    groups: PrefixGroups | None
    learning: Learning
    shape: NetworkShape
    work: Work
    num_sampled: int
    start: Path | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one process has chosen for all that share a training: where choices follow from a measurement or the disk.

    Attributes:
        directory: folder of the run.
        dtype: dtype of the base model: `float32`, `bfloat16`, `float16`.
    """

    directory: Path
    dtype: str


def prepare_together(settings: Settings, tracker: Tracker, check_stop: Callable[[], None], ranks: Ranks) -> Prepared:
    """`prepare` on every rank: rank 0 first, which makes caches and chooses; then one on each other machine; then all.

    Raises:
        UserError: on every rank, if one fails; and where ranks would not train the same thing.
    """
    first: list[Prepared] = []

    def choose() -> list[str]:
        first.append(prepare(settings, tracker, check_stop, num_processes=ranks.count))
        plan = first[0].plan
        return [str(plan.directory), str(plan.dtype).removeprefix("torch.")]

    directory, dtype = ranks.once(choose)
    chosen = Chosen(Path(directory), dtype)

    def follow() -> Prepared:
        if first:
            return first[0]
        return prepare(settings, tracker, check_stop, num_processes=ranks.count, chosen=chosen)

    prepared = ranks.in_turn(follow)
    plan = prepared.plan
    if ranks.count > 1:
        ranks.agree(
            {
                **{f"`{key}`": value for key, value in settings.dump_public().items()},
                "the training data": prepared.data.train_fingerprint,
                "the validation data": prepared.data.validation_fingerprint,
                "the base model": prepared.base.digest or sampled_digest(prepared.base.path),
                "the converted base model": prepared.base.weights_digest,
                "the initial adapter": start_adapter(prepared),
                "the kind of device": plan.device.kind,
                "the number of steps": plan.num_steps,
                "the grouping of examples": plan.is_grouped,
                **{f"the version of {name}": installed_version(name) for name in PACKAGES},
            }
        )
    return replace(prepared, plan=replace(plan, max_positions=min(ranks.gather(plan.max_positions))))


def prepare(
    settings: Settings,
    tracker: Tracker,
    check_stop: Callable[[], None],
    *,
    num_processes: int = 1,
    chosen: Chosen | None = None,
    device: Device | None = None,
) -> Prepared:
    """Find the model, read the data, choose device and layout; writes nothing but caches.

    Args:
        num_processes: processes that will share the training.
        chosen: by another process, for this one too.
        device: to plan for, which need not be here; None chooses it by the settings.
    """
    from trietune.data.encoder import load_tokenizer
    from trietune.data.load import load_data
    from trietune.device import bytes_per_position, choose_device, choose_dtype, micro_batch_bound
    from trietune.io.cache_folder import cache_folder
    from trietune.model.base.four_bits import check_four_bits

    if settings.dataset_id is None and settings.train_file is None:
        raise UserError(
            "nothing says what to train on: `train_file` and `dataset_id` are not set",
            next_step="write `train_file: data.jsonl`, or type `--data data.jsonl` (or a hub id)",
        )
    for note in settings.notes:
        tracker.warn(note)
    if settings.deterministic:
        make_deterministic()
    options = device_options(settings)
    if device is None:
        device = choose_device(settings.device, use_tt=settings.use_tt, options=options, where=settings.where)
    if device.reason:
        tracker.info(device.reason)
    check_device(settings, device, options, tracker.info)
    check_processes(settings, device, num_processes, tracker.info)
    from trietune.model.base.load import reading_config
    from trietune.model.base.shape import describe_network  # transformers starts XLA devices when it is imported

    asked_dtype = settings.dtype if chosen is None else chosen.dtype
    dtype = choose_dtype(asked_dtype, device, where=settings.where("dtype"))
    if settings.load_in_4bit:
        check_four_bits(device, where=settings.where("load_in_4bit"))

    base = locate_base(settings.model_name, tracker)
    start = None
    if settings.start_adapter is not None:
        from trietune.model.adapter.export import find_adapter

        start = find_adapter(expand(settings.start_adapter))
    tokenizer = load_tokenizer(base.path)
    shape = describe_network(base, dtype=dtype, adapter=adapter_arguments(settings), base_dropout=settings.base_dropout)
    check_sharding(settings, shape)
    for sentence in uncovered(settings, shape.coverage):
        tracker.warn(sentence)
    keeps_dropout = settings.base_dropout and bool(shape.base_rates)
    if settings.batching != "padded" and shape.refusal is not None:
        raise UserError(
            f"batches of `{base.name}` cannot be computed as a trie: {shape.refusal}",
            where=f"`batching: {settings.batching}` ({settings.where('batching')})",
            next_step="`--set base_dropout=False`"
            if settings.base_dropout and "base_dropout" in shape.refusal
            else "`--set batching=padded`, which trains it on plain rows",
        )
    if settings.batching != "padded" and shape.why_whole_rows is not None and device.has_static_shapes:
        raise UserError(
            f"batches of `{base.name}` cannot be computed as a trie on {device.name}: {shape.why_whole_rows}",
            where=f"`batching: {settings.batching}` ({settings.where('batching')})",
            next_step="`--set batching=padded`, which trains it on plain rows",
        )
    with reading_config(base):
        attention, attention_reason = choose_attention(settings, device, shape.config, dtype)
    settings = with_max_length(settings, shape.config)

    kept = cache_folder() / "data"
    data = load_data(
        settings,
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
    if settings.batching != "padded" and shape.longest_in_a_trie is not None and longest > shape.longest_in_a_trie:
        raise UserError(
            f"batches of `{base.name}` cannot be computed as a trie: an example of {longest:,} tokens is longer than "
            f"{shape.longest_in_a_trie:,}, beyond which it rotates all rows of a call by other angles",
            where="config.json: rope_type `longrope` or `dynamic`",
            next_step=f"`--set max_length={shape.longest_in_a_trie}`, or `--set batching=padded`, which rotates "
            "short rows beside long ones as transformers does",
        )
    check_positions(longest, most, are_learnt=shape.has_learnt_positions, report=tracker.info)
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
        and shape.why_whole_rows is None
        and device.runs_own_backwards
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
        # Now, while nobody has loaded anything: later each process would see what the others have taken.
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
    )
    return Prepared(settings, plan, base, tokenizer, data, groups, learning, shape, work, num_sampled, start)


def _plan_learning(settings: Settings, data: Data, tokenizer: Any) -> tuple[Learning, Data]:
    """What is learned from the data; ranking may find that it is a task with labels."""
    objective = make_objective(settings)
    if settings.objective == "rank":
        rows, data = rows_to_rank(data, tokenizer)
        return Learning(settings, objective, rows, None), data
    validation = None if objective is None or data.validation is None else rows_of(settings, data.validation)
    assert validation is None or isinstance(validation, AnswerSets)
    return Learning(settings, objective, rows_of(settings, data.train), validation), data


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


def adapter_arguments(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of `add_adapter`."""
    return {
        "r": settings.lora_r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": settings.lora_target_modules,
        "target_parameters": settings.lora_target_parameters,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.lora_bias,
        "modules_to_save": settings.modules_to_save or None,
        "seed": settings.seed,
    }


def uncovered(settings: Settings, coverage: Coverage) -> list[str]:
    """What carries no adapter although `all-linear` sounds as if it did, in sentences; nothing where names were given.

    Raises:
        UserError: nothing carries one.
    """
    from trietune.model.adapter.targets import SMALLEST_NAMED

    if settings.lora_target_modules != "all-linear":
        return []
    groups = [f"{name} ({share:.0%})" for name, share in coverage.without if share >= SMALLEST_NAMED]
    sentences = []
    if groups:
        shown = ", ".join(groups[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
        advice = ""
        experts = [name.rpartition(".")[2] for name, _ in coverage.without if ".experts." in name]
        if experts and settings.lora_target_parameters == "auto":
            advice = f"; `lora_target_parameters: [{', '.join(dict.fromkeys(experts))}]` adapts the experts"
        sentences.append(f"adapters cover {coverage.share:.0%} of the layers' weights; not covered: {shown}{advice}")
    return sentences


def _check_base_fits(name: str, base_bytes: int, device: Device, num_processes: int) -> None:
    """Refuse several whole base models where their weights alone do not fit."""
    free_bytes = device.free_memory_bytes()
    if base_bytes > free_bytes:
        raise UserError(
            f"`{name}` needs {base_bytes / 1e9:.1f} GB for its weights in each of {num_processes} processes, and "
            f"{free_bytes / 1e9:.1f} GB are free for each",
            where=f"on {device.name}",
            next_step="fewer processes (`--nproc`), a smaller model, or `--set dtype=bfloat16`",
        )


def locate_base(model_name: str, tracker: Tracker) -> ModelFolder:
    """The base model's folder; what is fetched or converted on the way is shown."""
    from trietune.model.base.locate import locate_model

    return locate_model(model_name, report=tracker.info, progress=progress_of(tracker, "bytes"))


def progress_of(tracker: Tracker, unit: str) -> Callable[[str, int, int | None], None]:
    """A progress callback that emits `PhaseProgress`."""

    def progress(phase: str, done: int, total: int | None) -> None:
        tracker.emit(PhaseProgress(phase, done, total, unit))

    return progress


def make_deterministic() -> None:
    """PyTorch's deterministic algorithms; cuBLAS needs its variable before the first product."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def choose_attention(
    settings: Settings, device: Device, config: Any, dtype: torch.dtype
) -> tuple[AttentionKind | None, str | None]:
    """How tries attend, None for padded rows; and why not in the device's best way.

    Args:
        config: the text config of a causal model of transformers.
    """
    from trietune.device.device import AttentionNeeds
    from trietune.device.kernels import ANY_NUMBER_OF_POSITIONS, choose_backend

    if settings.batching == "padded":
        return None, None
    bound = settings.max_tokens_per_micro_batch
    needs = AttentionNeeds(
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
        has_soft_cap=getattr(config, "attn_logit_softcapping", None) is not None,
        num_positions=ANY_NUMBER_OF_POSITIONS if bound == "auto" else bound,
    )
    kind, reason = choose_backend(settings.attention, device, needs, where=settings.where("attention"))
    return cast("AttentionKind", kind), reason


def validation_bound(settings: Settings, data: Data) -> int | None:
    """Examples of a periodic validation; None takes all."""
    if settings.eval_max_examples != "auto":
        return settings.eval_max_examples
    between = settings.val_steps_freq * settings.batch_size * settings.gradient_accumulation_steps
    bound = max(FEWEST_VALIDATED, int(3 * VALIDATION_SHARE * between))
    return None if data.validation is None or bound >= data.validation.num_rows else bound


def run_directory(settings: Settings) -> Path:
    """`<project_dir>/<run name>`; a name that exists gets `-2`, `-3`, unless the run is resumed."""
    first = expand(settings.project_dir) / settings.wandb_run_name
    if settings.resume_from_checkpoint:
        return first
    directory, number = first, 1
    while os.path.lexists(directory):
        number += 1
        directory = first.with_name(f"{first.name}-{number}")
    return directory
