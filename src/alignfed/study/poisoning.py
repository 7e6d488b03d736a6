"""Clients that send something else than they trained, to see what a rule makes of it.

An attacker trains as everybody does, in the same time, and what it sends is made from its honest
update ``d``: so an attack differs from the clean run in nothing else. All four keep everything in
its place and every number finite; only ``scaled`` can be told from its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from alignfed.build import Simulation
from alignfed.core.adapter import Adapter, difference, inner_product, linear_combination, norm
from alignfed.core.ports import ClientTrainer, TakesNotes, TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import AlignFedError
from alignfed.training.naming import nearest_name
from alignfed.training.streams import generator, torch_seed

SCALE = 100.0
"""How much longer a ``scaled`` update is."""

COSINE = -0.9
"""Between a ``conflicting`` update and the honest one."""


@dataclass(frozen=True, slots=True)
class Attack:
    """What attackers send.

    Attributes:
        description: for people.
        make: takes the honest update ``d`` and noise of the same layout, and returns the update
            that is sent.
    """

    description: str
    make: Callable[[Adapter, Adapter], Adapter]


def _random(honest: Adapter, noise: Adapter) -> Adapter:
    return linear_combination([(_ratio(norm(honest), norm(noise)), noise)])


def _conflicting(honest: Adapter, noise: Adapter) -> Adapter:
    length = norm(honest)
    along = _ratio(inner_product(noise, honest), length * length)
    across = linear_combination([(1.0, noise), (-along, honest)])
    rest = math.sqrt(1.0 - COSINE * COSINE) * _ratio(length, norm(across))
    return linear_combination([(COSINE, honest), (rest, across)])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


ATTACKS: Mapping[str, Attack] = {
    "sign_flipped": Attack("-d", lambda d, _: linear_combination([(-1.0, d)])),
    "scaled": Attack(f"{SCALE:g} d", lambda d, _: linear_combination([(SCALE, d)])),
    "random": Attack("Gaussian noise as long as d, new each time", _random),
    "conflicting": Attack(
        f"as long as d, at a cosine of {COSINE:g} to it, otherwise noise", _conflicting
    ),
}
"""By name. Noise is Gaussian over all elements, factor by factor."""


@dataclass(frozen=True)
class PoisonedTrainer:
    """Trains clients and replaces what attackers send (``core.ports.ClientTrainer``).

    Attributes:
        honest: trains everybody.
        attack: what attackers send.
        attackers: their client ids.
        seed: of noise, which derives from it, the client and the dispatch.
    """

    honest: ClientTrainer
    attack: Attack
    attackers: Collection[int]
    seed: int

    def work(self, task: Task) -> TaskWork:
        """Return what the task costs: an attacker's as much as anybody's."""
        return self.honest.work(task)

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return one result a job, in order."""
        results = self.honest.train(jobs)
        return [self._sent(job, result) for job, result in zip(jobs, results, strict=True)]

    def take_notes(self) -> Sequence[str]:
        """Return what the honest trainer wants on record."""
        return self.honest.take_notes() if isinstance(self.honest, TakesNotes) else ()

    def _sent(self, job: TrainingJob, result: TrainingResult) -> TrainingResult:
        task = job.task
        if task.client_id not in self.attackers:
            return result
        honest = difference(result.adapter, job.adapter)
        draw = torch.Generator().manual_seed(
            torch_seed(self.seed, "poison", task.client_id, task.dispatch)
        )
        noise = {
            dtype: torch.randn(part.shape, generator=draw).to(part)
            for dtype, part in honest.buffers.items()
        }
        made = self.attack.make(honest, Adapter(honest.layout, noise))
        return replace(result, adapter=linear_combination([(1.0, job.adapter), (1.0, made)]))


def choose_attackers(client_ids: Sequence[int], share: float, seed: int) -> frozenset[int]:
    """Return a share of the clients (at least one), drawn by the seed.

    Raises:
        AlignFedError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise AlignFedError(f"share={share}, must be above 0 and at most 1", share=share)
    count = max(1, round(share * len(client_ids)))
    chosen = generator(seed, "attackers").choice(len(client_ids), count, replace=False)
    return frozenset(client_ids[place] for place in chosen.tolist())


def poison(simulation: Simulation, attack: str, attackers: Collection[int]) -> Simulation:
    """Return the same simulation in which some clients attack.

    Hand it to ``alignfed.simulate`` or ``resume`` as what ``build`` returns: the attack is not part
    of the recipe. Whoever watches the run is told.

    Args:
        simulation: an honest one.
        attack: a name in ``ATTACKS``.
        attackers: client ids.

    Raises:
        AlignFedError: no attack is called that.
    """
    if attack not in ATTACKS:
        raise AlignFedError(
            f"no attack is called {attack!r}; there are {', '.join(ATTACKS)}"
            f"{nearest_name(attack, ATTACKS)}",
            attack=attack,
        )
    trainer = PoisonedTrainer(
        simulation.parts.trainer, ATTACKS[attack], frozenset(attackers), simulation.recipe.seed
    )
    note = f"attack {attack} by clients {', '.join(map(str, sorted(attackers)))}"
    parts = replace(simulation.parts, trainer=trainer)
    return replace(simulation, parts=parts, notes=(*simulation.notes, note))
