"""From a device's recipe to what trains on it: one base model, one client's data, one trainer."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignfed import builtin
from alignfed.build import build_data, data_settings, model_settings, template_of
from alignfed.config import Recipe
from alignfed.config.section import BUILTIN
from alignfed.core.adapter import Adapter
from alignfed.core.lora import LORA_RULES, Exchange, exchange_of
from alignfed.core.ports import ClientTrainer, TrainingJob
from alignfed.core.update import Task
from alignfed.errors import DataError, DeploymentError
from alignfed.flower.messages import TaskOrder
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import MOST_BYTES
from alignfed.flower.wire import (
    Claims,
    Download,
    decode_download,
    encode_download,
    encode_upload,
    upload_limits,
)
from alignfed.inputs import fingerprint
from alignfed.trainers import local_settings, lora_settings
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.federate import own_client
from alignfed.training.loading import load_base
from alignfed.training.local import LocalTrainer

FEEDBACK = "feedback"
KEPT = "kept"
"""What a client remembers from task to task: what int8 lost, and factors of its own."""

_MODEL_FILES = ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.safetensors")


@dataclass(frozen=True)
class Device:
    """What trains on a device.

    Attributes:
        client_id: which client of the federation it is.
        digest: of what its recipe makes a client do (``training_digest``).
        trainer: trains the one client.
        exchange: what of an adapter travels and what stays.
        feedback: whether what int8 loses in one upload is added to the next.
        step_s: seconds a local step takes here, where the server shares work out by speed.
    """

    client_id: int
    digest: str
    trainer: ClientTrainer
    exchange: Exchange
    feedback: bool
    step_s: float | None = None

    def work(
        self, order: TaskOrder, outbox: Outbox, report: Mapping[str, float] | None = None
    ) -> bool:
        """Train a task and put its upload, and what the client remembers, into the outbox.

        Args:
            order: the task.
            outbox: where finished uploads and the client's memory are kept.
            report: joins the upload's metrics.

        Returns:
            Whether it was trained; a task that was finished before is left as it is.

        Raises:
            AlignFedError: the order is not for this device's recipe, its adapter is damaged or
                does not fit the base model, or the outbox has no room.
        """
        if any(one.task_id == order.task_id for one in outbox.waiting(order.run)):
            return False
        if order.training_digest != self.digest:
            raise DeploymentError(
                f"the server's recipe asks clients for other work than this device's (digest"
                f" {order.training_digest[:12]}, here {self.digest[:12]}): give both the same"
                " recipe and base model",
            )
        download = decode_download(order.payload, max_bytes=MOST_BYTES)
        sent, run = download.adapter, order.run
        base = self.exchange.upload(sent)
        most = upload_limits(base.layout).payload_bytes
        outbox.require_room(run, most + base.size_bytes + sent.size_bytes)
        kept = _recalled(outbox.remembered(run, KEPT))
        task = Task(
            order.task_id,
            self.client_id,
            order.base_version,
            order.dispatch,
            steps=order.steps,
        )
        start = self.exchange.rejoin(sent, kept)
        began_s = time.perf_counter()
        (result,) = self.trainer.train([TrainingJob(task, start)])
        speed = {}
        if (
            order.steps is not None
        ):  # the server shares work out by speed, and asks for nothing else
            speed["step_s"] = (time.perf_counter() - began_s) / order.steps
        claims = Claims(
            run,
            order.task_id,
            order.base_version,
            result.num_examples,
            order.encoding,
            {**result.metrics, **speed, **(report or {})},
        )
        carried = _recalled(outbox.remembered(run, FEEDBACK)) if self.feedback else None
        payload, lost = encode_upload(claims, self.exchange.upload(result.adapter), base, carried)
        memory: dict[str, bytes | None] = {}
        if self.feedback:
            memory[FEEDBACK] = _noted(lost, run, order.base_version)
        if self.exchange.keeps:
            memory[KEPT] = _noted(self.exchange.kept(result.adapter), run, order.base_version)
        outbox.put(run, order.task_id, payload, memory)
        return True


def build_device(
    recipe: Recipe, client_id: int, data: str | None = None, compute: str | None = None
) -> Device:
    """Load the base model and one client's data. Writes nothing.

    Args:
        recipe: the federation's.
        client_id: which client this is.
        data: the device's own file or folder; None takes the client's share of the recipe's data,
            as a simulation deals it.
        compute: where to compute, in the words of ``model.device``; None leaves it to the recipe.

    Raises:
        AlignFedError: what the recipe or the device names does not exist or does not fit.
    """
    if compute is not None:
        section = recipe.model.model_validate({**recipe.model.model_dump(), "device": compute})
        recipe = recipe.model_copy(update={"model": section})
    client, label_names = _client(recipe, client_id, data)
    base = load_base(model_settings(recipe, label_names), lora_settings(recipe), recipe.seed)
    encoder = Encoder(base, template_of(recipe), recipe.data.max_length)
    trainer = LocalTrainer(base, encoder, {client_id: client}, local_settings(recipe), recipe.seed)
    rule = recipe.strategy.lora
    # Product rules factor each version anew: what one upload lost has no place in the next.
    feedback = LORA_RULES[rule].space == "factor"
    step_s = None if recipe.steps_by_speed is None else _tried_step_s(trainer, client_id)
    return Device(client_id, training_digest(recipe), trainer, exchange_of(rule), feedback, step_s)


def _tried_step_s(trainer: LocalTrainer, client_id: int) -> float:
    """Return how long a local step takes; the first warms up, and what they learn is dropped."""
    job = TrainingJob(Task(0, client_id, 0, 0, steps=1), trainer.base.initial_adapter())
    took_s = math.inf
    for _ in range(3):
        began_s = time.perf_counter()
        trainer.train([job])
        took_s = min(took_s, time.perf_counter() - began_s)
    return took_s


def training_digest(recipe: Recipe) -> str:
    """Return a digest of what a recipe makes a client do with a task: model, text, training.

    Where the model is a folder, its files count and its path does not. What only the server does,
    and where each side finds its data, is left out.

    Raises:
        JournalError: a file of the model cannot be read.
    """
    lora = lora_settings(recipe)
    content: dict[str, Any] = {
        "seed": recipe.seed,
        "training": asdict(local_settings(recipe)),
        "lora": [lora.targets, lora.dropout, lora.modules_to_save, recipe.strategy.lora],
        "model": [recipe.model.task, recipe.model.dtype, recipe.model.quantization],
        "base": _model_identity(recipe),
        "text": [asdict(template_of(recipe)), recipe.data.max_length],
        "labels": [recipe.data.label_column, recipe.data.label_names, recipe.data.explode],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _client(recipe: Recipe, client_id: int, data: str | None) -> tuple[ClientData, tuple[str, ...]]:
    if data is not None:
        settings = replace(data_settings(recipe), path=data)
        return own_client(f"client {client_id}", client_id, settings, template_of(recipe))
    dealt, _ = build_data(recipe)
    if client_id not in dealt.clients:
        raise DataError(
            f"the recipe deals its data to {len(dealt.clients)} clients, and this device is client"
            f" {client_id}; raise data.partition.num_clients, or give the device data of its own",
            client_id=client_id,
        )
    return dealt.clients[client_id], dealt.label_names


def _model_identity(recipe: Recipe) -> Any:
    section = recipe.model
    path = builtin.MODEL_PATH if section.path == BUILTIN else Path(section.path).expanduser()
    if not path.is_dir():
        return [section.path, section.revision]
    files = {file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return sorted((file.name, fingerprint(file)) for file in files)


def _recalled(note: bytes | None) -> Adapter | None:
    return None if note is None else decode_download(note, max_bytes=MOST_BYTES).adapter


def _noted(adapter: Adapter | None, run: str, version: int) -> bytes | None:
    return None if adapter is None else encode_download(Download(run, version, adapter), "fp32")
