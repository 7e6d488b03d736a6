"""From a recipe to the objects that run it: the only place where all parts meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from alignfed import builtin
from alignfed.config import FleetSection, Recipe
from alignfed.config.section import BUILTIN, Section
from alignfed.coordinating import make_coordinator, or_never
from alignfed.core.adapter import Adapter
from alignfed.core.lora import Exchange, exchange_of
from alignfed.core.ports import Evaluation, Journal
from alignfed.errors import FleetError, RecipeError
from alignfed.journal.spill import spilled
from alignfed.simulation.conditions import Conditions, GeneratedConditions, Variation
from alignfed.simulation.cost import (
    ServerProfile,
    TrainingShape,
    refuse_too_small,
    training_memory,
)
from alignfed.simulation.devices import DeviceTable
from alignfed.simulation.engine import EngineParts
from alignfed.simulation.fleet import Fleet
from alignfed.simulation.presets import preset_devices, spread_devices, with_efficiency
from alignfed.simulation.trace import read_trace, refuse_huge_trace
from alignfed.simulation.traces import (
    fedscale_devices,
    flash_devices,
    livelab_devices,
    pensieve_conditions,
)
from alignfed.trainers import CHOSEN, Placed, lora_settings, make_trainer
from alignfed.training.calibration import CalibrationBatch
from alignfed.training.data import DataSettings, FederatedData
from alignfed.training.encoding import Encoder
from alignfed.training.evaluate import EvaluationSettings, HeldOutEvaluator
from alignfed.training.federate import federate_pool, load_data
from alignfed.training.loading import load_base
from alignfed.training.models import BaseModel
from alignfed.training.partition import PartitionSettings
from alignfed.training.personal import PersonalEvaluator
from alignfed.training.settings import ModelSettings
from alignfed.training.templates import TemplateSettings


@dataclass(frozen=True)
class Loaded:
    """What takes long to load and no run changes.

    Attributes:
        data: who holds which examples.
        base: the frozen base model.
        placed: what trains clients, and where.
        evaluator: scores adapters.
        calibrator: the server's calibration mini-batch, if it holds one.
        personal: scores clients' own adapters, where the LoRA rule leaves them a part.
    """

    data: FederatedData
    base: BaseModel
    placed: Placed
    evaluator: HeldOutEvaluator
    calibrator: CalibrationBatch | None
    personal: PersonalEvaluator | None


@dataclass(frozen=True)
class Simulation:
    """Everything a recipe asks for, ready to run.

    Attributes:
        recipe: what it was built from.
        data: who holds which examples.
        base: the frozen base model, loaded once.
        evaluator: scores adapters.
        fleet: the clients' devices.
        parts: what the engine is made of, without a journal.
        personal: scores clients' own adapters, where the LoRA rule leaves them a part.
        notes: what somebody who watches the run should know.
        let_go: what ends with it; nothing where it was built from what others share.
    """

    recipe: Recipe
    data: FederatedData
    base: BaseModel
    evaluator: HeldOutEvaluator
    fleet: Fleet
    parts: EngineParts
    personal: PersonalEvaluator | None = None
    notes: tuple[str, ...] = ()
    let_go: Callable[[], None] | None = None

    def close(self) -> None:
        """End the workers that were started for it. May be repeated."""
        if self.let_go is not None:
            self.let_go()

    @property
    def initial_adapter(self) -> Adapter:
        """The adapter of version 0."""
        return self.base.initial_adapter()

    def with_journal(self, journal: Journal) -> EngineParts:
        """Return the engine's parts with a journal."""
        return replace(self.parts, journal=journal)


def build_simulation(recipe: Recipe) -> Simulation:
    """Load data and model, and put the run together. Writes nothing. Close it when done.

    Raises:
        AlignFedError: what the recipe names does not exist or does not fit together.
    """
    loaded = load(recipe)
    try:
        return replace(assemble(loaded, recipe), let_go=loaded.placed.close)
    except BaseException:
        loaded.placed.close()
        raise


def load(recipe: Recipe) -> Loaded:
    """Load what runs that differ in rule, server, fleet and stop conditions alone may share.

    Raises:
        AlignFedError: what the recipe names does not exist or does not fit together.
    """
    data, template = build_data(recipe)
    base = load_base(model_settings(recipe, data.label_names), lora_settings(recipe), recipe.seed)
    encoder = Encoder(base, template, recipe.data.max_length)
    placed = make_trainer(recipe, base, encoder, template, data)
    scoring = recipe.evaluation
    settings = EvaluationSettings(
        scoring.scorer, scoring.max_new_tokens, scoring.score_examples, scoring.tokens_per_batch
    )
    personal = None
    if exchange_of(recipe.strategy.lora).keeps:
        personal = PersonalEvaluator(base, encoder, data, scoring.tokens_per_batch)
    return Loaded(
        data,
        base,
        placed,
        HeldOutEvaluator(base, encoder, data, settings),
        CalibrationBatch(base, encoder, data.calibration) if data.calibration else None,
        personal,
    )


def assemble(loaded: Loaded, recipe: Recipe) -> Simulation:
    """Put a run together from what was loaded for its recipe, or for one that may share it.

    Raises:
        AlignFedError: what the recipe names does not exist or does not fit together.
    """
    base, data, evaluator = loaded.base, loaded.data, loaded.evaluator
    fleet = build_fleet(recipe.fleet, len(data.clients), recipe.seed)
    fleet.refuse_unanswered(recipe.server.task_timeout_s)
    refuse_huge_trace(fleet, recipe.fleet.record_s)
    # What was chosen belongs to the run: its recipe keeps it, and a resumed run reuses it.
    chosen = {name: getattr(loaded.placed.training, name) for name in CHOSEN}
    training = recipe.training.model_copy(update=chosen)
    recipe = recipe.model_copy(update={"training": training})
    refuse_too_small(fleet.devices, training_memory(_training_shape(recipe, base)))
    with_score = recipe.evaluation.measure != "loss"

    def evaluate(adapter: Adapter) -> Evaluation:
        return evaluator.evaluate(adapter, with_score=with_score)

    personal, folder = loaded.personal, recipe.server.buffer_folder
    parts = EngineParts(
        coordinator=make_coordinator(
            recipe,
            loaded.calibrator,
            build_exchange(recipe, fleet, base.initial_adapter()),
            None if folder is None else partial(spilled, folder=Path(folder)),
        ),
        trainer=loaded.placed.trainer,
        fleet=fleet,
        server=ServerProfile(recipe.server.memory_bytes_per_s, recipe.server.flops_per_s),
        clients=tuple(data.clients),
        evaluate=evaluate,
        evaluate_own=None if personal is None else personal.evaluate,
        cohort_size=loaded.placed.cohort_size,
        lookahead=loaded.placed.lookahead,
        calibration_flops_per_token=base.forward_flops_per_token(base.initial_adapter()),
    )
    notes = loaded.placed.notes
    return Simulation(recipe, data, base, evaluator, fleet, parts, personal, notes)


def build_exchange(recipe: Recipe, fleet: Fleet, initial: Adapter) -> Exchange:
    """Return what travels between server and clients, with each client's rank.

    Raises:
        RecipeError: a kind of device that the fleet lacks, or a rank above the server's.
    """
    exchange = exchange_of(recipe.strategy.lora)
    if not recipe.lora.mixes_ranks:
        return exchange
    ranks = recipe.lora.ranks_of([device.tier for device in fleet.devices])
    highest = max(shape.rank for _, shape in initial.layout.lora)
    if max(ranks.values(), default=0) > highest:
        raise RecipeError(
            f"a client's rank is {max(ranks.values())}, above {highest}, the server's; lower"
            " lora.client_ranks or lora.tier_ranks",
            highest=highest,
        )
    return exchange.with_ranks({i: rank for i, rank in ranks.items() if rank < highest})


def build_data(recipe: Recipe) -> tuple[FederatedData, TemplateSettings]:
    """Load, split and deal the data.

    Raises:
        DataError: files, columns or sizes that do not fit.
    """
    section, seed = recipe.data, recipe.seed
    deal = PartitionSettings(**_values(section.partition, PartitionSettings), seed=seed)
    settings, template = data_settings(recipe), template_of(recipe)
    if section.path != BUILTIN:
        return load_data(settings, template, deal), template
    assert section.num_examples is not None and section.evaluation_examples is not None
    data = federate_pool(
        _plain(builtin.training_records(section.num_examples, seed)),
        settings,
        template,
        deal,
        evaluation=_plain(builtin.evaluation_records(section.evaluation_examples, seed)),
        calibration=_plain(builtin.calibration_records(max(section.calibration_examples, 1), seed)),
    )
    return data, template


def data_settings(recipe: Recipe) -> DataSettings:
    """Return where the recipe's records are and how much of them goes where."""
    section = recipe.data
    path = "" if section.path == BUILTIN else section.path
    return DataSettings(**{**_values(section, DataSettings), "path": path}, seed=recipe.seed)


def template_of(recipe: Recipe) -> TemplateSettings:
    """Return how a record becomes text."""
    given = recipe.data.template
    if given is None:
        return TemplateSettings(builtin.PROMPT_TEMPLATE, " {response}")
    return TemplateSettings(given.prompt, given.response, given.chat)


def model_settings(recipe: Recipe, label_names: tuple[str, ...]) -> ModelSettings:
    """Return which base model the recipe asks for; a classifier's names say how many classes."""
    section = recipe.model
    labels = label_names or None
    return ModelSettings(
        path=str(builtin.MODEL_PATH) if section.path == BUILTIN else section.path,
        task=section.task,
        num_labels=len(labels) if labels else None,
        dtype=section.dtype,
        quantization=None if section.quantization == "none" else section.quantization,
        gradient_checkpointing=section.gradient_checkpointing,
        device=section.device,
        revision=section.revision,
        label_names=labels,
    )


def build_fleet(section: FleetSection, count: int, seed: int) -> Fleet:
    """Return the devices of ``count`` clients and how they vary.

    Raises:
        FleetError: a name or size that does not fit.
        TraceError: a file that is missing or malformed.
    """
    if section.replay is not None:
        fleet = read_trace(Path(section.replay))
        return Fleet(_first(fleet.devices, count, section.replay), fleet.conditions)
    conditions: Conditions = GeneratedConditions(seed, _variation(section))
    if section.distribution is not None:
        devices = spread_devices(
            section.distribution, section.spread, count, seed, section.reference
        )
    elif section.file is not None:
        path = Path(section.file)
        if section.format == "livelab":
            devices, conditions = livelab_devices(path, count, seed)
        elif section.format == "flash":
            devices = flash_devices(path, count, seed)
        else:
            devices = fedscale_devices(path, count, seed)
    else:
        devices = preset_devices(section.preset or "mixed", count, seed)
    if section.bandwidth is not None:
        devices, conditions = pensieve_conditions(Path(section.bandwidth), devices, seed)
    if section.efficiency is not None:
        devices = with_efficiency(devices, section.efficiency)
    return Fleet(devices, conditions)


def fleet_words(section: FleetSection) -> str:
    """Return what the fleet is, for people."""
    if section.replay is not None:
        return f"the devices of {section.replay}"
    if section.distribution is not None:
        return f"{section.distribution} ({section.spread:g}) devices around {section.reference}"
    if section.file is not None:
        return f"{section.format} devices of {section.file}"
    return f"fleet {section.preset}"


def _first(devices: DeviceTable, count: int, source: str) -> DeviceTable:
    if len(devices) < count:
        raise FleetError(
            f"{source} holds {len(devices)} devices, but there are {count} clients; record a trace"
            " with as many, or lower data.partition.num_clients",
            devices=len(devices),
            clients=count,
        )
    return DeviceTable([devices[i] for i in range(count)])


def _variation(section: FleetSection) -> Variation:
    given = section.variation
    return Variation(
        slot_s=given.slot_s,
        compute_sigma=given.compute_sigma,
        network_sigma=given.network_sigma,
        mean_on_s=or_never(given.mean_on_s),
        mean_off_s=given.mean_off_s,
        failures_per_hour=given.failures_per_hour,
    )


def _training_shape(recipe: Recipe, base: BaseModel) -> TrainingShape:
    sizes = base.architecture
    return TrainingShape(
        weight_bytes=sizes.weight_bytes,
        adapter_parameters=base.adapter_parameters,
        batch_size=recipe.training.batch_size,
        sequence_length=recipe.data.max_length,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        vocab_size=base.settings.num_labels or sizes.vocab_size,
        activation_bytes=4 if recipe.model.dtype == "float32" else 2,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )


def _values(section: Section, settings: Any) -> dict[str, Any]:
    """Return the values of those keys of a section that are called as fields of ``settings``."""
    names = (field.name for field in fields(settings))
    return {name: getattr(section, name) for name in names if name in type(section).model_fields}


def _plain(records: Sequence[builtin.Record]) -> list[dict[str, Any]]:
    return [dict(record) for record in records]
