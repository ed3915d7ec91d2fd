"""What a layer falls back to until it is proven, and what is said about it.

    as it is        fused parts, attention by the way of the run
    by rows         transformers' own code of the layer; only its attention function is ours
    under a mask    transformers' own attention function too, under an explicit mask
    whole rows      the network as it is on the rows of the trie, laid out whole; products once a node (`model/rows/`)
    refused         exit code 2

The first three are each layer's, the fourth is the network's. Padded rows and whole rows have the same ladder without
the layouts: fused or shared, transformers' own code, its plain attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from trietune.errors import UserError
from trietune.model.attention.attend import attend_by_library
from trietune.model.causal_lm import TrieModel
from trietune.model.decoder_layers import decoder_of
from trietune.model.proof.bounds import (
    BOUND,
    KERNEL_BOUND,
    SCAN_BOUND,
    SCAN_BOUND_OF_GRADIENTS,
    is_within,
    number_of,
)
from trietune.model.proof.forests import Forest, PlainRows
from trietune.model.proof.parts import (
    InFullPrecision,
    adapters_that_matter,
    is_layer,
    kinds_of,
    layer_of,
    parts_of,
)
from trietune.model.proof.passes import (
    Error,
    Record,
    Scope,
    compare,
    compare_pointwise,
    describe_error,
    record,
    skipping,
)
from trietune.model.proof.ways import (
    GATHERED,
    kernel_error,
    no_tf32,
    run_layout,
    run_padded,
    run_trie,
    run_whole_rows,
    ways_of,
)
from trietune.model.replaced import library_code, restore_forward
from trietune.model.states import carry_states, scans_states
from trietune.trie import build_trie

# Parts with more parameters than this (MLPs) that are given only hidden states are proven in one layer of each kind.
MOST_PROVEN_EVERYWHERE = 1_000_000
# Positions of which a part's gradients are taken where it is given only hidden states.
POINTWISE_NODES = 8
# Beyond this length transformers' plain attention takes too much memory; its SDPA stands for it if both agreed.
LONG = 1024
# A head that soft-caps shows it where hidden states are this much larger.
HEAD_FACTORS = (1.0, 8.0)
KERNELS = ("varlen", "flex")

NOT_CAUSAL = "it is not a causal language model: tokens change the logits of those before them"

AS_IT_IS, BY_ROWS, UNDER_A_MASK, REFUSED = range(4)


# What a model's code raises where it cannot compute what it is given; anything else is a bug of ours.
RAISED_BY_MODELS = (
    RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proven.

    Attributes:
        rungs: of each layer by name: 0 as it is, 1 by rows, 2 under a mask.
        worst: the greatest error that was accepted.
        lines: for people; the first sums up, each other one says what runs in another way than planned, and why.
        on_whole_rows: tries run on whole rows.
    """

    rungs: dict[str, int]
    worst: float
    lines: tuple[str, ...]
    on_whole_rows: bool = False

    @property
    def needs_masks(self) -> bool:
        return UNDER_A_MASK in self.rungs.values()


class _NotProvenError(Exception):
    """Of one attempt. `is_final`: it is the network itself, so no other way to compute it helps."""

    def __init__(self, what: str, padded_is_proven: Callable[[], bool], *, is_final: bool = False) -> None:
        super().__init__(what)
        self.what, self.padded_is_proven, self.is_final = what, padded_is_proven, is_final


@dataclass(slots=True)
class _Found:
    """Of one round: layers that failed, with error and where; and the greatest error of the others.

    Attributes:
        scans: names of parts that scan a state, whose errors are kept apart.
    """

    scans: frozenset[str]
    failed: dict[str, tuple[Error, str, str]] = field(default_factory=dict)
    worst: float = 0.0
    worst_scan: float = 0.0

    def take(self, errors: dict[str, Error], where: str, *, layers_of: dict[str, list[str]] | None = None) -> None:
        """`layers_of`: the layers that each layer stands for."""
        for name, error in errors.items():
            if is_within(error, is_scan=name in self.scans):
                if name in self.scans:
                    self.worst_scan = max(self.worst_scan, error.worst)
                else:
                    self.worst = max(self.worst, error.worst)
                continue
            layer = layer_of(name)
            for other in (layers_of or {}).get(layer, [layer]):
                known = self.failed.get(other)
                if known is None or known[0].worst < error.worst:
                    self.failed[other] = (error, name, where)


def prove(
    model: TrieModel,
    short: Forest,
    longest: Forest,
    *,
    family: str,
    with_gradients: bool = True,
) -> Proof:
    """Prove every layer of `model` on `short`, one of each kind on `longest`, in all ways that it may run.

    A layer that fails goes down the ladder and is proven again; `model` is left as it is proven. Parameters are the
    same bits afterwards.

    Args:
        family: for messages.
        with_gradients: False proves values alone, for a model that only infers.

    Raises:
        UserError: a layer fails on every rung, or something else than a layer does.
    """
    network: Any = model.network
    was_training = network.training
    network.eval()
    try:
        with no_tf32(), adapters_that_matter(network):
            try:
                return _Prover(model, short, longest, family, with_gradients).prove()
            except _NotProvenError as failure:
                if not model.may_lay_out_rows or failure.is_final:
                    raise _refusal(model, family, failure) from failure
                model.compute_whole_rows(failure.what)
            try:
                return _Prover(model, short, longest, family, with_gradients).prove()
            except _NotProvenError as failure:
                raise _refusal(model, family, failure) from failure
    finally:
        network.train(was_training)


def _refusal(model: TrieModel, family: str, failure: _NotProvenError) -> UserError:
    dtype = str(model.network.dtype).removeprefix("torch.")
    if model.attention is None:
        return UserError(
            f"`{family}` cannot be trusted on padded rows: {failure.what}",
            where=f"self-check, {dtype}",
            next_step=_advice(model.network) or "choose another model; please report the family",
        )
    is_exact = not failure.is_final and failure.padded_is_proven()
    return UserError(
        f"`{family}` cannot be computed as a trie: {failure.what}",
        where=f"self-check, {dtype}",
        next_step="`--set batching=padded`, which has passed the same check on plain rows; please report the family"
        if is_exact
        else _advice(model.network)
        or "choose another model: padded rows fail the same check; please report the family",
    )


def _advice(network: Any) -> str | None:
    """What makes a model of this class causal, where its configuration has a word for it."""
    for key in ("is_decoder", "causal"):
        if getattr(network.config, key, None) is False:
            return f'`"{key}": true` in the model\'s config.json makes it one that generates from left to right'
    return None


class _Prover:
    def __init__(self, model: TrieModel, short: Forest, longest: Forest, family: str, with_gradients: bool) -> None:
        self.model, self.short, self.longest = model, short, longest
        self.family, self.with_gradients = family, with_gradients
        self.network: Any = model.network
        self.parts = parts_of(self.network)
        self.layers = [name for name in self.parts if is_layer(name)]
        self.kind_of = kinds_of(self.network, self.parts)
        self.first_of_kind = set(self.kind_of.values())
        self.is_padded = model.attention is None
        self.in_rows = self.is_padded or model.whole_rows is not None
        self.scans = frozenset(name for name, part in self.parts.items() if not is_layer(name) and scans_states(part))
        device = model.device
        two = build_trie(short.trie.input_ids[:3], np.array([-100, 1, 1], np.int32), np.array([0, 3]))
        self.known: dict[str, Record] = {}
        if not self.layers:
            raise self._failure("it has no list of layers to look into", is_final=True)
        try:
            self.known = record(self.network, PlainRows.of(two, device), Scope(self.parts), {}, precise=False)
            self.mixing = {name for name, one in self.known.items() if one.mixes}
            self.of_short = self._record(short, Scope(self.parts, self._wide_elsewhere(), with_gradients=()))
            scope = self._gradient_scope()
            self.of_gradients = self._record(short, scope) if with_gradients else {}
            self.of_longest = self._record_longest()
        except RAISED_BY_MODELS as error:
            raise self._failure(
                f"on plain rows, transformers' own code {describe_error(error)}", is_final=True
            ) from error

    def prove(self) -> Proof:
        if unseen := [name for name in self.layers if name not in self.of_short]:
            if self._sees_the_future():
                raise self._failure(NOT_CAUSAL, is_final=True)
            raise self._failure(
                f"layer {unseen[0]} (`{self._class(unseen[0])}`) is given something other than the hidden states of "
                "the tokens, so it cannot be compared",
                is_final=True,
            )
        for name, one in self.of_short.items():
            if name in self.mixing and not one.spread <= (SCAN_BOUND if name in self.scans else BOUND):
                where = f"in `{name}` (`{self._class(name)}`), {one.spread:.1e}"
                if self._sees_the_future():
                    what = f"{NOT_CAUSAL} ({where})"
                else:
                    what = f"the output of a position depends on the length of its row, or on other rows ({where})"
                raise self._failure(what, is_final=True)
        # Some keep what mixes positions outside of what is compared (XLM's attentions beside its MLPs).
        if self._sees_the_future():
            raise self._failure(NOT_CAUSAL, is_final=True)
        as_it_comes = self.model.library_attention
        if as_it_comes != self._library_attention and self._sees_the_future(as_it_comes):
            # PaliGemma: what marks prefixes is no input of text, and the two ways then take its absence differently.
            raise self._failure(
                f"transformers' own ways to attend disagree on it: under `{as_it_comes}`, its default, tokens change "
                f"the logits of those before them, under `{self._library_attention}` they do not",
                is_final=True,
            )
        self._prove_decoder_alone()
        self._prove_rows_alone()
        rungs = dict.fromkeys(self.layers, AS_IT_IS)
        reasons: dict[str, tuple[Error, str, str]] = {}
        while True:
            found = self._round()
            failed = {name: why for name, why in found.failed.items() if name in rungs}
            if others := [name for name in found.failed if name not in rungs]:
                raise self._failure(self._say_failure(others[0], found.failed[others[0]]))
            if not failed:
                break
            for layer, why in failed.items():
                reasons.setdefault(layer, why)
                rungs[layer] += 1
                if rungs[layer] == REFUSED:
                    raise self._failure(self._say_failure(layer, why))
                self._go_down(layer, rungs[layer])
        lines = self._say_rungs(rungs, reasons)
        lines += self._prove_last(rungs, found)
        try:
            self._prove_head()
        except RAISED_BY_MODELS as error:
            raise self._failure(f"its head by itself {describe_error(error)}") from error
        if self.model.attention in KERNELS and not self.in_rows:
            self._prove_kernel()
        return Proof(rungs, found.worst, (self._say_all(found), *lines), self.model.whole_rows is not None)

    # Rounds

    def _round(self) -> _Found:
        found = _Found(self.scans)
        ways = ways_of(self.model)
        scope = Scope(self.parts, self._wide_elsewhere())
        found.take(self._compare(self.of_short, self.short, scope, ways[-1][1]), f"a forest of rows, {ways[-1][0]}")
        stands_for: dict[str, list[str]] = {}
        for layer, first in self.kind_of.items():
            stands_for.setdefault(first, []).append(layer)
        take = partial(found.take, layers_of=stands_for)
        for label, run in ways:
            if self.with_gradients:
                errors = self._compare(self.of_gradients, self.short, self._gradient_scope(), run)
                take({name: e for name, e in errors.items() if name in self.mixing or is_layer(name)}, label)
            errors = self._compare(self.of_longest, self.longest, self._kinds_scope(), run)
            take(errors, f"a row of {self.longest.longest:,} tokens, {label}")
        if self.with_gradients:
            for name in self._pointwise():
                inputs = self.of_short[name].input[:POINTWISE_NODES]
                part = self.parts[name]
                with self.model.whole(part):
                    error = compare_pointwise(part, self.network, name, inputs, self._library_attention)
                take({name: error}, "gradients")
        return found

    def _compare(
        self, records: dict[str, Record], forest: Forest, scope: Scope, run: Callable[..., object]
    ) -> dict[str, Error]:
        places = forest.rows if self.in_rows else forest.nodes
        try:
            errors = compare(records, lambda: run(forest), scope, places, self.known)
        except RAISED_BY_MODELS as error:
            reason = f"it {describe_error(error)}"
            return {name: Error(float("inf"), reason=reason) for name in scope.watched if is_layer(name)}
        unseen = [name for name in scope.watched if name in records and name not in errors]
        known_bad = {
            layer_of(name) for name, error in errors.items() if not is_within(error, is_scan=name in self.scans)
        }
        for name in unseen:
            # Attention that a fused layer computes without calling its module is proven as a part of the layer.
            if is_layer(name) or (name in self.mixing and layer_of(name) not in known_bad):
                errors[name] = Error(float("inf"), reason="it is not called")
        return errors

    # What is looked at

    def _record(self, forest: Forest, scope: Scope, attention: str = "eager") -> dict[str, Record]:
        return record(self.network, forest.rows, scope, self.known, attention=attention)

    def _record_longest(self) -> dict[str, Record]:
        scope = self._kinds_scope()
        if self.longest.longest <= LONG:
            return self._record(self.longest, scope)
        return self._record(self.longest, scope, "sdpa" if self._sdpa_agrees() else "eager")

    def _sdpa_agrees(self) -> bool:
        try:
            other = self._record(self.short, self._kinds_scope(), "sdpa")
            plain = self._record(self.short, self._kinds_scope())
        except (RuntimeError, ValueError, TypeError, KeyError):
            return False
        return all(
            bool((other[name].output - one.output).norm() <= BOUND * one.output.norm())  # type: ignore[operator, union-attr]
            for name, one in plain.items()
        )

    @property
    def _library_attention(self) -> str:
        return "eager"

    def _size(self, name: str) -> int:
        return sum(parameter.numel() for parameter in self.parts[name].parameters())

    def _wide(self) -> set[str]:
        return {
            name
            for name in self.known
            if not is_layer(name)
            and layer_of(name) != "end"
            and name not in self.mixing
            and self._size(name) > MOST_PROVEN_EVERYWHERE
        }

    def _wide_elsewhere(self) -> set[str]:
        """Large parts of layers that stand for none."""
        return {name for name in self._wide() if layer_of(name) not in self.first_of_kind}

    def _others(self) -> set[str]:
        return {name for name in self.layers if name not in self.first_of_kind}

    def _kinds_scope(self) -> Scope:
        return Scope(self.parts, self._others() | self._wide())

    def _gradient_scope(self) -> Scope:
        mixing = {name for name in self.mixing if layer_of(name) in self.first_of_kind}
        return Scope(self.parts, self._others() | self._wide(), with_gradients=mixing)

    def _pointwise(self) -> list[str]:
        return [
            name
            for name in self.of_short
            if not is_layer(name) and name not in self.mixing and layer_of(name) in {*self.first_of_kind, "end"}
        ]

    # Steps down

    def _go_down(self, layer: str, rung: int) -> None:
        """Let a layer run on a lower rung."""
        for name, part in self.parts.items():
            if layer_of(name) == layer:
                for module in part.modules():
                    restore_forward(module)
                    if rung == UNDER_A_MASK and not self.in_rows:
                        attend_by_library(module, is_on=True)
        if not self.in_rows:
            carry_states(self.network, self.parts[layer])
        if rung == UNDER_A_MASK:
            if self.in_rows:
                self.network.set_attn_implementation("eager")
                self.model.library_attention = "eager"
            self.model.needs_masks = not self.in_rows
            self.model.can_decode = False
        if layer == self.layers[-1]:
            self.model.prunes_last = False

    # Last layer, head, kernel

    def _prove_last(self, rungs: dict[str, int], found: _Found) -> list[str]:
        """The last layer as one part, only for the nodes that carry labels."""
        last = self.layers[-1]
        if not self.model.prunes_last:
            return []
        query_nodes = self.short.query_nodes
        scope = Scope(
            self.parts,
            {name for name in self.layers if name != last},
            whole=(last,),
            with_gradients=(last,) if self.with_gradients else (),
            cotangent_at=query_nodes,
        )
        records = self._record(self.short, scope)
        run = partial(run_trie, self.model, self.short, kind="rows", forced=GATHERED, query_nodes=query_nodes)
        try:
            errors = compare(records, run, scope, self.short.nodes, self.known, query_nodes=query_nodes)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as raised:
            errors = {last: Error(float("inf"), reason=f"it {describe_error(raised)}")}
        error = errors.get(last, Error(float("inf"), reason="it is not called"))
        if error.worst <= BOUND:
            found.worst = max(found.worst, error.worst)
            return []
        self.model.prunes_last = False
        why = f"computing only label positions gives other values ({number_of(error)})"
        return [f"the last layer computes all positions: {why}"]

    def _prove_head(self) -> None:
        """The head by itself, next to the whole network on a row of a few tokens."""
        tokens = self._few_tokens()
        decoder = decoder_of(self.network)
        scope = Scope(self.parts, set(self.layers))
        for factor in HEAD_FACTORS:
            seen: list[Any] = []

            def enlarge(
                module: nn.Module, args: object, output: Any, by: float = factor, seen: list[object] = seen
            ) -> object:
                output.last_hidden_state = output.last_hidden_state * by
                seen.append(output.last_hidden_state)
                return output

            handle = decoder.register_forward_hook(enlarge)
            try:
                with torch.no_grad(), library_code(self.network, "eager"), skipping(scope, self.known):
                    theirs = self.network(input_ids=tokens, use_cache=False).logits[0]
            finally:
                handle.remove()
            with torch.no_grad():
                ours = self.model.project(seen[0][0])
            difference = (ours.double() - theirs.double()).norm(dim=1) / theirs.double().norm(dim=1).clamp_min(1e-30)
            error = float(difference.max()) if ours.shape == theirs.shape else float("inf")
            # A head runs in its own dtype: sums of another shape may round once.
            bound = max(BOUND, float(torch.finfo(theirs.dtype).eps))
            if not error <= bound:
                raise self._failure(
                    f"its head gives other logits on single positions ({error:.1e}, allowed {bound:.0e})"
                )

    def _prove_kernel(self) -> None:
        """A kernel next to rows in fp32, on what the layers of each kind give to attention."""
        model = self.model
        for forest in (self.short, self.longest):
            layout = model.layout(forest.trie, forest.query_nodes, kind="rows")
            layout.notes = []
            with torch.no_grad(), skipping(self._kinds_scope(), self.known):
                run_layout(model, forest, layout)
            for note in layout.notes:
                error = kernel_error(model, forest.trie, forest.query_nodes, note, self.with_gradients)
                if not error <= KERNEL_BOUND:
                    raise UserError(
                        f"`attention: {model.attention}` gives other values than rows ({error:.1e}, allowed "
                        f"{KERNEL_BOUND:.0e})",
                        where=f"`{self.family}`, a row of {forest.longest:,} tokens",
                        next_step="`--set attention=rows`, whose layers are proven; please report family and GPU",
                    )

    # Words

    def _class(self, name: str) -> str:
        return type(self.parts[name]).__name__ if name in self.parts else name

    def _say_all(self, found: _Found) -> str:
        kinds = len(self.first_of_kind)
        what = f"{len(self.layers)} layers of {kinds} kinds" if kinds > 1 else f"{len(self.layers)} layers"
        gradients = "values and gradients" if self.with_gradients else "values"
        cut = ", to which the longest example was cut" if self.longest.is_cut else ""
        scans = ""
        if self.scans:
            allowed = SCAN_BOUND_OF_GRADIENTS if self.with_gradients else SCAN_BOUND
            scans = f"; {found.worst_scan:.0e} where a state is carried, allowed {allowed:.0e}"
        return (
            f"self-check: {what} and the head give the {gradients} of plain rows through transformers "
            f"(largest difference {found.worst:.0e}, allowed {BOUND:.0e}{scans}), on rows of up to "
            f"{self.longest.longest:,} tokens{cut}"
        )

    def _say_rungs(self, rungs: dict[str, int], reasons: dict[str, tuple[Error, str, str]]) -> list[str]:
        lines = []
        if self.model.whole_rows is not None:
            lines.append(
                f"tries run on whole rows, which takes time and memory; projections, norms and MLPs run once per node: "
                f"{self.model.why_whole_rows}"
            )
        for rung, text in (
            (BY_ROWS, "run unfused: fused they give other values"),
            (
                UNDER_A_MASK,
                "attend through transformers' plain function, which takes time: otherwise, other values"
                if self.in_rows
                else "attend through transformers under a mask, which takes time and memory: by rows, other values",
            ),
        ):
            layers = [name for name in self.layers if rungs[name] == rung]
            if layers:
                error, name, where = reasons[layers[0]]
                # One layer speaks for all; its class names what it is.
                said = text if len(layers) > 1 else _singular(text)
                lines.append(
                    f"{_list(layers)} {said} ({self._class(name)}, {where}: {number_of(error, name in self.scans)})"
                )
        return lines

    def _say_failure(self, layer: str, why: tuple[Error, str, str]) -> str:
        error, name, where = why
        if layer == "entry":
            return f"what enters its first layer differs from plain rows ({number_of(error)})"
        what = "what follows its last layer" if layer == "end" else f"layer {layer}"
        number = number_of(error, name in self.scans)
        return f"{what} (`{self._class(name)}`) differs from plain rows ({where}: {number})"

    def _failure(self, what: str, *, is_final: bool = False) -> _NotProvenError:
        return _NotProvenError(what, self._padded_is_proven, is_final=is_final)

    def _few_tokens(self) -> torch.Tensor:
        """One short row: int64 [1, 9]."""
        return torch.from_numpy(self.short.trie.input_ids[None, :9].astype(np.int64)).to(self.model.device)

    def _sees_the_future(self, attention: str | None = None) -> bool:
        """Whether another last token changes what the model says before it, by default under the plain attention."""
        tokens = self._few_tokens()
        other = tokens.clone()
        other[0, -1] = (other[0, -1] + 1) % self.model.vocabulary_size
        # The network, not its decoder: around that, some make masks of their own.
        scope = self._kinds_scope()
        plain = library_code(self.network, attention or self._library_attention)
        with torch.no_grad(), plain, skipping(scope, self.known):
            one, two = (self.network(input_ids=ids, use_cache=False).logits[0, :-1].double() for ids in (tokens, other))
        return not bool((one - two).norm() <= 0.01 * one.norm())

    def _prove_decoder_alone(self) -> None:
        """The decoder called with tokens only gives what it gives as a part of the whole network.

        Wrappers of text and images may hand it masks or positions of their own, where the decoder, given none, builds
        others. What is trained is the decoder by itself.
        """
        tokens = self._few_tokens()
        decoder = decoder_of(self.network)
        seen: list[torch.Tensor] = []
        handle = decoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        scope = self._kinds_scope()
        try:
            with torch.no_grad(), library_code(self.network, self._library_attention), skipping(scope, self.known):
                self.network(input_ids=tokens, use_cache=False)
                decoder(input_ids=tokens, use_cache=False)
        except RAISED_BY_MODELS as error:
            raise self._failure(f"called by itself, its decoder {describe_error(error)}", is_final=True) from error
        finally:
            handle.remove()
        within, alone = seen[0].double(), seen[-1].double()
        difference = float((within - alone).norm() / within.norm().clamp_min(1e-30))
        if not difference <= max(BOUND, 4 * torch.finfo(seen[0].dtype).eps):
            raise self._failure(
                "its network gives its decoder masks or positions of its own, without which the decoder computes "
                f"something else ({difference:.1e})",
                is_final=True,
            )

    def _prove_rows_alone(self) -> None:
        """The decoder as a whole, where no part that is compared mixes positions: rows of the run, and each by itself.

        Values only; what such a network mixes with runs as it is.
        """
        if self.mixing:
            return
        run = run_whole_rows if self.model.whole_rows is not None else run_padded
        rows, decoder = self.short.rows, decoder_of(self.network)
        precise = InFullPrecision(decoder)
        try:
            with torch.no_grad():
                ours: Any = run(self.model, self.short)
                with library_code(self.network, self._library_attention):
                    tokens = torch.from_numpy(rows.tokens.astype(np.int64)).to(self.model.device)
                    by_itself = [row[real][None] for row, real in zip(tokens, rows.is_real, strict=True)]
                    alone = [
                        decoder(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
                        for row in by_itself
                    ]
        except RAISED_BY_MODELS as error:
            raise self._failure(f"computed as a whole, its decoder {describe_error(error)}") from error
        finally:
            precise.restore()
        found, theirs = ours[rows.is_real].double(), torch.cat([x.last_hidden_state[0] for x in alone]).double()
        difference = float(((found - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-30)).max())
        if not difference <= SCAN_BOUND:
            raise self._failure(
                "the output of a position depends on the length of its row, or on other rows "
                f"({difference:.1e}, allowed {SCAN_BOUND:.0e})",
                is_final=True,
            )

    def _padded_is_proven(self) -> bool:
        """Whether padded rows, in transformers' own code and attention, pass what the trie did not."""
        if not self.known or not getattr(self, "of_short", None) or not set(self.layers) <= set(self.of_short):
            return False
        scope = Scope(self.parts, self._wide_elsewhere())
        if any(
            name in self.mixing and not one.spread <= (SCAN_BOUND if name in self.scans else BOUND)
            for name, one in self.of_short.items()
        ):
            return False
        for attention in (self.model.library_attention, "eager"):
            try:
                with library_code(self.network, attention):
                    run = partial(run_padded, self.model, self.short)
                    errors = compare(self.of_short, run, scope, self.short.rows, self.known)
            except RAISED_BY_MODELS:
                continue
            are_within = all(is_within(error, is_scan=name in self.scans) for name, error in errors.items())
            if are_within and set(self.of_short) <= set(errors):
                return True
        return False


def _singular(text: str) -> str:
    verb, _, rest = text.partition(" ")
    return f"{verb}s {rest}"


def _list(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    shown = ", ".join(layers[:3])
    return f"layers {shown}" + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
