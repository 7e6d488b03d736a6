"""AlignFed: version-aware grouping, cross-version alignment and fairness, in one server step.

After Wang, Gao and Wang 2026, "AlignFed" (arXiv 2606.08197). ``variant="paper"`` follows the
equations as reported by third parties (there is no official code); the default departs from them
where they fail; docs/method.md derives it. A flush of K updates of staleness ``s_i`` goes through
these stages, each a pure function of the ones before:

1. alignment: each stale update is carried to the current version, by maps of its base version;
2. fairness: weights ``w_i = f_i p_i e_i`` (freshness, participation, length) over the buffer;
3. agreement: ``(G + lambda diag G) c = (1 + lambda) diag(G) w`` on the Gram matrix of the carried
   updates, long ones clipped first; a mean where clients agree, a sum where they do not; who
   contradicts all others is damped;
4. grouping: within a base version, coefficients may be moved towards their mean;
5. memory: the mean of what absent clients said last is added;
6. guard: the step is bounded, and halved while it harms the calibration loss or overshoots; where
   versions go around a valley their mean is taken; without a guard, staleness shortens the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, median

from torch import Tensor

from alignfed.core.adapter import DTYPES, Adapter
from alignfed.core.aggregation import alignfed_paper, sizes
from alignfed.core.aggregation.alignfed_state import (
    REMEMBERED_NORMS,
    AlignFedState,
    seen_staleness,
)
from alignfed.core.aggregation.carried_step import step_of
from alignfed.core.aggregation.compared import ComparedUpdates, compare_ahead, compare_all, gather
from alignfed.core.aggregation.recall import absent_pair, remember_flush
from alignfed.core.aggregation.settings import check_settings, choice, number, switch, whole
from alignfed.core.aggregation.transport import carry, gram_of
from alignfed.core.aggregation.trust import trusted_step
from alignfed.core.agreement import (
    accord,
    agreement_coefficients,
    clip_scales,
    contradiction_factors,
    lengths,
    step_length,
)
from alignfed.core.fairness import cap_mean, evenness, participation, relative_freshness
from alignfed.core.grouping import damp_deviations
from alignfed.core.instructions import ServerWork
from alignfed.core.lora import is_linear, space_of
from alignfed.core.lora.factor import FactorSum
from alignfed.core.ports import BufferedUpdate, Calibrator, Flush, LoraRule, Step


@dataclass(frozen=True, slots=True)
class _Plan:
    """The step before the guard.

    Attributes:
        coefficients: of the carried updates, clipping and the step's bound included.
        absent: coefficient of the mean of absent clients.
        lengths: of the carried updates, clipped.
        cuts: what each update's own coefficient was multiplied by for being too long or for
            contradicting all others; 1: left as it was.
        notes: what to record.
    """

    coefficients: tuple[float, ...]
    absent: float
    lengths: tuple[float, ...]
    cuts: tuple[float, ...]
    notes: dict[str, float]


@dataclass(frozen=True, slots=True)
class AlignFed:
    """The method. Every module can be switched off; the rest then works as if it did nothing."""

    variant: str = choice(
        "default", ("default", "paper"), "the default, or the paper's equations as reported"
    )
    grouping: bool = switch(True, "treat updates of one base version as a group (deviation_keep)")
    alignment: bool = switch(True, "carry stale updates to the current version")
    fairness: bool = switch(True, "weigh by length, freshness and participation")
    memory: bool = switch(True, "add what absent clients said last")
    server_step: float = number(1.0, "multiplies every coefficient", low=0, low_included=False)
    agreement: float = number(
        1.0, "lambda, the larger the nearer to a sum", low=0, low_included=False
    )
    agreement_space: str = choice(
        "auto", ("auto", "factor", "product"), "where angles are measured; auto: as the LoRA rule"
    )
    sketch_buckets: int = whole(
        1 << 17, "numbers that an update of eight times as many is compared by; 0: all", low=0
    )
    deviation_keep: float = number(
        1.0, "share of a group's deviations from its mean that is kept", low=0, high=1
    )
    alignment_map: str = choice(
        "rank", ("rank", "activation", "both"), "rank-space maps, calibration inputs, or both"
    )
    alignment_ridge: float = number(
        0.05, "damping of alignment maps, relative", low=0, low_included=False
    )
    calibration_positions: int = whole(256, "positions used to fit activation maps", low=1)
    freshness_decay: float = number(0.0, "gamma of (1 + s / (1 + mean s)) ** -gamma", low=0, high=4)
    reported_decay: float = number(0.2, "gamma of exp(-gamma s), the paper variant's", low=0)
    participation_exponent: float = number(0.0, "of mean uploads / own uploads", low=0, high=2)
    participation_limit: float = number(4.0, "largest participation or length factor", low=1)
    length_exponent: float = number(
        0.5, "of median length / own length; short tasks move less far", low=0, high=1
    )
    memory_share: float = number(
        1.0, "beta, weight of the mean over absent clients, times their accord", low=0, high=16
    )
    memory_clients: int = whole(256, "clients remembered at most, the most recent ones", low=1)
    memory_dtype: str = choice(
        "bfloat16", ("bfloat16", "float32"), "how remembered updates are kept"
    )
    contradiction_limit: float = number(
        0.5,
        "an update at this cosine against all others is ignored",
        low=0,
        high=1,
        low_included=False,
    )
    max_norm_ratio: float = number(
        2.0, "longer updates are cut to this multiple of the median length", low=1
    )
    max_step_ratio: float = number(
        3.0, "longest step, as a multiple of the median length of updates", low=1
    )
    guard: bool = switch(
        True, "measure the calibration loss of every step, shorten those that harm"
    )
    harm_tolerance: float = number(
        0.02, "rise of the calibration loss accepted, as a share of it", low=0
    )
    harm_window: int = whole(
        8, "flushes whose highest calibration loss a step is measured against", low=1, high=1024
    )
    overshoot_margin: float = number(
        0.02, "half a step must be better by this share of the loss to be taken instead", low=0
    )
    max_backtracks: int = whole(3, "halvings before a step is given up", low=0, high=16)
    averaging: bool = switch(True, "take the guarded versions' mean where they go around a valley")

    name = "alignfed"
    synchronous = False

    def __post_init__(self) -> None:
        """Refuse settings outside their ranges."""
        check_settings(self)

    @property
    def needs_calibrator(self) -> bool:
        """Whether stale updates cannot be aligned without a calibration mini-batch."""
        return self.alignment and (self.variant == "paper" or self.alignment_map != "rank")

    def _remembers(self, calibrator: Calibrator | None) -> bool:
        # Old news on top of a step whose length nobody measures brings late overshoot.
        return self.memory and self.memory_share > 0 and self._is_guarded(calibrator)

    def init(self, adapter: Adapter) -> AlignFedState:
        """Return the state before the first flush."""
        return AlignFedState()

    def receive(
        self,
        gathered: ComparedUpdates | None,
        entry: BufferedUpdate,
        update: Adapter,
        base: Adapter,
        lora: LoraRule,
    ) -> ComparedUpdates:
        """Keep the update until the flush."""
        return gather(gathered, entry, update, base)

    def ahead(
        self,
        gathered: ComparedUpdates,
        current: Adapter,
        lora: LoraRule,
        calibrator: Calibrator | None,
    ) -> None:
        """Compare updates with each other as they arrive, or take their sketches."""
        if self._compares_ahead(lora, calibrator):
            compare_ahead(gathered, current, self._ridge, self.sketch_buckets)

    def apply(
        self, state: AlignFedState, gathered: ComparedUpdates | None, flush: Flush
    ) -> tuple[AlignFedState, Step]:
        """Return the next state and the server step.

        Raises:
            RuleError: the flush holds no updates, or alignment needs a calibrator and has none.
            AdapterError: ranks differ within the flush and the LoRA rule adds factors.
        """
        sizes.require_updates(flush)
        gathered = gathered or ComparedUpdates()
        space = self.agreement_space if self.agreement_space != "auto" else space_of(flush.lora)
        if self.variant == "paper":
            step = alignfed_paper.step(
                flush,
                list(gathered.pairs),
                space=space,
                grouping=self.grouping,
                alignment=self.alignment,
                fairness=self.fairness,
                decay=self.reported_decay,
                ridge=self.alignment_ridge,
                server_step=self.server_step,
            )
            return state, step
        if self._compares_ahead(flush.lora, flush.calibrator):
            return self._apply_compared(state, gathered, flush)
        transport = carry(
            flush,
            list(gathered.pairs),
            kind=self.alignment_map if self.alignment else "none",
            ridge=self.alignment_ridge,
            max_positions=self.calibration_positions,
        )
        absent, origin = None, transport.origin
        if self._remembers(flush.calibrator):
            absent = absent_pair(state.recall, flush, space, origin)
        pairs = transport.pairs if absent is None else (*transport.pairs, absent)
        if origin is None and absent is not None and space == "factor":
            origin = absent[1]
        plan = self._plan(state, flush, gram_of(pairs, space, origin))
        notes = dict(transport.notes)
        if self._remembers(flush.calibrator):
            recall = remember_flush(
                state.recall,
                flush,
                transport.pairs,
                plan.cuts,
                self.memory_clients,
                DTYPES[self.memory_dtype],
            )
            state = replace(state, recall=recall)
            notes["remembered_clients"] = float(len(recall.latest))
        coefficients = (*plan.coefficients, plan.absent)[: len(pairs)]

        def candidate(scale: float) -> Adapter:
            terms = [
                (scale * coefficient, update, base)
                for coefficient, (update, base) in zip(coefficients, pairs, strict=True)
            ]
            return flush.lora.combine(flush.adapter, terms)

        return self._take(state, flush, plan, candidate, notes, transport.forwards)

    def _apply_compared(
        self, state: AlignFedState, gathered: ComparedUpdates, flush: Flush
    ) -> tuple[AlignFedState, Step]:
        found = compare_all(gathered, flush.adapter, self._ridge, self.sketch_buckets)
        plan = self._plan(state, flush, found.gram)
        sums, notes = step_of(gathered, plan.coefficients, found.shortened, flush.adapter)

        def candidate(scale: float) -> Adapter:
            return flush.lora.move(flush.adapter, FactorSum(list(sums)) if sums else None, scale)

        return self._take(state, flush, plan, candidate, notes, forwards=0)

    @property
    def _ridge(self) -> float | None:
        return self.alignment_ridge if self.alignment else None

    def _compares_ahead(self, lora: LoraRule, calibrator: Calibrator | None) -> bool:
        """Whether inner products and maps need nothing that only the flush knows.

        A memory keeps each update as it was carried, and so needs it whole.
        """
        return (
            self.variant == "default"
            and self.agreement_space in ("auto", "factor")
            and (self.alignment_map == "rank" or not self.alignment)
            and is_linear(lora)
            and not self._remembers(calibrator)
        )

    def _plan(self, state: AlignFedState, flush: Flush, gram: Tensor) -> _Plan:
        """Return the step; ``gram`` holds the updates and perhaps the absent clients' mean."""
        count, earlier = len(flush.updates), state.norms
        norms = lengths(gram)[:count]
        clips = clip_scales(norms, earlier, self.max_norm_ratio)
        clipped = tuple(n * clip if clip > 0 else 0.0 for n, clip in zip(norms, clips, strict=True))
        scales = gram.new_tensor((*clips, *[1.0] * (len(gram) - count)))
        # An update too long to be squared is clipped to nothing; its inner products mean nothing.
        gram = gram.where(gram.isfinite(), 0.0) * scales[:, None] * scales[None, :]
        repeats = None
        if not self._is_guarded(flush.calibrator):
            # Nobody measures whether the step overshoots, and whether it does is not in the
            # updates: delayed steps are safe while step times delay is bounded (Koloskova et al.
            # 2022, arXiv 2206.08307). Each of the K updates applied per version since the base is
            # taken for a repetition of this one, so that coefficients sum to O(1 / staleness).
            repeats = [float(len(flush.updates) * entry.staleness) for entry in flush.updates]
        damped = contradiction_factors(gram, count, self.contradiction_limit)
        own = gram[:count, :count]
        weights = self._weights(state, flush)
        found = agreement_coefficients(own, weights, self.agreement, repeats)
        if self.grouping:
            versions = [entry.base_version for entry in flush.updates]
            found = damp_deviations(found, versions, self.deviation_keep)
        found = tuple(
            self.server_step * coefficient * factor
            for coefficient, factor in zip(found, damped, strict=True)
        )
        absent = 0.0
        if len(gram) > count:
            # What was said earlier counts as far as it is still being said.
            absent = self.server_step * self.memory_share * accord(gram, found)
        moving = [norm for norm in (*earlier, *clipped) if norm > 0]
        length = step_length(gram, (*found, absent) if len(gram) > count else found)
        limit = self.max_step_ratio * median(moving) if moving else math.inf
        bound = min(1.0, limit / length) if length > 0 else 1.0
        return _Plan(
            coefficients=tuple(bound * c * clip for c, clip in zip(found, clips, strict=True)),
            absent=bound * absent,
            lengths=clipped,
            cuts=tuple(clip * factor for clip, factor in zip(clips, damped, strict=True)),
            notes={
                "step_norm": bound * length,
                "step_bound": bound,
                "clipped": float(sum(clip < 1.0 for clip in clips)),
                "damped": float(sum(factor < 1.0 for factor in damped)),
            },
        )

    def _is_guarded(self, calibrator: Calibrator | None) -> bool:
        return self.guard and calibrator is not None

    def _weights(self, state: AlignFedState, flush: Flush) -> tuple[float, ...]:
        if not self.fairness:
            return (1.0,) * len(flush.updates)
        usual = fmean(seen_staleness(state, flush))
        middle = median(entry.norm for entry in flush.updates)
        return cap_mean(
            [
                relative_freshness(entry.staleness, usual, self.freshness_decay)
                * evenness(entry.norm, middle, self.length_exponent, self.participation_limit)
                * participation(
                    entry.uploads,
                    flush.mean_uploads,
                    self.participation_exponent,
                    self.participation_limit,
                )
                for entry in flush.updates
            ]
        )

    def _take(
        self,
        state: AlignFedState,
        flush: Flush,
        plan: _Plan,
        candidate: Callable[[float], Adapter],
        notes: Mapping[str, float],
        forwards: int,
    ) -> tuple[AlignFedState, Step]:
        """Take the step, as far as the guard lets it; notes and forwards are the alignment's."""
        state = replace(
            state,
            norms=(*state.norms, *plan.lengths)[-REMEMBERED_NORMS:],
            staleness=seen_staleness(state, flush),
        )
        versions = len({entry.base_version for entry in flush.updates})
        notes = {**notes, **plan.notes, "versions": float(versions)}
        moved = sizes.comparing_bytes(flush) + sizes.combining_bytes(flush)
        calibrator = flush.calibrator
        if calibrator is None or not self._is_guarded(flush.calibrator):
            tokens = calibrator.tokens * forwards if calibrator else 0
            work = ServerWork(moved, tokens)
            return state, Step(candidate(1.0), plan.coefficients, notes, work, plan.cuts)
        found = trusted_step(
            state,
            flush,
            calibrator,
            candidate,
            tolerance=self.harm_tolerance,
            margin=self.overshoot_margin,
            window=self.harm_window,
            max_backtracks=self.max_backtracks,
            averaging=self.averaging,
        )
        guarded, forwards = found.step, forwards + found.forwards
        notes = {**notes, **found.notes}
        weights = tuple(guarded.scale * coefficient for coefficient in plan.coefficients)
        moved += (guarded.forwards - 1) * sizes.combining_bytes(flush)
        moved += sizes.averaging_bytes(flush) if self.averaging else 0
        work = ServerWork(moved, calibrator.tokens * forwards)
        return found.state, Step(guarded.adapter, weights, notes, work, plan.cuts)
