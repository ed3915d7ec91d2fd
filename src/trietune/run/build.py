"""What a training works with, built once: model and adapter, encoder, optimizer, sampler, schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trietune.data.encoder import make_encoder
from trietune.model.adapter.adapter import adapter_files, add_adapter
from trietune.model.adapter.reread import check_reread, twin_of
from trietune.model.adapter.start import start_from
from trietune.model.assemble import assemble
from trietune.model.base.load import load_network
from trietune.model.base.load_sharded import gathering, load_sharded
from trietune.model.base.randomness import silence_draws, silence_rates
from trietune.run.describing import adapter_arguments
from trietune.run.proving import prove_before_device
from trietune.run.wording import few
from trietune.training.optimizer import build_optimizer
from trietune.training.sampler import Sampler
from trietune.training.schedule import learning_rate_schedule

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from trietune.data.encoder import Encoder
    from trietune.model.causal_lm import TrieModel
    from trietune.ranks.ranks import Ranks
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker


@dataclass(frozen=True, slots=True)
class Built:
    """What a training works with.

    Attributes:
        peft_model: the network with its adapter, as PEFT knows it; `model` computes with the same modules.
        learning_rate: rate of step `n`, counted from 0.
        is_sharded: whether each process holds a part of every layer.
    """

    model: TrieModel
    peft_model: PeftModel
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    learning_rate: Callable[[int], float]
    is_sharded: bool


def build(prepared: Prepared, tracker: Tracker, ranks: Ranks) -> Built:
    """Load the base model, put the adapter onto it, and take both to the device.

    Raises:
        UserError: weights that cannot be loaded, or a model that cannot be trained exactly.
    """
    settings, plan, base = prepared.settings, prepared.plan, prepared.base
    is_sharded = settings.parallelism_strategy == "fsdp"
    device = plan.device
    device.watch_memory()
    tracker.info(f"loading {base.name}")
    network = _load(prepared, tracker, is_sharded=is_sharded)
    keeps_dropout = settings.base_dropout and bool(plan.base_rates)
    if not settings.base_dropout:
        silence_rates(network)
        if drawing := silence_draws(network):
            tracker.info(f"stopped from drawing random numbers: {few(drawing)}")
    peft_model = _add_adapter(prepared, network, tracker, ranks, is_sharded=is_sharded)
    on_host = prove_before_device(prepared, network, tracker)
    model = assemble(
        network,
        device,
        attention=plan.attention,
        fused_layers=settings.fused_layers and not keeps_dropout,
        pack_weights=False if is_sharded else settings.pack_weights,
        shapes=plan.static.shapes if plan.static else None,
        gradient_checkpointing=settings.gradient_checkpointing,
        whole=gathering(network) if is_sharded else nullcontext,
        why_whole_rows=plan.why_whole_rows,
    )
    if on_host is not None:
        model.needs_masks = on_host.needs_masks
    return Built(
        model=model,
        peft_model=peft_model,
        encoder=make_encoder(prepared.tokenizer, prepared.data.prompt_format),
        optimizer=build_optimizer(
            settings.optim,
            [p for p in network.parameters() if p.requires_grad],
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            device=device,
        ),
        sampler=Sampler(plan.num_train, batch_size=plan.batch_size, seed=settings.seed, groups=prepared.groups),
        learning_rate=learning_rate_schedule(
            settings.lr_scheduler_type,
            peak=settings.learning_rate,
            num_steps=plan.num_steps,
            num_warmup_steps=plan.num_warmup_steps,
        ),
        is_sharded=is_sharded,
    )


def _load(prepared: Prepared, tracker: Tracker, *, is_sharded: bool) -> PreTrainedModel:
    plan, base, device = prepared.plan, prepared.base, prepared.plan.device.loading_device
    if is_sharded:
        return load_sharded(base, dtype=plan.dtype, device=device, report=tracker.info)
    return load_network(base, dtype=plan.dtype, device=device, load_in_4bit=plan.load_in_4bit, report=tracker.info)


def _add_adapter(
    prepared: Prepared, network: PreTrainedModel, tracker: Tracker, ranks: Ranks, *, is_sharded: bool
) -> PeftModel:
    """Put a new adapter, or the one to begin with, onto `network`, and try whether plain PEFT reads it alike."""
    base, is_trained = prepared.base, prepared.plan.num_steps > 0
    twin = twin_of(network) if is_trained and not is_sharded else None
    peft_model = add_adapter(network, base=base, **adapter_arguments(prepared.settings))
    if twin is not None:
        # One rank is enough: all put the same adapter onto the same network.
        ranks.on_first(lambda: check_reread(peft_model, twin, lambda model: adapter_files(model, base)))
    elif is_trained:
        tracker.info(
            "not checked before training: whether plain PEFT reads the adapter as the trained model, since "
            "no process holds the whole base model"
        )
    if prepared.start is not None:
        start_from(peft_model, prepared.start)
    return peft_model
