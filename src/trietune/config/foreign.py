"""What other fine-tuning tools call things, and what to write here: answered, never silently accepted.

A name means something else in another tool often enough (a batch size per device, labels on prompts) that taking it
over without a word would train something else than the author had in mind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trietune.config.blocks import BLOCKS
from trietune.config.yaml12 import write_value

HF = "transformers, TRL"
AXOLOTL = "axolotl"
FACTORY = "LLaMA-Factory"
MLX = "mlx_lm"


@dataclass(frozen=True, slots=True)
class ForeignName:
    """A name of other tools: whose it is, the keys here that do its work, what to write, and what is different.

    `write` may hold `{value}`, the value that the user gave; None where nothing needs to be written.
    """

    tools: str
    keys: tuple[str, ...]
    write: str | None
    difference: str = ""


def _same(tools: str, key: str, difference: str = "") -> ForeignName:
    return ForeignName(tools, (key,), f"`{key}: {{value}}`", difference)


_PROCESSES = (
    "the number of processes is not part of a training: `trietune train --nproc N`, or torchrun; "
    "`parallelism_strategy: fsdp` shards the base model over them"
)
_PER_DEVICE = "it counts one device, `batch_size` all of them before accumulation: multiply by the number of devices"
_ALWAYS_COMPLETIONS = "labels are always on completions only"
_NO_PACKING = "nothing is padded here: a trie computes each shared beginning once"
_REVISION = '`model_name: "owner/name@{text}"`'
_AFTER_NAME = "a revision follows the model's name after `@`"
_OWN_BETA = "each objective has its own"
_WHOLE_LENGTH = "`max_length` bounds prompt and answer together"
_NO_SECRETS = "a configuration is kept and shared, and a secret is not"
_DTYPE_HERE = "the base model's number format is one key here, and the adapter is float32 in any case"
_FOUR_BITS = "the base model's layers are held in `dtype` or, with `load_in_4bit: True`, in 4 bits"

_BLOCK = "a block of keys there; with keys below it, it is read, and its keys may also stand alone"
_HELD_OUT = "without `validation_file`, a twentieth of the training data is held out, at most 1,000 examples"
_NO_WORKERS = "one process reads the data, ahead of the steps"
_WORKERS = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "dataloader_drop_last")  # fmt: skip
_DDP = ("local_rank", "ddp_find_unused_parameters", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb")
_FORM_IS_SEEN = "a local file goes under `train_file`; its form (Alpaca, ShareGPT, chat, ...) is told by its columns"
_OWN_LAYERS = "`fused_layers` turns on this program's own"
_PATIENCE = "early_stopping_patience"
_COUNTS_EVALUATIONS = "it counts evaluations without a better `checkpoint_metric`; `val_steps_freq` says how often"

FOREIGN_NAMES: Mapping[str, ForeignName] = {
    # model
    "model_name_or_path": _same(f"{HF}, {FACTORY}", "model_name"),
    "base_model": _same(AXOLOTL, "model_name"),
    "model": _same(MLX, "model_name"),
    "model_id": _same("several tools", "model_name"),
    "pretrained_model_name_or_path": _same("transformers", "model_name"),
    "model_revision": ForeignName("TRL", ("model_name",), _REVISION, _AFTER_NAME),
    "revision_of_model": ForeignName(AXOLOTL, ("model_name",), _REVISION, _AFTER_NAME),
    "bf16": ForeignName(f"{HF}, {AXOLOTL}, {FACTORY}", ("dtype",), "`dtype: bfloat16`", _DTYPE_HERE),
    "fp16": ForeignName(f"{HF}, {AXOLOTL}", ("dtype",), "`dtype: float16`", _DTYPE_HERE),
    "fp32": ForeignName("several tools", ("dtype",), "`dtype: float32`", _DTYPE_HERE),
    "tf32": ForeignName(f"transformers, {AXOLOTL}", ("dtype",), None, _DTYPE_HERE),
    "torch_dtype": _same("transformers", "dtype"),
    "precision": _same("several tools", "dtype"),
    "load_in_8bit": ForeignName(f"TRL, {AXOLOTL}", ("load_in_4bit",), None, _FOUR_BITS),
    "quantization_bit": ForeignName(FACTORY, ("load_in_4bit",), None, _FOUR_BITS),
    # data
    "dataset_name": _same(HF, "dataset_id"),
    "datasets": ForeignName(AXOLOTL, ("dataset_id", "train_file"), "`train_file: data.jsonl`", _FORM_IS_SEEN),
    "dataset": ForeignName(FACTORY, ("dataset_id", "train_file"), "`dataset_id: {value}`", _FORM_IS_SEEN),
    "dataset_dir": _same(FACTORY, "train_file", "a folder of `train` and `validation` files is read as it is"),
    "data": _same(MLX, "train_file", "a folder of `train.jsonl` and `valid.jsonl` is read as it is"),
    "dataset_path": _same("several tools", "train_file"),
    "train_data": _same("several tools", "train_file"),
    "eval_dataset": _same(FACTORY, "validation_file"),
    "validation_data": _same("several tools", "validation_file"),
    "dataset_train_split": _same("TRL", "dataset_split"),
    "max_samples": _same(FACTORY, "max_train_examples"),
    "max_train_samples": _same("transformers' examples", "max_train_examples"),
    "max_eval_samples": _same("transformers' examples", "eval_max_examples"),
    "val_batches": ForeignName(MLX, ("eval_max_examples",), "`eval_max_examples: auto`", "it counts batches"),
    "max_seq_length": _same(f"older TRL, {MLX}", "max_length"),
    "max_seq_len": _same("several tools", "max_length"),
    "sequence_len": _same(AXOLOTL, "max_length"),
    "cutoff_len": _same(FACTORY, "max_length"),
    "block_size": _same("several tools", "max_length"),
    "model_max_length": _same("several tools", "max_length"),
    "template": ForeignName(FACTORY, ("chat_template", "prompt_template"), None, "the tokenizer's own is used"),
    "chat_template_jinja": _same(AXOLOTL, "chat_template"),
    "completion_only_loss": ForeignName("TRL", (), None, _ALWAYS_COMPLETIONS),
    "assistant_only_loss": ForeignName("TRL", (), None, _ALWAYS_COMPLETIONS),
    "train_on_inputs": ForeignName(AXOLOTL, (), None, _ALWAYS_COMPLETIONS),
    "train_on_prompt": ForeignName(FACTORY, (), None, _ALWAYS_COMPLETIONS),
    "mask_prompt": ForeignName(MLX, (), None, _ALWAYS_COMPLETIONS),
    "packing": ForeignName(f"TRL, {FACTORY}", ("batching",), None, _NO_PACKING),
    "padding_free": ForeignName("TRL", ("batching",), None, _NO_PACKING),
    "sample_packing": ForeignName(AXOLOTL, ("batching",), None, _NO_PACKING),
    "neat_packing": ForeignName(FACTORY, ("batching",), None, _NO_PACKING),
    "pad_to_sequence_len": ForeignName(AXOLOTL, ("batching",), None, _NO_PACKING),
    "group_by_length": ForeignName("transformers", ("group_by_prefix",), None, _NO_PACKING),
    # batches and steps
    "per_device_train_batch_size": _same(f"{HF}, {FACTORY}", "batch_size", _PER_DEVICE),
    "per_gpu_train_batch_size": _same("older transformers", "batch_size", _PER_DEVICE),
    "micro_batch_size": _same(AXOLOTL, "batch_size", _PER_DEVICE),
    "train_batch_size": _same("DeepSpeed", "batch_size", "DeepSpeed counts accumulation, too"),
    "per_device_eval_batch_size": _same(f"{HF}, {FACTORY}", "eval_batch_size"),
    "grad_accumulation_steps": _same(MLX, "gradient_accumulation_steps"),
    "num_train_epochs": _same(f"{HF}, {FACTORY}", "num_epochs"),
    "epochs": _same("several tools", "num_epochs"),
    "iters": _same(MLX, "max_steps"),
    "max_train_steps": _same("several tools", "max_steps"),
    "num_steps": _same("several tools", "max_steps"),
    # optimizer
    "lr": _same("several tools", "learning_rate"),
    "optimizer": _same(f"{AXOLOTL}, {MLX}", "optim"),
    "lr_scheduler": _same(AXOLOTL, "lr_scheduler_type"),
    "lr_schedule": ForeignName(MLX, ("lr_scheduler_type",), "`lr_scheduler_type: cosine`", "it is one word here"),
    "warmup": _same(MLX, "warmup_steps"),
    "max_gradient_norm": _same("several tools", "max_grad_norm"),
    "gradient_clipping": _same("DeepSpeed", "max_grad_norm"),
    "grad_checkpoint": _same(MLX, "gradient_checkpointing"),
    "use_gradient_checkpointing": _same("several tools", "gradient_checkpointing"),
    "full_determinism": _same("transformers", "deterministic"),
    # adapter
    "lora_rank": _same(FACTORY, "lora_r"),
    "rank": _same(MLX, "lora_r"),
    "r": _same("PEFT", "lora_r"),
    "alpha": _same("several tools", "lora_alpha"),
    "scale": ForeignName(MLX, ("lora_alpha",), "`lora_alpha: 8`", "its scale is our `lora_alpha / lora_r`"),
    "lora_parameters": ForeignName(MLX, ("lora_r", "lora_alpha"), "`lora_r: 4`", "the keys are flat here"),
    "dropout": _same(f"{MLX}, PEFT", "lora_dropout"),
    "target_modules": _same("PEFT", "lora_target_modules"),
    "target_parameters": _same("PEFT", "lora_target_parameters"),
    "lora_target": _same(FACTORY, "lora_target_modules", "`all` is `all-linear` here"),
    "keys": _same(MLX, "lora_target_modules"),
    "lora_target_linear": ForeignName(AXOLOTL, ("lora_target_modules",), "`lora_target_modules: all-linear`"),
    "lora_modules_to_save": _same(AXOLOTL, "modules_to_save"),
    "additional_target": _same(FACTORY, "modules_to_save"),
    "peft_use_rslora": _same(AXOLOTL, "use_rslora"),
    "peft_use_dora": _same(AXOLOTL, "use_dora"),
    "adapter": ForeignName(AXOLOTL, ("training_type",), "`training_type: lora`"),
    "finetuning_type": ForeignName(FACTORY, ("training_type",), "`training_type: lora`"),
    "fine_tune_type": ForeignName(MLX, ("training_type",), "`training_type: lora`"),
    "use_peft": ForeignName("TRL", ("training_type",), "`training_type: lora`"),
    # objectives
    "rl": _same(AXOLOTL, "objective"),
    "stage": ForeignName(FACTORY, ("objective",), "`objective: {text}`", "one key for all kinds"),
    "loss_type": ForeignName(
        "TRL", ("objective",), "`objective: dpo`", "TRL's `sigmoid` is `dpo` here; other names are the same"
    ),
    "pref_loss": ForeignName(FACTORY, ("objective",), "`objective: dpo`", "its `sigmoid` is `dpo` here"),
    "pref_beta": ForeignName(
        FACTORY, ("dpo_beta", "simpo_beta", "orpo_lambda", "kto_beta"), "`dpo_beta: {value}`", _OWN_BETA
    ),
    "beta": ForeignName(
        "TRL", ("dpo_beta", "simpo_beta", "orpo_lambda", "kto_beta"), "`dpo_beta: {value}`", _OWN_BETA
    ),
    "rl_beta": ForeignName(
        AXOLOTL, ("dpo_beta", "simpo_beta", "kto_beta"), "`dpo_beta: {value}`", _OWN_BETA
    ),
    "label_smoothing": _same("TRL", "dpo_label_smoothing", "it smooths the order of pairs, not tokens"),
    "dpo_label_smoothing_factor": _same("several tools", "dpo_label_smoothing"),
    "simpo_gamma_beta_ratio": ForeignName("SimPO", ("simpo_gamma",), None, "`simpo_gamma` is it times `simpo_beta`"),
    "cpo_simpo_gamma": _same("several tools", "simpo_gamma"),
    "orpo_alpha": _same(AXOLOTL, "orpo_lambda"),
    "orpo_beta": _same("several tools", "orpo_lambda"),
    "desirable_weight": _same("TRL", "kto_desirable_weight"),
    "undesirable_weight": _same("TRL", "kto_undesirable_weight"),
    "kto_chosen_weight": _same(FACTORY, "kto_desirable_weight"),
    "kto_rejected_weight": _same(FACTORY, "kto_undesirable_weight"),
    "rpo_alpha": _same("TRL", "sft_weight", "the mean is over the chosen answers' labels"),
    "pref_ftx": _same(FACTORY, "sft_weight", "the mean is over the chosen answers' labels"),
    "reference_free": ForeignName("TRL", ("objective",), "`objective: simpo`", "`simpo` and `orpo` need no reference"),
    "precompute_ref_log_probs": ForeignName("TRL", (), None, "reference scores are computed once, always"),
    "ref_model": ForeignName(FACTORY, ("init_adapter",), None, "it is the base, with `init_adapter` if that is set"),
    "max_prompt_length": ForeignName("TRL", ("max_length",), None, _WHOLE_LENGTH),
    "max_completion_length": ForeignName("TRL", ("max_length",), None, _WHOLE_LENGTH),
    "adapter_name_or_path": _same(FACTORY, "init_adapter"),
    "lora_model_dir": _same(AXOLOTL, "init_adapter"),
    # intervals and checkpoints
    "logging_steps": _same(f"{HF}, {AXOLOTL}, {FACTORY}", "steps_freq"),
    "steps_per_report": _same(MLX, "steps_freq"),
    "eval_steps": _same(f"{HF}, {AXOLOTL}, {FACTORY}", "val_steps_freq"),
    "steps_per_eval": _same(MLX, "val_steps_freq"),
    "eval_strategy": ForeignName(HF, ("val_steps_freq",), "`val_steps_freq: 50`", "validation goes by steps here"),
    "evaluation_strategy": ForeignName("older transformers", ("val_steps_freq",), "`val_steps_freq: 50`"),
    "evals_per_epoch": ForeignName(AXOLOTL, ("val_steps_freq",), "`val_steps_freq: 50`", "it counts steps here"),
    "save_steps": ForeignName(
        f"{HF}, {AXOLOTL}, {FACTORY}", ("save_strategy", "steps_freq"),
        "`save_strategy: step` and `steps_freq: {value}`",
        "`steps_freq` is also the interval of logged metrics",
    ),
    "save_every": ForeignName(MLX, ("save_strategy", "steps_freq"), "`save_strategy: step` and `steps_freq: {value}`"),
    "saves_per_epoch": ForeignName(AXOLOTL, ("save_strategy", "epoch_freq"), "`save_strategy: epoch`"),
    "save_total_limit": _same(f"{HF}, {AXOLOTL}", "keep_last_n", "the best ones are kept apart, by `keep_best_n`"),
    "metric_for_best_model": _same(HF, "checkpoint_metric", "our metrics begin with `eval/`"),
    "greater_is_better": ForeignName(HF, ("checkpoint_metric_mode",), "`checkpoint_metric_mode: max`"),
    "load_best_model_at_end": ForeignName(HF, ("keep_best_n",), "`keep_best_n: 1`"),
    "save_only_model": ForeignName(HF, ("save_optim",), "`save_optim: False`", "it is the opposite of `save_optim`"),
    "output_dir": _same(f"{HF}, {AXOLOTL}, {FACTORY}", "project_dir", "a folder of the run's name is made in it"),
    "adapter_path": _same(MLX, "project_dir", "a folder of the run's name is made in it"),
    "overwrite_output_dir": ForeignName(HF, ("wandb_run_name",), None, "no run overwrites another one here"),
    "resume_adapter_file": ForeignName(
        MLX, ("resume_from_checkpoint", "resume_option", "checkpoint_path"),
        "`resume_from_checkpoint: True`, `resume_option: path` and `checkpoint_path: {value}`",
    ),
    "auto_resume_from_checkpoints": ForeignName(AXOLOTL, ("resume_from_checkpoint",), "`resume_from_checkpoint: auto`"),
    # early stopping
    "early_stopping": ForeignName("several tools", (_PATIENCE,), f"`{_PATIENCE}: 3`", _COUNTS_EVALUATIONS),
    "early_stop": ForeignName("Ludwig", (_PATIENCE,), f"`{_PATIENCE}: 3`", _COUNTS_EVALUATIONS),
    "use_early_stopping": ForeignName("Simple Transformers", (_PATIENCE,), f"`{_PATIENCE}: 3`", _COUNTS_EVALUATIONS),
    "early_stopping_steps": _same(FACTORY, _PATIENCE, _COUNTS_EVALUATIONS),
    "early_stopping_epochs": _same("several tools", _PATIENCE, _COUNTS_EVALUATIONS),
    "early_stopping_rounds": _same("XGBoost, LightGBM", _PATIENCE, _COUNTS_EVALUATIONS),
    "patience": _same("Keras, Lightning", _PATIENCE, _COUNTS_EVALUATIONS),
    "early_stopping_delta": _same("Simple Transformers", "early_stopping_threshold"),
    "early_stopping_min_delta": _same("several tools", "early_stopping_threshold"),
    "min_delta": _same("Keras, Lightning", "early_stopping_threshold"),
    "early_stopping_metric": _same("several tools", "checkpoint_metric", "our metrics begin with `eval/`"),
    "monitor": _same("Keras, Lightning", "checkpoint_metric", "our metrics begin with `eval/`"),
    # trackers
    "report_to": _same(f"{HF}, {FACTORY}, {MLX}", "tracker"),
    "run_name": _same(HF, "wandb_run_name"),
    "wandb_name": _same(AXOLOTL, "wandb_run_name"),
    "wandb_watch": _same(AXOLOTL, "wandb_watch_mode"),
    "wandb_log_model": ForeignName(AXOLOTL, ("model_to_wandb",), "`model_to_wandb: True`"),
    "project_name": _same("several tools", "wandb_project"),
    "logging_dir": ForeignName(HF, ("project_dir",), None, "metrics lie in the run's own folder"),
    "data_seed": ForeignName(HF, ("seed",), "`seed: {value}`", "one seed serves data, adapter and dropout"),
    # secrets
    "hub_model_id": _same(f"transformers, {AXOLOTL}, {FACTORY}", "push_to_hub", "only the final adapter goes there"),
    "hub_token": ForeignName("transformers", (), None, f"{_NO_SECRETS}: set the variable HF_TOKEN"),
    "token": ForeignName("several tools", (), None, f"{_NO_SECRETS}: set the variable HF_TOKEN"),
    "hf_token": ForeignName("several tools", (), None, f"{_NO_SECRETS}: set the variable HF_TOKEN"),
    "wandb_api_key": ForeignName("several tools", (), None, f"{_NO_SECRETS}: set the variable WANDB_API_KEY"),
    # devices
    "use_cpu": ForeignName("transformers", ("device",), "`device: cpu`"),
    "no_cuda": ForeignName("older transformers", ("device",), "`device: cpu`"),
    "deepspeed": ForeignName(HF, ("parallelism_strategy",), "`parallelism_strategy: fsdp`", _PROCESSES),
    "deepspeed_config": ForeignName("accelerate", ("parallelism_strategy",), None, _PROCESSES),
    "fsdp": ForeignName(f"{HF}, {AXOLOTL}", ("parallelism_strategy",), "`parallelism_strategy: fsdp`", _PROCESSES),
    "fsdp_config": ForeignName(f"{HF}, {AXOLOTL}, accelerate", ("parallelism_strategy",), None, _PROCESSES),
    "num_processes": ForeignName("accelerate", (), None, _PROCESSES),
    "nproc_per_node": ForeignName("torchrun", (), None, _PROCESSES),
    "num_machines": ForeignName("accelerate", (), None, _PROCESSES),
    "nnodes": ForeignName("torchrun", (), None, _PROCESSES),
    "attn_implementation": ForeignName(HF, ("attention",), "`attention: auto`", "the trie brings its own attention"),
    "flash_attention": ForeignName(AXOLOTL, ("attention",), "`attention: auto`", "the trie brings its own attention"),
    "flash_attn": ForeignName(FACTORY, ("attention",), "`attention: auto`", "the trie brings its own attention"),
    **{name: ForeignName("the original's later versions", (), None, _BLOCK) for name in BLOCKS},
    # commands
    "do_train": ForeignName(f"{HF}, {FACTORY}", (), None, "`trietune train` trains, `--dry-run` only plans"),
    "do_eval": ForeignName(f"{HF}, {FACTORY}", ("do_validation",), "`do_validation: {value}`"),
    "do_predict": ForeignName(f"{HF}, {FACTORY}", (), None, "`trietune predict RUN --input FILE` asks a model"),
    "predict_with_generate": ForeignName(HF, (), None, "answers are generated where the data has questions or labels"),
    "val_size": ForeignName(FACTORY, ("validation_file",), None, _HELD_OUT),
    "val_set_size": ForeignName(AXOLOTL, ("validation_file",), None, _HELD_OUT),
    "test_size": ForeignName("several tools", ("validation_file",), None, _HELD_OUT),
    "adam_epsilon": _same(f"{HF}, {FACTORY}", "adam_eps"),
    "label_smoothing_factor": ForeignName(HF, (), None, "labels are not smoothed here"),
    "optim_target_modules": ForeignName(HF, (), None, "the optimizer trains the whole adapter"),
    "optim_args": ForeignName(HF, ("adam_beta1", "adam_beta2", "adam_eps"), None, "each is a key of its own"),
    "use_qalora": ForeignName("PEFT", (), None, "only LoRA, rsLoRA and DoRA are trained here"),
    "use_bdlora": ForeignName("PEFT", (), None, "only LoRA, rsLoRA and DoRA are trained here"),
    "use_galore": ForeignName(FACTORY, (), None, "only LoRA, rsLoRA and DoRA are trained here"),
    "pissa_init": ForeignName(FACTORY, (), None, "adapters begin at zero, or at `init_adapter`"),
    "init_lora_weights": ForeignName("PEFT", ("init_adapter",), None, "adapters begin at zero, or at `init_adapter`"),
    "bias": _same("PEFT", "lora_bias"),
    "task_type": ForeignName("PEFT", ("lora_task_type",), "`lora_task_type: CAUSAL_LM`"),
    "exclude_modules": ForeignName("PEFT", ("lora_target_modules",), None, "a pattern can leave modules out"),
    "layers_to_transform": ForeignName("PEFT", ("lora_target_modules",), None, "a pattern can name the layers"),
    "num_layers": ForeignName(MLX, ("lora_target_modules",), None, "every layer gets one; a pattern can name some"),
    "full_finetuning": ForeignName("Unsloth", ("training_type",), None, "only adapters are trained here"),
    "random_state": _same("Unsloth", "seed"),
    "eval_accumulation_steps": ForeignName(HF, ("eval_batch_size",), None, "nothing piles up between evaluations"),
    "gradient_checkpointing_kwargs": ForeignName(HF, ("gradient_checkpointing",), None, "it is non-reentrant, always"),
    "lr_scheduler_kwargs": ForeignName(HF, ("lr_scheduler_type",), None, "schedules take no options here"),
    "neftune_noise_alpha": ForeignName(HF, (), None, "no noise is added to embeddings here"),
    "use_liger_kernel": ForeignName(HF, ("fused_layers",), None, _OWN_LAYERS),
    "enable_liger_kernel": ForeignName(FACTORY, ("fused_layers",), None, _OWN_LAYERS),
    "use_unsloth": ForeignName(FACTORY, ("fused_layers",), None, _OWN_LAYERS),
    "torch_compile": ForeignName(HF, ("fused_layers",), None, "nothing is compiled but on XLA devices"),
    "use_cache": ForeignName(HF, (), None, "it is off in training and on in generation"),
    "trust_remote_code": ForeignName("several tools", (), None, "code that comes with a model is never run here"),
    "logging_first_step": ForeignName(HF, (), None, "the first step is always logged"),
    "logging_strategy": ForeignName(HF, ("steps_freq",), None, "metrics are logged by steps"),
    "disable_tqdm": ForeignName(HF, (), None, "off a terminal there are no bars; NO_COLOR is respected"),
    "plot_loss": ForeignName(FACTORY, (), None, "`report.html` in the run's folder draws it"),
    "project": _same(HF, "wandb_project"),
    "wandb_entity": ForeignName(AXOLOTL, (), None, "set the variable WANDB_ENTITY"),
    "wandb_mode": ForeignName(AXOLOTL, (), None, "set the variable WANDB_MODE"),
    "experiment_name": _same("several tools", "wandb_run_name"),
    "save_safetensors": ForeignName(HF, (), None, "weights are always safetensors"),
    "hub_strategy": ForeignName(HF, ("push_to_hub",), None, "only the final adapter goes there"),
    "hub_private_repo": ForeignName(HF, ("push_to_hub",), None, "a new repository is private"),
    "include_num_input_tokens_seen": ForeignName(HF, (), None, "tokens are counted and logged, always"),
    "remove_unused_columns": ForeignName(HF, (), None, "columns that nothing uses are named once"),
    "dataset_info": ForeignName(FACTORY, ("train_file",), None, "a file is named itself: `train_file: data.jsonl`"),
    "dataset_text_field": ForeignName("TRL", ("prompt_template",), None, "a column `text` is known without a key"),
    "dataset_num_proc": ForeignName("TRL", (), None, _NO_WORKERS),
    "preprocessing_num_workers": ForeignName(FACTORY, (), None, _NO_WORKERS),
    "dataset_prepared_path": ForeignName(AXOLOTL, (), None, "the variable TRIETUNE_CACHE names the cache's folder"),
    "overwrite_cache": ForeignName(FACTORY, (), None, "the cache notices when data changes; `trietune cache` lists it"),
    "special_tokens": ForeignName(AXOLOTL, (), None, "the tokenizer's own are used"),
    "roles_to_train": ForeignName(AXOLOTL, (), None, 'all answers are learned; `"weight": 0` leaves one out'),
    "enable_thinking": ForeignName(FACTORY, ("chat_template",), None, "the template gets `reasoning_content` as it is"),
    "max_new_tokens": ForeignName("several tools", (), None, "`trietune predict` has `--max-new-tokens`"),
    **{name: ForeignName(HF, (), None, _NO_WORKERS) for name in _WORKERS},
    **{name: ForeignName(HF, ("parallelism_strategy",), None, _PROCESSES) for name in _DDP},
}  # fmt: skip


def remedy_for(name: str, value: object) -> str | None:
    """What to write for a foreign name that was given with this value; None where there is nothing to write."""
    if name in _BY_VALUE:
        return _BY_VALUE[name](value)
    write = FOREIGN_NAMES[name].write
    if write is None or (value is False and "{value}" not in write):
        return None
    return "write " + write.format(value=write_value(value), text=value)


def _write(key: str, value: object) -> str:
    return f"write `{key}: {write_value(value)}`"


def _targets(value: object) -> str:
    return _write("lora_target_modules", "all-linear" if value in ("all", ["all"]) else value)


def _data_set(value: object) -> str:
    """Of axolotl's list of mappings, LLaMA-Factory's names, or a path."""
    entries = value if isinstance(value, list) else [value]
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    names = [path for path in paths if isinstance(path, str) and path]
    if not names:
        return "write `train_file: data.jsonl`, or `dataset_id: owner/name`"
    files = [re.search(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz)$|^[./~]", name) is not None for name in names]
    if len(names) == 1:
        return _write("train_file" if files[0] else "dataset_id", names[0])
    return _write("train_file" if all(files) else "dataset_id", names)


def _stage(value: object) -> str | None:
    if value in ("pt", "pretrain"):
        return "leave it out: a column `text`, or a text file, is learned as a whole"
    if value in ("rm", "ppo", "grpo"):
        return "leave it out: there are no reward models here; `objective: dpo` learns from preferences"
    return _write("objective", value)


def _dtype(name: str) -> Callable[[object], str | None]:
    return lambda value: _write("dtype", "auto") if value == "auto" else _write("dtype", name) if value else None


def _tracker(value: object) -> str:
    value = value[0] if isinstance(value, list) and value else value
    return _write("tracker", "auto" if value == "all" else "none" if value in (None, False, []) else value)


def _validations(value: object) -> str:
    return _write("val_steps_freq", 0 if value in ("no", "none", False) else 50)


# Names whose advice depends on more of the value than its text.
_BY_VALUE: Mapping[str, Callable[[object], str | None]] = {
    "lora_target": _targets,
    "target_modules": _targets,
    "datasets": _data_set,
    "dataset": _data_set,
    "stage": _stage,
    "rl": _stage,
    "bf16": _dtype("bfloat16"),
    "fp16": _dtype("float16"),
    "fp32": _dtype("float32"),
    "report_to": _tracker,
    "eval_strategy": _validations,
    "evaluation_strategy": _validations,
    "save_only_model": lambda value: _write("save_optim", not value),
    "greater_is_better": lambda value: _write("checkpoint_metric_mode", "max" if value else "min"),
    "wandb_log_model": lambda value: _write("model_to_wandb", value not in (False, None, "", "false")),
}
