"""Sections about data: where it is, how it becomes text, and which client holds what."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from alignfed.config.model import SomeNames, given
from alignfed.config.section import BUILTIN, Section, UnfitError, key, table

_OWN_DATA_ONLY = (
    "train",
    "clients",
    "evaluation",
    "subset",
    "label_column",
    "label_names",
    "explode",
    "template",
)
"""Keys that say how to read files; the built-in corpus is generated."""


class TemplateSection(Section):
    """How a record becomes text: {column} fields, and [[...]] around what may be left out."""

    prompt: str = key(
        ...,
        "What the model sees; for a classifier the text to classify.",
        min_length=1,
        suggested="{instruction}[[\nContext: {context}]]\nAnswer:",
    )
    response: str = key(
        "",
        "What the model should say; only this is scored. Unset for a classifier.",
        suggested=" {response}",
    )
    chat: bool = key(False, "Wrap both in the tokenizer's chat template.")


class PartitionSection(Section):
    """Which client holds which example."""

    kind: Literal["iid", "dirichlet", "natural", "shard", "files"] = key(
        "iid",
        "How examples are dealt: evenly, by Dirichlet shares or sorted shards of a column, one"
        " client a value of a column, or one client a file.",
    )
    num_clients: int | None = key(
        None,
        'Clients; may be unset for "natural" (every value) and "files" (every file).',
        ge=1,
        suggested=24,
    )
    column: str | None = key(
        None,
        'Column that "dirichlet", "natural" and "shard" go by.',
        min_length=1,
        suggested="skill",
    )
    alpha: float = key(0.5, 'Concentration of "dirichlet"; smaller is less even.', gt=0)
    shards_per_client: int = key(2, 'Pieces each client gets of "shard".', ge=1)
    min_size: int = key(
        2,
        'Fewest examples a client may hold; "natural" leaves smaller clients out.',
        ge=1,
    )

    @model_validator(mode="after")
    def _complete(self) -> PartitionSection:
        problems = []
        if self.column is None and self.kind in ("dirichlet", "natural", "shard"):
            problems.append(("column", f'partition kind "{self.kind}" needs the column it goes by'))
        if self.num_clients is None and self.kind not in ("natural", "files"):
            problems.append(("num_clients", f'partition kind "{self.kind}" needs a number'))
        if problems:
            raise UnfitError(problems)
        return self


class DataSection(Section):
    """Where the records are and how much of them goes where."""

    path: str = key(
        BUILTIN,
        "The data: a file, a folder, or a data set on the hub.",
        allowed='"builtin" (the generated corpus), a JSON, JSONL, CSV, TSV or Parquet file, a'
        " folder of such files, or a name on the hub",
        min_length=1,
        path=True,
    )
    num_examples: int | None = key(
        None, "Training examples to generate (built-in corpus only).", ge=1, suggested=4800
    )
    train: str | None = key(
        None,
        "In a folder: name or glob of the files that make up the pool.",
        min_length=1,
        suggested="train.csv",
    )
    clients: str | None = key(
        None,
        'In a folder: glob of the files that are one client each (partition kind "files").',
        min_length=1,
        suggested="client_*.json",
    )
    evaluation: str | None = key(
        None,
        "Evaluation set: name or glob in the folder, a path, or a hub split; unset takes"
        " evaluation_fraction of the pool.",
        min_length=1,
        suggested="test.csv",
    )
    evaluation_fraction: float = key(
        0.1, "Share of the pool that is evaluated on where evaluation is unset.", ge=0, lt=1
    )
    evaluation_examples: int | None = key(
        None, "At most so many evaluation examples; unset takes all.", ge=1, suggested=240
    )
    calibration_examples: int = key(
        32, "Examples of the server's own, never trained or reported on; 0 for none.", ge=0
    )
    held_out_fraction: float = key(
        0.1, "Share of each client's examples kept for its own results.", ge=0, lt=1
    )
    held_out_examples: int | None = key(
        None, "At most so many in each of those slices.", ge=1, suggested=16
    )
    max_examples_per_client: int | None = key(
        None, "At most so many examples a client, held-out slice included.", ge=1, suggested=400
    )
    max_length: int = key(256, "Longest sequence, in tokens; longer prompts lose their left.", ge=2)
    subset: str | None = key(
        None, "Configuration of a hub data set.", min_length=1, suggested="main"
    )
    split: str = key("train", "Split of a hub data set that makes up the pool.", min_length=1)
    label_column: str | None = key(
        None, "Column of a classifier's labels.", min_length=1, suggested="label"
    )
    label_names: SomeNames | None = key(
        None,
        "The classes in order; unset takes all that occur, sorted.",
        allowed="a list of at least 2 different names",
        suggested=("no", "yes"),
    )
    explode: str | None = key(
        None,
        "Column of lists of which each item becomes an example.",
        min_length=1,
        suggested="lines",
    )
    template: TemplateSection | None = key(
        None, "How a record becomes text; needed for all but the built-in corpus."
    )
    partition: PartitionSection = table(PartitionSection, "Which client holds which example.")

    @model_validator(mode="after")
    def _fits_source(self) -> DataSection:
        problems = self._problems_of_builtin() if self.path == BUILTIN else self._problems_of_own()
        if self.label_names is not None and len(set(self.label_names)) < max(
            2, len(self.label_names)
        ):
            problems.append(("label_names", "must hold at least 2 different names"))
        if problems:
            raise UnfitError(problems)
        return self

    def _problems_of_builtin(self) -> list[tuple[str, str]]:
        problems = [
            (name, 'says how to read your own data, but data.path is "builtin"; remove it')
            for name in given(self, _OWN_DATA_ONLY)
        ]
        problems += [
            (name, "the built-in corpus needs to know how many to generate")
            for name in ("num_examples", "evaluation_examples")
            if getattr(self, name) is None
        ]
        if self.partition.kind == "files":
            problems.append(("partition.kind", 'the built-in corpus has no files; use "dirichlet"'))
        return problems

    def _problems_of_own(self) -> list[tuple[str, str]]:
        problems = []
        if self.num_examples is not None:
            problems.append(
                (
                    "num_examples",
                    "only the built-in corpus is generated; remove it or limit"
                    " max_examples_per_client",
                )
            )
        if self.template is None:
            problems.append(
                (
                    "template",
                    "say how a record becomes text: data.template.prompt, and"
                    " data.template.response for a language model",
                )
            )
        if (self.partition.kind == "files") != (self.clients is not None):
            problems.append(
                (
                    "clients",
                    'a glob of one file a client and partition kind "files" go together;'
                    " set both or neither",
                )
            )
        if self.evaluation is None and self.evaluation_fraction == 0:
            problems.append(
                (
                    "evaluation_fraction",
                    "0 leaves nothing to evaluate on; raise it or name data.evaluation",
                )
            )
        return problems
