"""What a replay must know of a run besides its recipe and its rows; kept in ``meta``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from alignfed.core.coordinator import Coordinator
from alignfed.errors import JournalError


@dataclass(frozen=True, slots=True)
class ReplayFacts:
    """Fixed when a run begins.

    Attributes:
        keep_payloads: whether every payload is kept from the start.
        calibration_tokens: tokens of the calibration mini-batch (None: the server holds none).
        ranks: rank by client, where it is not the server's.
        platform: what decides the last bits of a sum: machine, vector instructions, torch.
        threads: threads torch computed with; they too decide last bits, and a replay may set them.
    """

    keep_payloads: bool = False
    calibration_tokens: int | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    platform: str = ""
    threads: int = 1

    def to_text(self) -> str:
        """Return the facts as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


def facts_of(coordinator: Coordinator, *, keep_payloads: bool) -> ReplayFacts:
    """Return the facts of a run that begins here and now."""
    calibrator = coordinator.calibrator
    return ReplayFacts(
        keep_payloads=keep_payloads,
        calibration_tokens=None if calibrator is None else calibrator.tokens,
        ranks=coordinator.exchange.ranks,
        platform=this_platform(),
        threads=torch.get_num_threads(),
    )


def read_facts(meta: Mapping[str, str]) -> ReplayFacts | None:
    """Return a run's facts; None for a run begun before they were kept.

    Raises:
        JournalError: they are damaged.
    """
    if meta.get("replay", "{}") == "{}":
        return None
    try:
        saved = json.loads(meta["replay"])
        ranks = {int(client_id): rank for client_id, rank in saved.pop("ranks", {}).items()}
        return ReplayFacts(**saved, ranks=ranks)
    except (ValueError, TypeError, AttributeError) as error:
        raise JournalError(
            f"the journal's facts for a replay are malformed: {error}; restore the run's directory"
            " from a backup"
        ) from error


def this_platform() -> str:
    """Return what decides the last bits of a sum here, besides the number of threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()} {capability}, torch {torch.__version__}"
