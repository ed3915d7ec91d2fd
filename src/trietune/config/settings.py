"""Every configuration key: its type, its range, its default, and what changes when it changes.

The keys are flat and keep the spelling of the original experiment. The first sentence below a key is the short
phrase that messages use ("`lora_r` (rank of the adapter)"); the rest says what changes. The reference in
`docs/configuration.md`, the comments of `trietune init`, the options of `trietune train` and the JSON Schema are all
made from here. The defaults are TrieTune's own; those of the original's files are in `defaults.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)

from trietune.config import normalize
from trietune.config.defaults import ORIGINAL_DEFAULTS, RUN_NAME, run_name_from
from trietune.config.secrets import without_secrets
from trietune.io.json_types import JsonMapping, JsonObject

Count = Annotated[int, Field(ge=0), BeforeValidator(normalize.whole_number)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(normalize.whole_number)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]


def _check_plain(text: str) -> str:
    """No character that could end a line of a message, or a path; such names forge what we print."""
    for char in text:
        if char < " " or char in "\x7f\x85\u2028\u2029":
            raise ValueError(f"it holds {char!r}, which no path or name here may hold")
    return text


PathText = Annotated[str, BeforeValidator(normalize.path_text), AfterValidator(_check_plain)]
NonEmpty = Annotated[str, Field(min_length=1), BeforeValidator(normalize.path_text), AfterValidator(_check_plain)]
Names = Annotated[tuple[str, ...], BeforeValidator(normalize.list_of_names)]


def _check_sources(sources: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(sources, tuple):
        if not sources:
            raise ValueError("the list is empty")
        twice = [one for one in sources if sources.count(one) > 1]
        if twice:
            raise ValueError(f"`{twice[0]}` stands in it twice; `data_shares` takes a file more than once")
    return sources


Sources = Annotated[
    NonEmpty | tuple[NonEmpty, ...] | None,
    BeforeValidator(normalize.one_or_several),
    AfterValidator(_check_sources),
]
Share = Annotated[float, Field(gt=0, le=1000)]


def _check_run_name(name: str) -> str:
    if name in {".", ".."} or not re.fullmatch(r"[^/\\\x00-\x1f]{1,200}", name) or name != name.strip():
        raise ValueError("it also names the run's folder: no slash, line break, or space at its ends, 200 characters")
    return name


def _check_target_modules(modules: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(f"as a pattern it does not compile: {error}") from error
    elif "all-linear" in modules:
        raise ValueError("`all-linear` stands alone: with it, every linear layer is a target already")
    elif modules == ("all",):
        raise ValueError("`all` is `all-linear` here")
    elif not modules or not all(modules):
        raise ValueError("an adapter needs at least one target")
    return modules


def _check_metric(name: str) -> str:
    if not re.fullmatch(r"eval(/[\w.-]+)+", name):
        raise ValueError("metrics of evaluation begin with `eval/`")
    return name


def _check_encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError("Python knows no encoding of text of that name") from error
    return name


def _check_repository(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name):
        raise ValueError("a repository of the hub is `OWNER/NAME`")
    return name


def _check_warmup_steps(steps: float) -> float:
    if steps >= 1 and not float(steps).is_integer():
        raise ValueError("a number of steps is whole, and a share of all steps is below 1")
    return steps


def _implied_values(written: JsonMapping, context: JsonMapping) -> JsonObject:
    """Values of keys that are not set, where the file or another key decides them.

    A value says everything: a run's `config.yaml` holds every key, and no later reader can ask which of them were
    defaults.
    """
    implied: JsonObject = {}
    if context.get("is_original"):
        implied |= {key: value for key, value in ORIGINAL_DEFAULTS.items() if key not in written}
    elif "wandb_run_name" not in written:
        data = written.get("train_file") or written.get("dataset_id")
        named_by = context.get("file") or (data[0] if isinstance(data, list | tuple) and data else data)
        # A name is shown, sent and made a folder of.
        implied["wandb_run_name"] = run_name_from(str(without_secrets(str(named_by)))) if named_by else RUN_NAME
    if "dataset_id" not in written and written.get("train_file") is not None:
        implied["dataset_id"] = None
    if "use_wandb" not in written and written.get("tracker", "auto") != "auto":
        implied["use_wandb"] = written["tracker"] == "wandb"
    if written.get("run_decode_example") is True and "print_examples" not in written:
        implied["print_examples"] = True
    size = written.get("trace_region_size")
    if "trace_region_size_mb" not in written and isinstance(size, int) and not isinstance(size, bool) and size > 0:
        implied["trace_region_size_mb"] = -(-size // 1_000_000)
    if "use_tt" not in written and written.get("device") == "tt":
        implied["use_tt"] = True
    return implied


class Settings(BaseModel):
    """All settings of a run, resolved and frozen; made by `load_config`, which also knows where each came from."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, title="TrieTune"
    )

    # Data

    dataset_id: Sources = None
    """Data set that is trained on. `stanfordnlp/sst2` (also `sst2`, `glue/sst2`, `nyu-mll/glue`) and
    `rajpurkar/squad_v2` (also `squad_v2`, `squadv2`) bring their prompts. Any other hub id (`name:config@revision`),
    file or folder is read by its columns, or by the templates below. A list trains on several, each read by its own
    form. Beside `train_file` it only names the task, and is null unless you write it."""

    train_file: Sources = None
    """Local training data in place of the hub's: a file, a glob, or a folder of splits (GLUE TSV, SQuAD JSON, JSONL,
    JSON, CSV, parquet). A list trains on several, each read by its own form: `[chats.jsonl, reviews.csv]`."""

    validation_file: Sources = None
    """Local validation data, in the same formats; a list is measured as a whole and file by file. Without it, the data
    set's own validation split is used; where there is none, a part of the training data is held out."""

    data_shares: Annotated[tuple[Share, ...], BeforeValidator(normalize.list_of_numbers)] | None = None
    """How often an epoch takes each of several data sets, in the order of the list: 2 takes every example twice, 0.5
    takes half of them, drawn by `seed` and the same half in every epoch. Without it, each is taken once."""

    file_encoding: Annotated[NonEmpty, AfterValidator(_check_encoding)] = "utf-8"
    """Encoding of text files, as Python names it: `cp1252`, `utf-16`, `latin-1`, ..."""

    csv_separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Character between the columns of `.csv` files, such as `;`."""

    txt_unit: Literal["line", "file"] = "line"
    """Part of `.txt` files that is one text: each line, or each file."""

    dataset_split: NonEmpty | None = None
    """Split that is trained on, `train` unless set, or a part of it: `train[:10%]`. Validation keeps its own split."""

    max_train_examples: Positive | None = None
    """Number of training examples that are used, the first ones of the data. Of several data sets each gives its part,
    by size and share. Without it, all are used."""

    max_length: Annotated[int, Field(ge=2), BeforeValidator(normalize.whole_number)] | Auto = "auto"
    """Longest sequence in tokens, begin and end tokens included. Longer examples follow `overlong`. Nothing is padded
    to this length, so a large value costs nothing by itself. `auto` leaves out only what is longer than the model has
    positions; the plan says how long the data is."""

    overlong: Literal["drop", "truncate_prompt", "error"] = "drop"
    """Fate of training examples longer than `max_length`: dropped and counted, prompt shortened from the left, or an
    error. Validation never drops an example."""

    prompt_template: str | None = None
    """Text of the prompt, with columns in braces: `Review: {sentence}\\nOutput:`. It replaces the data set's
    own, and the column `prompt` of preferences."""

    completion_template: str | None = None
    """Text that the model learns to write after the prompt, with columns in braces. Needed with `prompt_template`, but
    not for preferences, which bring their answers."""

    chat_template: Annotated[str, Field(min_length=1), BeforeValidator(normalize.path_text)] | None = None
    """Chat template (Jinja text, or a file that holds it) for data with `messages`. Without it, the tokenizer's own is
    used."""

    add_bos: bool | Auto = "auto"
    """Whether every sequence begins with the tokenizer's beginning-of-sequence token, once. `auto` does what the
    tokenizer does: Gemma's and Llama's add one, SmolLM2's does not. The adapter's `prompt_format.json` keeps what was
    done, and `evaluate` and `predict` follow it; a chat template may write the token itself."""

    chat_system_prompt: str | None = None
    """System message that is put before conversations which have none, in training and in use. Without it, a system
    message that all training conversations share is kept with the adapter, and `predict` asks with it."""

    task: Literal["auto", "labels", "answers", "text"] = "auto"
    """What a right answer is, and so what is measured beside the loss: `labels` scores every label and counts accuracy,
    `answers` generates and compares (exact match, token F1, ROUGE-L where answers are long), `text` measures the loss
    only. `auto` takes labels where completions are few, short and seen often, and says why."""

    ignored_index: int = -100
    """Label that counts for nothing, in data that brings labels of its own."""

    print_examples: bool = True
    """Whether examples are shown: three with their label tokens marked before training, and ten validation examples
    with what the model now says after it."""

    card_example: bool = False
    """Whether the model card shows a whole prompt of the validation data. Otherwise it shows the prompt's shape, with
    names in place of the texts."""

    # Base model

    model_name: Annotated[NonEmpty, BeforeValidator(normalize.published_model)] = "smollm2-135m-instruct"
    """Base model: a hub id (a revision may follow after `@`), a folder, a `.gguf` file, or `smollm2-135m-instruct`, the
    sample model."""

    dtype: Annotated[Literal["auto", "bfloat16", "float32", "float16"], BeforeValidator(normalize.dtype)] = "auto"
    """Number format of the base model's weights. The adapter and the optimizer keep float32 in any case. `auto` takes
    what this device multiplies fastest; `float16` needs CUDA."""

    load_in_4bit: bool = False
    """Whether the base model's linear layers are held in 4 bits (QLoRA) and compute in `dtype`: a third of the memory,
    slower, not quite the same model. Needs CUDA and bitsandbytes."""

    framework: Literal["pytorch"] = "pytorch"
    """Framework that trains."""

    # Adapter

    training_type: Literal["lora"] = "lora"
    """Kind of training. A LoRA adapter is trained and the base model stays as it is."""

    training_model_type: Literal["lora"] = "lora"
    """Later name of `training_type`."""

    lora_r: Positive = 8
    """Rank of the adapter. More rank can learn more, and the adapter's size grows with it."""

    lora_alpha: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] = 16
    """Strength of the adapter: its output is scaled by `lora_alpha / lora_r`."""

    lora_target_modules: Annotated[
        str | tuple[str, ...], BeforeValidator(normalize.target_modules), AfterValidator(_check_target_modules)
    ] = "all-linear"
    """Layers that get an adapter: names, one regular expression over full names, or `all-linear` for every linear
    layer but the output head."""

    lora_target_parameters: Annotated[tuple[NonEmpty, ...] | Auto, BeforeValidator(normalize.list_of_names_or_auto)] = (
        "auto"
    )
    """Experts that get an adapter, in models that keep all experts of a layer in one parameter: the ends of names, such
    as `gate_up_proj` and `down_proj`. `auto` takes those that PEFT finds under `lora_target_modules`; an empty list
    leaves them alone. The plan says which part of the layers' weights carries adapters. Routers get none unless they
    are named."""

    lora_task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """PEFT's task type."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped at random. It is drawn once per node, so branches share the mask of
    the text that they share."""

    base_dropout: bool = False
    """Whether the base model's own dropout, and the noise of its routers, stay on in training. They are drawn once a
    node, so branches share what was drawn for the text that they share. False turns them off."""

    use_rslora: bool = False
    """Whether the adapter is scaled by `lora_alpha / sqrt(lora_r)`, which suits high ranks."""

    use_dora: bool = False
    """Whether magnitude and direction are learned apart (DoRA). Slower; several servers do not load it."""

    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained: none, all, or those of adapted layers."""

    modules_to_save: Names = ()
    """Modules trained whole and saved with the adapter, such as `lm_head`. The adapter grows by their size, and several
    servers do not load it."""

    init_adapter: NonEmpty | None = None
    """Adapter to start from, in place of a new one: an adapter's folder or a run's. It brings its rank, scale and
    targets, and one of these keys that you write must be what it was trained with. Under `dpo`, `ipo` and `kto` it is
    the reference, too."""

    sft_checkpoint_path: NonEmpty | None = None
    """Name of `init_adapter` in the original's preference experiment."""

    # Objective

    objective: Literal["sft", "dpo", "ipo", "simpo", "orpo", "kto", "rank"] = "sft"
    """What is learned from an example. `sft` learns its completion. `dpo`, `ipo`, `simpo` and `orpo` learn to prefer
    one answer to another, `kto` from answers that are wanted or not, `rank` which label of a task is the right one."""

    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength with which `dpo` and `ipo` hold the model to the reference. Lower values let it go further."""

    dpo_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose order `dpo` takes to be wrong (cDPO)."""

    simpo_beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the difference of mean log-probabilities under `simpo`."""

    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Lead that `simpo` asks of the better answer."""

    orpo_lambda: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds ratio under `orpo`, beside the better answer's own loss."""

    kto_beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength with which `kto` holds the model to the reference."""

    kto_desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of wanted answers under `kto`."""

    kto_undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of unwanted answers under `kto`."""

    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answers' own loss, added to that of `dpo`, `ipo`, `simpo` or `orpo`."""

    pairs: Literal["all", "best"] = "all"
    """Pairs that a row of ranked answers makes: each better answer with each worse one, or only the best ones."""

    rank_by: Literal["sum", "mean"] = "sum"
    """Number by which labels compete under `rank`: the sum of an answer's log-probabilities, as `evaluate` compares
    them, or the mean."""

    # Optimization

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Step size of the optimizer. Constant, unless `lr_scheduler_type` says otherwise."""

    batch_size: Positive = 16
    """Examples in a batch, over all devices. The last, smaller batch of an epoch is kept. A pair, or a set of ranked
    answers, is one example."""

    gradient_accumulation_steps: Positive = 1
    """Batches that make one optimizer step. One divisor serves them all, so the step equals that of one large batch."""

    num_epochs: Count = 1
    """Passes over the training data. 0 evaluates and trains nothing."""

    max_steps: Annotated[Positive | None, BeforeValidator(normalize.none_if_minus_one)] = None
    """Optimizer steps after which training ends, even within an epoch. Without it, `num_epochs` decides."""

    max_time: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(normalize.duration_s)] = None
    """Time after which the run ends, early enough to save: `55m`, `1h30m`, `01:30:00`, or a number of seconds."""

    optim: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw", "sgd", "adafactor", "rmsprop", "adagrad",
        "adamw_8bit", "paged_adamw_8bit",
    ] = "adamw_torch"  # fmt: skip
    """Optimizer. The 8-bit ones need bitsandbytes."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Pull of the adapter's weights towards zero. 0.01 is AdamW's own default in PyTorch."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the last step's mean gradient that AdamW keeps."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Share of the last step's mean squared gradient that AdamW keeps."""

    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Number that AdamW adds to the root of the mean squared gradient."""

    max_grad_norm: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(normalize.none_if_zero)] = None
    """Length to which longer gradients are shortened. Without it (or with 0), gradients stay as they are."""

    lr_scheduler_type: Annotated[Literal["constant", "linear", "cosine"], BeforeValidator(normalize.schedule)] = (
        "constant"
    )
    """Course of the learning rate after warm-up: it stays, or falls to zero in a line or along a cosine."""

    warmup_ratio: Fraction = 0.0
    """Share of all steps over which the learning rate rises from zero."""

    warmup_steps: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)], AfterValidator(_check_warmup_steps)
    ] = 0
    """Steps over which the learning rate rises from zero. Below 1 it is a share of all steps, like `warmup_ratio`."""

    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(normalize.whole_number)] = 23
    """Seed of the data order, of the adapter's first weights and of dropout."""

    deterministic: bool = False
    """Whether only algorithms with reproducible results are used. Two runs then give the same bytes; some devices are
    slower."""

    gradient_checkpointing: bool = False
    """Whether activations are computed a second time in the backward pass. Same gradients, less memory, slower."""

    # Shared prefixes

    batching: Literal["trie", "packed", "padded"] = "trie"
    """Layout of a batch: `trie` computes a shared beginning once, `packed` shares nothing, `padded` is plain rows with
    the model's own attention, for models whose attention cannot be replaced."""

    attention: Literal["auto", "rows", "varlen", "flex", "mask"] = "auto"
    """Way in which a trie attends. `auto` takes the fastest that this device and model allow; the plan names it."""

    group_by_prefix: bool | Auto = "auto"
    """Whether examples with a long common beginning meet in a batch. `auto` does it where it saves much."""

    max_tokens_per_micro_batch: Positive | Auto = "auto"
    """Bound of memory: a batch is cut into parts of at most this many tokens, with the same gradients."""

    fused_layers: bool = True
    """Whether adapters, norms and gated MLPs run as functions with a backward of their own. Same results up to
    rounding, faster; a layer of another kind keeps transformers' code in any case."""

    pack_weights: bool | Auto = "auto"
    """Whether frozen weights are also kept in the form that the CPU's matrix library multiplies fastest. Same results
    up to rounding, two more copies in memory. `auto` packs as many as fit into a part of the free memory."""

    self_check: bool = True
    """Whether every layer, and the head, is first compared with plain rows through transformers: before training,
    before `evaluate` and before `predict`. A layer that gives other values runs in a slower way that is exact, and
    where there is none the run stops. `False` also leaves out the slower ways that some families need."""

    # Evaluation

    do_validation: bool = True
    """Whether anything is measured on validation data. False holds nothing out and reads no validation data."""

    val_steps_freq: Count = 50
    """Steps between validations. Another one precedes the first step, and another follows the last. 0 leaves only these
    two, and those of checkpoints."""

    eval_max_examples: Positive | Auto = "auto"
    """Examples of a periodic validation, always the same random ones. The last validation takes all. `auto` keeps
    validation a small part of the time."""

    eval_batch_size: Positive | Auto = "auto"
    """Examples computed at once in evaluation. It changes speed and memory, no result."""

    # Log and trackers

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(normalize.upper_case)
    ] = "INFO"
    """Least level of the diagnostic messages on stderr."""

    steps_freq: Positive = 10
    """Steps between two entries of training metrics. With `save_strategy: step`, also between two checkpoints."""

    use_wandb: bool = False
    """Whether Weights & Biases is told. If it is not installed, not logged in or not reachable, one line says so and
    the run continues without it."""

    tracker: Literal["auto", "wandb", "tensorboard", "trackio", "none"] = "auto"
    """Tracker beside the run's own files. `auto` is W&B where `use_wandb` is True, else none; any other value
    overrides `use_wandb`."""

    wandb_project: NonEmpty = "trietune"
    """Project that the run belongs to in the tracker."""

    wandb_run_name: Annotated[str, AfterValidator(_check_run_name)] = RUN_NAME
    """Name of the run, in the tracker and as its folder. Without it, the YAML file's name, else that of the data. If
    the folder exists, `-2`, `-3` is added, unless the run is resumed."""

    wandb_tags: Names = ()
    """Tags of the run in the tracker."""

    wandb_watch_mode: Literal["all", "gradients", "parameters"] | None = "all"
    """Histograms of the adapter's tensors that the tracker gets: gradients, parameters, all, or (null) none."""

    wandb_log_freq: Positive = 1000
    """Steps between two histograms."""

    model_to_wandb: bool = False
    """Whether the final adapter and each kept checkpoint are uploaded to W&B as artifacts."""

    # Checkpoints

    project_dir: NonEmpty = "runs"
    """Folder that holds the folders of runs."""

    save_strategy: Annotated[Literal["epoch", "step", "no"], BeforeValidator(normalize.occasion)] = "epoch"
    """Occasion of a checkpoint: after epochs (`epoch_freq`), after steps (`steps_freq`), or none but the final
    adapter."""

    epoch_freq: Positive = 1
    """Epochs between two checkpoints, with `save_strategy: epoch`."""

    save_optim: bool = False
    """Whether checkpoints hold the optimizer's state. With it, a resumed run equals one that was never stopped, bit for
    bit; without it, the optimizer's moments start from zero."""

    keep_last_n: Count = 3
    """Newest checkpoints that are kept. What neither this nor `keep_best_n` keeps is removed, but never the last whole
    one."""

    keep_best_n: Count = 3
    """Best checkpoints that are kept, by `checkpoint_metric`."""

    checkpoint_metric: Annotated[str, BeforeValidator(normalize.metric), AfterValidator(_check_metric)] = "eval/loss"
    """Metric that ranks checkpoints. `val/loss` is another name of `eval/loss`. A checkpoint whose own weights were not
    evaluated is not ranked."""

    checkpoint_metric_mode: Literal["min", "max"] = "min"
    """Direction in which `checkpoint_metric` is better."""

    early_stopping_patience: Positive | None = None
    """Evaluations without a better `checkpoint_metric` after which training ends. The last evaluation and the choice of
    the final adapter follow as usual; `val_steps_freq` says how often it is evaluated. Without it, training runs to the
    end."""

    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Amount by which an evaluation must be better to count as better for `early_stopping_patience`."""

    on_save_error: Literal["continue", "stop"] = "continue"
    """Reaction to a checkpoint that cannot be written: continue and try again at the next one, or stop."""

    resume_from_checkpoint: bool | Auto = False
    """Whether training resumes from a checkpoint of this run. `auto` resumes if there is one and starts if there never
    was one."""

    resume_option: Literal["last", "best", "path"] = "last"
    """Checkpoint to resume from: the newest, the best, or `checkpoint_path`."""

    checkpoint_path: PathText = ""
    """Folder of the checkpoint to resume from, with `resume_option: path`."""

    # Remote storage

    storage_backend: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*$")] = "local"
    """Kind of storage that `remote_path` lies in: `local` (a second folder), `s3`, `gcs`, `azure`, `hf`, or any fsspec
    protocol."""

    remote_path: PathText = ""
    """Place of the copies: a folder, or an address such as `s3://bucket/run`."""

    sync_to_storage: bool = False
    """Whether each checkpoint is copied to `remote_path`, in the background."""

    load_from_storage: bool = False
    """Whether a resume reads `remote_path`, so that an empty machine can resume."""

    push_to_hub: Annotated[NonEmpty | None, AfterValidator(_check_repository)] = None
    """Repository of the hub, `OWNER/NAME`, that the final adapter is uploaded to. One commit holds it with its card and
    prompt format; a repository that does not exist yet is private."""

    # Devices

    use_tt: bool = False
    """Whether a Tenstorrent device comes first. If there is none, CUDA is used, else the CPU, and one line says so."""

    device: Literal["auto", "cpu", "cuda", "mps", "tt", "xla"] = "auto"
    """Device that trains. Anything but `auto` insists and overrides `use_tt`."""

    parallelism_strategy: Literal["single", "data_parallel", "fsdp", "tensor_parallel"] = "single"
    """Way in which several devices share the work. With a mesh, the devices of one process; without one, the processes
    that `--nproc` or torchrun started: they share each step (`data_parallel`), or the frozen layers too (`fsdp`)."""

    mesh_shape: Annotated[tuple[Positive, ...] | None, BeforeValidator(normalize.mesh_shape)] = None
    """Shape of the device mesh, as a list or as text such as `8,1`."""

    mesh_axis_names: Annotated[tuple[str, ...] | None, BeforeValidator(normalize.list_of_names)] = None
    """Names of the mesh's axes."""

    tp_sharding_specs: JsonObject | list[Any] | None = None
    """Axes over which weights are split, by the names of parameters: `{name: ["model", null]}`, one axis or null for
    each dimension."""

    model_sharding_patterns: JsonObject | list[Any] | None = None
    """Axes over which weights are split, by regular expressions that are searched in the names of modules:
    `[[".q_proj", ["model", null]]]`. The first that is found decides."""

    input_sharding_dim: str | Count | None = None
    """Axis of the mesh whose devices split a batch, by its name or number. Without it, an axis called `data` or
    `batch`."""

    enable_trace: bool = False
    """Whether the device records its commands once and replays them (Tenstorrent)."""

    trace_region_size_mb: Positive | None = None
    """Device memory set aside for `enable_trace`, in MB."""

    trace_region_size: Positive | None = None
    """The same as `trace_region_size_mb` in bytes, as later files of the original write it."""

    xla_compile_options: JsonObject | None = None
    """Names and values for the compiler behind an XLA device, such as `optimization_level` and 1. They need a torch_xla
    that takes them, which is Tenstorrent's own; one line says so elsewhere."""

    # Seen in later files of the original

    custom_dataset: JsonObject | None = None
    """Files, format and columns of one's own data, as one block. Here these are keys of their own: `train_file`,
    `validation_file`, `prompt_template`, `completion_template`."""

    prompt_format: str | None = None
    """Prompt style by name. Here `prompt_template` or `chat_template` give the text itself."""

    unfreeze_embeddings: bool = False
    """Whether the embeddings are trained, too. Here `modules_to_save` names them."""

    adapter_layers: Any = None
    """Layers that get a bottleneck adapter. LoRA takes `lora_target_modules`."""

    adapter_bottleneck_dim: int | None = None
    """Width of a bottleneck adapter. LoRA takes `lora_r`."""

    run_decode_example: bool = False
    """Whether examples are generated after training. True turns on `print_examples`, which does that here."""

    test_config: Any = None
    """Bounds of the original's own tests. Here `max_steps` limits a run."""

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())
    _has_original_defaults: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        context = info.context or {}
        implied = _implied_values(values, context) if isinstance(values, Mapping) else {}
        settings = handler({**values, **implied} if implied else values)
        settings.__pydantic_fields_set__.difference_update(implied)
        settings._has_original_defaults = bool(context.get("is_original"))
        given = values.get("model_name") if isinstance(values, Mapping) else None
        if isinstance(given, str) and normalize.published_model(given) != given:
            settings._notes = (f"`{given}` was never published; `{settings.model_name}` is used instead",)
        return settings

    def where(self, key: str) -> str:
        """Where the value comes from: `sst2.yaml, line 4`, `--set`, `TRIETUNE_LORA_R`, `argument`, or `default`."""
        if key not in type(self).model_fields:
            raise KeyError(key)
        return self._origins.get(key, "argument" if key in self.model_fields_set else "default")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told once about these settings, one line each."""
        return self._notes

    @property
    def has_original_defaults(self) -> bool:
        """Whether keys that are not set are as the original experiment had them, and not TrieTune's own."""
        return self._has_original_defaults

    @property
    def start_adapter(self) -> str | None:
        """The adapter to start from, under either of its names."""
        return self.init_adapter or self.sft_checkpoint_path

    @property
    def learns_preferences(self) -> bool:
        """Whether the data must say which answers are better or wanted."""
        return self.objective not in ("sft", "rank")

    def is_validation_due(self, step: int) -> bool:
        """Whether a periodic validation belongs after `step`."""
        return self.val_steps_freq > 0 and step % self.val_steps_freq == 0

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`, from `warmup_steps` or `warmup_ratio`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil((self.warmup_steps or self.warmup_ratio) * num_steps)

    def dump_public(self) -> JsonObject:
        """Every key with a value that JSON and YAML can hold, passwords and tokens in addresses masked."""
        public = without_secrets(self.model_dump(mode="json"))
        assert isinstance(public, dict)
        return public
