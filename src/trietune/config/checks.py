"""Values that are right by themselves and contradict each other. Each message names both keys and where they stand."""

from __future__ import annotations

from collections.abc import Iterator

from trietune.config.problems import Problem
from trietune.config.secrets import without_secrets
from trietune.config.settings import Settings
from trietune.config.yaml12 import write_value
from trietune.errors import in_short
from trietune.io.metric_names import kind_of

# Where an address of each storage begins; another backend is an fsspec protocol and has its own name in front.
_SCHEMES = {
    "local": ("", "file"),
    "s3": ("s3", "s3a"),
    "gcs": ("gs", "gcs"),
    "azure": ("az", "abfs", "abfss", "adl"),
    "hf": ("hf",),
}


# Keys of some objectives, refused beside others: nothing would come of them.
OBJECTIVES_OF_KEY = {
    "dpo_beta": ("dpo", "ipo"),
    "dpo_label_smoothing": ("dpo",),
    "simpo_beta": ("simpo",),
    "simpo_gamma": ("simpo",),
    "orpo_lambda": ("orpo",),
    "kto_beta": ("kto",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "sft_weight": ("dpo", "ipo", "simpo", "orpo"),
    "pairs": ("dpo", "ipo", "simpo", "orpo"),
    "rank_by": ("rank",),
}


def contradictions(settings: Settings) -> list[Problem]:
    """Every pair of keys that cannot both be meant."""
    return [
        *_data(settings),
        *_objective(settings),
        *_adapter(settings),
        *_steps(settings),
        *_optimizer(settings),
        *_validation(settings),
        *_batching(settings),
        *_trackers(settings),
        *_checkpoints(settings),
        *_early_stopping(settings),
        *_storage(settings),
        *_devices(settings),
    ]


def without_effect(settings: Settings) -> list[str]:
    """Settings that change nothing beside the others, one line each: no mistake, but worth a word."""
    notes = []
    if settings.load_from_storage and not settings.resume_from_checkpoint:
        notes.append("`load_from_storage` is only for resuming: add `--resume`, or `resume_from_checkpoint: auto`")
    if settings.remote_path and not (settings.sync_to_storage or settings.load_from_storage):
        notes.append("`remote_path` is not used: `sync_to_storage` and `load_from_storage` are False")
    if settings.tracker not in {"auto", "wandb"} and settings.use_wandb:
        notes.append(
            f"`tracker: {settings.tracker}` decides: `use_wandb: True` ({settings.where('use_wandb')}) is not used"
        )
    return notes


def _data(settings: Settings) -> Iterator[Problem]:
    # Data that is not named at all is asked for when it is read: to ask a model needs none.
    is_only_cleared = settings.model_fields_set & {"dataset_id", "train_file"} == {"dataset_id"}
    if settings.dataset_id is None and settings.train_file is None and is_only_cleared:
        yield _clash(settings, "dataset_id", "train_file", "needs", "write `train_file: data.jsonl`")
    yield from _several(settings)
    if settings.learns_preferences:
        if settings.completion_template is not None:
            why = "preferences bring their answers in columns: `chosen` and `rejected`, or others"
            yield _clash(settings, "completion_template", "objective", "does not fit", "remove it", why)
    elif settings.prompt_template is not None and settings.completion_template is None:
        yield _clash(settings, "prompt_template", "completion_template", "needs", "write what the model should answer")
    if settings.completion_template is not None and settings.prompt_template is None:
        yield _clash(settings, "completion_template", "prompt_template", "needs", "write what the model is given")
    # Of several data sets, one may hold conversations and another columns.
    is_one = not isinstance(settings.dataset_id, tuple) and not isinstance(settings.train_file, tuple)
    if settings.chat_template is not None and settings.prompt_template is not None and is_one:
        yield _clash(settings, "chat_template", "prompt_template", "excludes", "remove one of the two")


def _several(settings: Settings) -> Iterator[Problem]:
    """Of several data sets."""
    if isinstance(settings.dataset_id, tuple) and settings.train_file is not None:
        why = "beside `train_file` it names one task"
        remedy = "write all files and data sets as one list under `dataset_id`, and remove `train_file`"
        yield _clash(settings, "dataset_id", "train_file", "excludes", remedy, why)
    if settings.data_shares is None:
        return
    key = "dataset_id" if settings.train_file is None else "train_file"
    named = getattr(settings, key)
    number = len(named) if isinstance(named, tuple) else 1
    if number != len(settings.data_shares):
        has = "one number" if len(settings.data_shares) == 1 else f"{len(settings.data_shares)} numbers"
        why = f"it has {has}, and `{key}` names {number if named else 'nothing'}"
        remedy = "write one number for each of them, or `data_shares: null`"
        yield _clash(settings, "data_shares", key, "does not fit", remedy, why)


def _objective(settings: Settings) -> Iterator[Problem]:
    for key, objectives in OBJECTIVES_OF_KEY.items():
        has_value = getattr(settings, key) != type(settings).model_fields[key].default
        if has_value and settings.objective not in objectives:
            remedy = f"remove it, or write `objective: {objectives[0]}`"
            why = f"it belongs to {', '.join(f'`{name}`' for name in objectives)}"
            yield _clash(settings, key, "objective", "does not fit", remedy, why)
    if settings.init_adapter and settings.sft_checkpoint_path:
        remedy = "remove `sft_checkpoint_path`"
        yield _clash(settings, "sft_checkpoint_path", "init_adapter", "means the same as", remedy)
    if settings.kto_desirable_weight == 0 and settings.kto_undesirable_weight == 0:
        why = "nothing would be learned"
        remedy = "write `kto_desirable_weight: 1`"
        yield _clash(settings, "kto_desirable_weight", "kto_undesirable_weight", "does not fit", remedy, why)


def _adapter(settings: Settings) -> Iterator[Problem]:
    targets = settings.lora_target_modules
    both = [name for name in settings.modules_to_save if not isinstance(targets, str) and name in targets]
    if both:
        why = f"a module is trained whole or through an adapter, not both: {', '.join(f'`{name}`' for name in both)}"
        yield _clash(
            settings, "modules_to_save", "lora_target_modules", "overlaps with", "remove it from one list", why
        )


def _steps(settings: Settings) -> Iterator[Problem]:
    if settings.warmup_ratio and settings.warmup_steps:
        yield _clash(settings, "warmup_ratio", "warmup_steps", "excludes", "remove one of the two")
    if settings.max_steps is not None and settings.warmup_steps >= max(settings.max_steps, 1):
        why = "the learning rate would never reach its value"
        yield _clash(settings, "warmup_steps", "max_steps", "does not fit", "write fewer warm-up steps", why)
    if settings.num_epochs == 0 and settings.max_steps is not None:
        why = "zero epochs means evaluation only"
        yield _clash(settings, "max_steps", "num_epochs", "does not fit", "write `num_epochs: 1`, or remove it", why)


def _optimizer(settings: Settings) -> Iterator[Problem]:
    for key in ("adam_beta1", "adam_beta2", "adam_eps"):
        is_set = getattr(settings, key) != type(settings).model_fields[key].default
        if is_set and "adamw" not in settings.optim:
            yield _clash(settings, key, "optim", "does not fit", "write `optim: adamw_torch`", "it is AdamW's")


def _validation(settings: Settings) -> Iterator[Problem]:
    for key in ("validation_file", "early_stopping_patience"):
        if not settings.do_validation and getattr(settings, key) is not None:
            remedy = f"write `do_validation: True`, or remove `{key}`"
            yield _clash(settings, "do_validation", key, "does not fit", remedy)


def _batching(settings: Settings) -> Iterator[Problem]:
    if settings.batching == "padded" and settings.attention != "auto":
        why = "padded rows use the model's own attention"
        yield _clash(settings, "attention", "batching", "does not fit", "write `attention: auto`", why)
    if settings.group_by_prefix is True and settings.batching != "trie":
        why = "only a trie shares a beginning"
        yield _clash(settings, "group_by_prefix", "batching", "does not fit", "write `group_by_prefix: auto`", why)
    bound = settings.max_tokens_per_micro_batch
    if bound != "auto" and settings.max_length != "auto" and bound < settings.max_length:
        why = "an example of full length would not fit into a micro-batch"
        remedy = f"write `max_tokens_per_micro_batch: {settings.max_length}` or more"
        yield _clash(settings, "max_tokens_per_micro_batch", "max_length", "is below", remedy, why)


def _trackers(settings: Settings) -> Iterator[Problem]:
    if not settings.use_wandb and settings.tracker == "wandb":
        yield _clash(settings, "tracker", "use_wandb", "does not fit", "write `use_wandb: True`, or `tracker: auto`")
    if settings.model_to_wandb and not settings.use_wandb:
        why = "nothing can be uploaded to W&B without W&B"
        yield _clash(settings, "model_to_wandb", "use_wandb", "needs", "write `use_wandb: True`", why)


def _checkpoints(settings: Settings) -> Iterator[Problem]:
    if settings.resume_option == "path" and not settings.checkpoint_path:
        remedy = f"write `checkpoint_path: {settings.project_dir}/{settings.wandb_run_name}/checkpoints/step-00000050`"
        yield _clash(settings, "resume_option", "checkpoint_path", "needs", f"{remedy}, with the step that you want")
    if settings.checkpoint_path and settings.resume_option != "path" and settings.resume_from_checkpoint:
        yield _clash(settings, "checkpoint_path", "resume_option", "does not fit", "write `resume_option: path`")
    right = kind_of(settings.checkpoint_metric).better
    if right and settings.checkpoint_metric_mode != right:
        why = "the worst checkpoints would be kept as the best"
        remedy = f"write `checkpoint_metric_mode: {right}`"
        yield _clash(settings, "checkpoint_metric_mode", "checkpoint_metric", "does not fit", remedy, why)


def _early_stopping(settings: Settings) -> Iterator[Problem]:
    if settings.early_stopping_threshold and settings.early_stopping_patience is None:
        remedy = "write `early_stopping_patience: 3`, the evaluations to wait"
        yield _clash(settings, "early_stopping_threshold", "early_stopping_patience", "needs", remedy)


def _storage(settings: Settings) -> Iterator[Problem]:
    for key in ("sync_to_storage", "load_from_storage"):
        if getattr(settings, key) and not settings.remote_path:
            yield _clash(settings, key, "remote_path", "needs", "write a folder, or an address: `s3://bucket/run`")
    scheme, separator, _ = settings.remote_path.partition("://")
    scheme = scheme if separator else ""
    backend = settings.storage_backend
    if separator and scheme not in _SCHEMES.get(backend, (backend,)):
        right = next((name for name, schemes in _SCHEMES.items() if scheme in schemes), scheme)
        remedy = f"write `storage_backend: {right}`"
        yield _clash(settings, "remote_path", "storage_backend", "does not fit", remedy)


def _devices(settings: Settings) -> Iterator[Problem]:
    if settings.device == "tt" and not settings.use_tt:
        yield _clash(settings, "device", "use_tt", "does not fit", "write `use_tt: True`, or `device: auto`")
    if settings.dtype == "float16" and settings.device in {"cpu", "mps"}:
        why = "float16 overflows without a gradient scaler, which only CUDA has"
        yield _clash(settings, "dtype", "device", "does not fit", "write `dtype: bfloat16`", why)
    if settings.optim.endswith("_8bit") and settings.device not in {"auto", "cuda"}:
        why = "bitsandbytes keeps its 8-bit states only on CUDA"
        yield _clash(settings, "optim", "device", "does not fit", "write `optim: adamw_torch`", why)
    shape, names = settings.mesh_shape, settings.mesh_axis_names
    if shape is not None and names is not None and len(shape) != len(names):
        yield _clash(settings, "mesh_shape", "mesh_axis_names", "does not fit", "write one name for each axis")
    if names is not None and shape is None:
        yield _clash(settings, "mesh_axis_names", "mesh_shape", "needs", 'write `mesh_shape: "1,1"` with your sizes')
    if settings.tp_sharding_specs is not None and settings.model_sharding_patterns is not None:
        yield _clash(
            settings, "tp_sharding_specs", "model_sharding_patterns", "means the same as", "remove one of them"
        )
    if settings.parallelism_strategy == "fsdp":
        why = "what is sharded over processes is a frozen base model in `dtype`, under a plain adapter"
        for key, plain in (("load_in_4bit", False), ("use_dora", False), ("gradient_checkpointing", False),
                           ("modules_to_save", ()), ("lora_bias", "none"), ("mesh_shape", None)):  # fmt: skip
            if getattr(settings, key) != plain:
                remedy = "write `parallelism_strategy: data_parallel`"
                yield _clash(settings, "parallelism_strategy", key, "does not fit", remedy, why)
    size = settings.trace_region_size
    if size is not None and settings.trace_region_size_mb != -(-size // 1_000_000):
        yield _clash(settings, "trace_region_size", "trace_region_size_mb", "does not fit", "remove one of the two")
    if settings.trace_region_size_mb is not None and not settings.enable_trace:
        yield _clash(settings, "trace_region_size_mb", "enable_trace", "needs", "write `enable_trace: True`")


def _clash(settings: Settings, key: str, other: str, relation: str, remedy: str, why: str | None = None) -> Problem:
    first = f"`{key}: {_shown(settings, key)}` ({settings.where(key)})"
    value = getattr(settings, other)
    if relation == "needs" and value in ("", None):
        return Problem(f"{first} needs `{other}`, which is empty ({settings.where(other)})", why, remedy, (key, other))
    second = f"`{other}: {_shown(settings, other)}` ({settings.where(other)})"
    return Problem(f"{first} {relation} {second}", why, remedy, (key, other))


def _shown(settings: Settings, key: str) -> str:
    return in_short(write_value(without_secrets(getattr(settings, key))))
