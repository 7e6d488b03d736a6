"""Starting from a PEFT adapter that somebody trained elsewhere: what is accepted, what is refused.

An adapter here is plain LoRA on linear layers, ``W0 + (alpha / rank) B A``, with modules trained
whole beside it. Every variant that computes something else is refused by name.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from alignfed.errors import ModelError

WEIGHTS_NAME = "adapter_model.safetensors"

REFUSED_SWITCHES = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
"""Settings of PEFT's LoRA that change what an adapter computes, or add other tensors to it."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that alter the base's own weights, which then no longer are the base's."""


def load_warm_start(base: Any, folder: Path, dropout: float) -> PeftModel:
    """Put a saved adapter on a base, trainable, with ranks and alphas as saved.

    Raises:
        ModelError: the folder is no plain LoRA adapter, or was trained on another base.
    """
    config = _read_config(folder)
    config.lora_dropout = dropout
    names = _saved_names(folder)
    try:
        with warnings.catch_warnings():
            # What PEFT only warns of here is compared name by name below, and refused.
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            device = str(next(base.parameters()).device)
            peft_model = PeftModel.from_pretrained(
                base, str(folder), is_trainable=True, config=config, torch_device=device
            )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit this base model (it was trained on"
            f" {config.base_model_name_or_path!r}): {' '.join(str(error).split())[:400]}",
            path=str(folder),
        ) from error
    require_plain_lora(peft_model, str(folder))
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if names != expected:
        different = sorted(names ^ expected)
        raise ModelError(
            f"the adapter in {folder} does not fit this base model (it was trained on"
            f" {config.base_model_name_or_path!r}): {len(names - expected)} of its tensors have no"
            f" place, {len(expected - names)} are missing, the first is {different[0]!r}",
            path=str(folder),
            different=different,
        )
    return peft_model


def require_plain_lora(peft_model: PeftModel, path: str) -> None:
    """Refuse LoRA on anything but linear layers.

    Raises:
        ModelError: an embedding, a convolution or another layer is adapted, or nothing is.
    """
    layers = {
        name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)
    }
    if not layers:
        raise ModelError(f"LoRA adapts no layer of {path}; change its targets", path=path)
    for name, layer in layers.items():
        base_layer = layer.get_base_layer()
        if not (hasattr(base_layer, "in_features") or type(base_layer).__name__ == "Conv1D"):
            raise ModelError(
                f"LoRA on {name!r} of {path} is refused: {type(base_layer).__name__} is no linear"
                " layer; leave it out of the targets",
                module=name,
            )


def _read_config(folder: Path) -> LoraConfig:
    if not folder.is_dir():
        raise ModelError(f"warm_start folder {folder} does not exist", path=str(folder))
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"warm_start folder {folder} has no adapter_config.json; it must be a PEFT adapter",
            path=str(folder),
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"adapter_config.json in {folder} cannot be read: {error}", path=str(folder)
        ) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"the adapter in {folder} is of type {config.peft_type}, only LORA can be continued",
            path=str(folder),
        )
    refused = [name for name in REFUSED_SWITCHES if getattr(config, name, None)]
    refused += [f"bias={config.bias!r}"] if config.bias != "none" else []
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        refused.append(f"init_lora_weights={init!r}")
    if refused:
        raise ModelError(
            f"the adapter in {folder} uses {', '.join(refused)}; only plain LoRA can be continued."
            " Convert it with PEFT first",
            path=str(folder),
            refused=refused,
        )
    return config


def _saved_names(folder: Path) -> set[str]:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(
            f"{folder} has no {WEIGHTS_NAME}; adapters in pickle files (.bin) are never opened."
            " Save it again with safetensors",
            path=str(folder),
        )
    try:
        with safe_open(str(weights), framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights} is damaged: {error}", path=str(weights)) from error
