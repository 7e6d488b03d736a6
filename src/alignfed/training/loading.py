"""Base models from a folder or the hub, wrapped with LoRA. What cannot be honoured is refused.

A local folder is read without the network. Weights that the checkpoint lacks are drawn from the
seed, and must be among the modules trained whole: a frozen random weight would be lost with the
process, and the exported adapter would fit no other copy of the base.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.pytorch_utils import Conv1D

from alignfed.errors import ModelError
from alignfed.training.architecture import Architecture, read_architecture
from alignfed.training.models import BaseModel
from alignfed.training.naming import listed
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.streams import torch_seed
from alignfed.training.warm_start import load_warm_start, require_plain_lora

HEAD_NAMES = ("score", "classifier")
"""Where transformers keeps a sequence classifier's head; PEFT trains these whole."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError)
"""What transformers raises for files that are missing, malformed or of an unknown kind."""


def load_base(model: ModelSettings, lora: LoraSettings, seed: int) -> BaseModel:
    """Load tokenizer and frozen base once, and wrap them with a trainable fp32 adapter.

    Args:
        model: which base.
        lora: what to train on it.
        seed: decides the adapter's and a new head's initial values.

    Raises:
        ModelError: the base, tokenizer or adapter is missing, malformed, or does not fit.
    """
    device = _device(model)
    source, options = _source(model)
    tokenizer = _tokenizer(source, options)
    with torch.random.fork_rng(_cuda_indices(device)), _quiet():
        torch.manual_seed(torch_seed(seed, "initial-weights"))
        base, missing = _weights(model, source, options, device)
        pad_id, bos_id, eos_id, stop_ids = _special_tokens(base, tokenizer, model)
        architecture = _architecture(base)
        if lora.warm_start is None:
            peft_model = _fresh_adapter(base, model, lora)
            require_plain_lora(peft_model, model.path)
        else:
            peft_model = load_warm_start(base, Path(lora.warm_start).expanduser(), lora.dropout)
    head = _head(peft_model, model)
    _require_trained(missing, peft_model, model)
    if model.gradient_checkpointing:
        _checkpoint_layers(peft_model, model)
    peft_model.config.use_cache = False
    return BaseModel(
        model,
        lora.dropout,
        peft_model,
        tokenizer,
        architecture,
        head,
        pad_id=pad_id,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stop_ids,
    )


def _device(model: ModelSettings) -> torch.device:
    available = torch.cuda.is_available()
    if model.device == "cpu":
        return torch.device("cpu")
    if model.device == "auto" and not available:
        if model.quantization is not None:
            raise ModelError("a 4-bit base needs CUDA, and device 'auto' found none")
        return torch.device("cpu")
    if not available:
        raise ModelError("model device is 'cuda', but torch sees no CUDA device; use 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


def _cuda_indices(device: torch.device) -> list[int]:
    return [] if device.index is None else [device.index]


def _source(model: ModelSettings) -> tuple[str, dict[str, Any]]:
    """Return what transformers should load and how, without the network for a folder."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model folder {folder} has no config.json; it must be in the Hugging Face layout",
                path=str(folder),
            )
        return str(folder), {"local_files_only": True}
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1 or folder.exists():
        raise ModelError(
            f"model path {model.path} is not a folder; name a folder in the Hugging Face layout or"
            " a model on the hub",
            path=model.path,
        )
    return model.path, {"revision": model.revision} if model.revision else {}


def _tokenizer(source: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"the tokenizer of {source} cannot be loaded: {_line(error)}; a tokenizer.json must lie"
            " beside the model",
            path=source,
        ) from error
    # Sequences are cut to max_length here; the tokenizer need not warn of what it sees before.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _weights(
    model: ModelSettings, source: str, options: dict[str, Any], device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Return the base, frozen, in evaluation mode and on its device; and the weights it lacked."""
    loader = (
        AutoModelForCausalLM if model.task == "causal_lm" else AutoModelForSequenceClassification
    )
    try:
        config = AutoConfig.from_pretrained(source, **options)
        changes = {key: 0.0 for key, value in config.to_dict().items() if _is_dropout(key, value)}
        if model.task == "sequence_classification":
            _require_fitting_head(config, model)
            changes |= _labels(model)
        config.update(changes)
        loaded, report = loader.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, model.dtype),
            output_loading_info=True,
            **options,
            **_quantization(model),
            **({"device_map": {"": device.index}} if device.type == "cuda" else {}),
        )
    except (*_LOAD_ERRORS, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"base model {source} cannot be loaded as {model.task}: {_line(error)}", path=source
        ) from error
    base: nn.Module = loaded
    base.requires_grad_(False)
    base.eval()
    return base, sorted(report["missing_keys"])


def _is_dropout(key: str, value: Any) -> bool:
    return "drop" in key and isinstance(value, float)


def _require_fitting_head(config: Any, model: ModelSettings) -> None:
    trained = any("SequenceClassification" in name for name in config.architectures or ())
    if trained and config.num_labels != model.num_labels:
        raise ModelError(
            f"{model.path} is a classifier of {config.num_labels} classes, but num_labels is"
            f" {model.num_labels}; set it to {config.num_labels}, or start from a checkpoint"
            " without a head",
            num_labels=model.num_labels,
            limit=config.num_labels,
        )


def _labels(model: ModelSettings) -> dict[str, Any]:
    names = model.label_names or tuple(f"LABEL_{i}" for i in range(model.num_labels or 0))
    return {
        "num_labels": model.num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        # One of several classes; a checkpoint may have been a regressor before.
        "problem_type": "single_label_classification",
    }


def _quantization(model: ModelSettings) -> dict[str, Any]:
    if model.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "a 4-bit base needs bitsandbytes, which is not installed; install alignfed with its"
            " optional extra 'quantization'"
        )
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
    }


def _special_tokens(
    base: Any, tokenizer: Any, model: ModelSettings
) -> tuple[int, int | None, int | None, frozenset[int]]:
    """Return filler, opening and closing token, and every token that ends a generated text."""
    config = base.config.get_text_config()
    eos_id: int | None = tokenizer.eos_token_id
    if model.task == "causal_lm" and eos_id is None:
        raise ModelError(
            f"the tokenizer of {model.path} has no eos_token; a response could never end."
            " Set eos_token in its tokenizer_config.json",
            path=model.path,
        )
    for pad_id in (config.pad_token_id, tokenizer.pad_token_id, eos_id, tokenizer.unk_token_id):
        if isinstance(pad_id, int) and 0 <= pad_id < config.vocab_size:
            break
    else:
        raise ModelError(
            f"{model.path} has no token that could fill short sequences; set pad_token in its"
            " tokenizer_config.json",
            path=model.path,
        )
    # A classifier finds each text's last token by this value.
    config.pad_token_id = base.config.pad_token_id = pad_id
    bos_id: int | None = tokenizer.bos_token_id
    if bos_id is not None and tokenizer("").input_ids[:1] != [bos_id]:
        bos_id = None
    generation = getattr(base, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    stops = {eos_id, *(more if isinstance(more, list) else [more])} - {None}
    return pad_id, bos_id, eos_id, frozenset(stops)


def _architecture(base: Any) -> Architecture:
    embeddings = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    total = matrices = 0
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            # A 4-bit weight is stored packed; its layer still knows its two sizes.
            packed = type(parameter).__name__ == "Params4bit"
            size = module.in_features * module.out_features if packed else parameter.numel()
            if id(parameter) in embeddings and isinstance(module, nn.Embedding):
                total += size
            elif parameter.ndim >= 2:
                matrices += size
                total += 0 if id(parameter) in embeddings else size  # tied: counted there
            else:
                total += size
    weight_bytes = sum(one.numel() * one.element_size() for one in base.parameters())
    return read_architecture(
        base.config, num_parameters=total, matrix_parameters=matrices, weight_bytes=weight_bytes
    )


def _fresh_adapter(base: Any, model: ModelSettings, lora: LoraSettings) -> PeftModel:
    linear = sorted(
        {name.rpartition(".")[2] for name, one in base.named_modules() if _is_linear(one)}
    )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if model.task == "causal_lm" else TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        modules_to_save=list(lora.modules_to_save) or None,
        # GPT-2's layers hold their weights transposed.
        fan_in_fan_out=any(isinstance(one, Conv1D) for one in base.modules()),
        revision=model.revision,
    )
    if isinstance(lora.targets, tuple):
        for target in lora.targets:
            if not any(
                name == target or name.endswith(f".{target}") for name, _ in base.named_modules()
            ):
                raise ModelError(
                    f"LoRA target {target!r} names no module of {model.path}; its linear layers"
                    f" are {listed(linear)}",
                    target=target,
                )
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"LoRA cannot be put on {model.path}: {_line(error)}; its linear layers are"
            f" {listed(linear)}",
            path=model.path,
        ) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _head(peft_model: PeftModel, model: ModelSettings) -> nn.Module:
    """Return the module that turns features into logits."""
    base: Any = peft_model.get_base_model()
    if model.task == "causal_lm":
        head: nn.Module | None = base.get_output_embeddings()
    else:
        trained = peft_model.peft_config["default"].modules_to_save or []
        found = [getattr(base, name) for name in (*HEAD_NAMES, *trained) if hasattr(base, name)]
        head = found[0] if found else None
    if head is None:
        raise ModelError(
            f"{model.path} loaded as {model.task} has no output head that could be found; for a"
            " classifier name it in modules_to_save",
            path=model.path,
        )
    return head


def _require_trained(missing: list[str], peft_model: PeftModel, model: ModelSettings) -> None:
    trained = tuple(peft_model.peft_config["default"].modules_to_save or ())
    lost = [
        key
        for key in missing
        if not any(re.search(rf"(^|\.){re.escape(module)}\.", key) for module in trained)
    ]
    if lost:
        modules = sorted({key.split(".")[-3 if key.count(".") > 1 else 0] for key in lost})
        raise ModelError(
            f"the checkpoint {model.path} lacks {listed(lost, 4)}; frozen random weights would make"
            f" the exported adapter useless elsewhere. Train them whole: modules_to_save ="
            f" {modules}",
            path=model.path,
            missing=lost,
        )


def _checkpoint_layers(peft_model: PeftModel, model: ModelSettings) -> None:
    try:
        # Non-reentrant: the embeddings need no gradient for the layers above to get theirs.
        peft_model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    except ValueError as error:
        raise ModelError(
            f"{model.path} cannot checkpoint its layers: {_line(error)}; set"
            " gradient_checkpointing to false",
            path=model.path,
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and load reports, whose contents are checked here and raised."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still asks by the name that transformers 5.23 deprecates.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
