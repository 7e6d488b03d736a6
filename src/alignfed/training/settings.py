"""Which base model and which adapter: validated values, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from alignfed.errors import ModelError

ModelTask = Literal["causal_lm", "sequence_classification"]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which base model, and how it is held.

    Attributes:
        path: a local folder in the Hugging Face layout, or a name on the hub.
        task: what its head does.
        num_labels: classes of a sequence classifier.
        dtype: of the base's weights; adapters are fp32 always.
        quantization: ``"4bit"`` for NF4 by bitsandbytes (Dettmers et al. 2023), CUDA only.
        gradient_checkpointing: keep layer inputs only and recompute the rest going backwards.
        device: ``"auto"`` is CUDA where there is one.
        revision: commit or branch of a hub name.
        label_names: names of the classes, written to the configuration.

    Raises:
        ModelError: a value outside its range, or values that exclude each other.
    """

    path: str
    task: ModelTask = "causal_lm"
    num_labels: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["4bit"] | None = None
    gradient_checkpointing: bool = False
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    revision: str | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check each value against its range."""
        for name, allowed in (
            ("task", get_args(ModelTask)),
            ("dtype", ("float32", "bfloat16")),
            ("quantization", (None, "4bit")),
            ("device", ("cpu", "cuda", "auto")),
        ):
            if getattr(self, name) not in allowed:
                raise ModelError(
                    f"model {name} is {getattr(self, name)!r}, must be one of"
                    f" {', '.join(repr(one) for one in allowed)}"
                )
        if self.task == "sequence_classification" and (self.num_labels or 0) < 2:
            raise ModelError(
                f"model num_labels is {self.num_labels}; a sequence classifier needs at least 2",
                num_labels=self.num_labels,
            )
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise ModelError(
                f"{len(self.label_names)} label_names do not fit num_labels {self.num_labels}"
            )
        if self.quantization is not None and self.device == "cpu":
            raise ModelError(
                "a 4-bit base needs CUDA, but device is 'cpu'; set device to 'cuda' or 'auto', or"
                " leave quantization out"
            )


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What is trained on top of the base.

    Attributes:
        rank: rank of every factor pair.
        alpha: numerator of the scale ``alpha / rank``.
        dropout: probability of dropping an input of an adapter while training.
        targets: ``"all-linear"`` (every linear layer but the head) or names of modules.
        warm_start: a PEFT adapter's folder to start from; rank, alpha, targets and
            modules_to_save are then the folder's.
        modules_to_save: modules trained whole beside the head of a classifier.

    Raises:
        ModelError: a value outside its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    warm_start: str | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check each value against its range."""
        if self.rank < 1:
            raise ModelError(f"LoRA rank is {self.rank}, must be at least 1", rank=self.rank)
        if not 0 < self.alpha < float("inf"):
            raise ModelError(f"LoRA alpha is {self.alpha}, must be above 0", alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise ModelError(f"LoRA dropout is {self.dropout}, must be in [0, 1)")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ModelError(
                f"LoRA targets is {self.targets!r}, must be 'all-linear' or a list of module names"
            )
        if not self.targets:
            raise ModelError("LoRA targets is empty; name a module or use 'all-linear'")
