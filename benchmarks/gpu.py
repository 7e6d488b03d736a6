"""Cohort against sequential on a GPU: a Llama of 1B parameters, random weights, sequence 512.

    python benchmarks/gpu.py [--widths 1,2,4,8,16,32] [--repeats 5] [--device cuda]

Every client makes two local steps of one sequence of 512 tokens, all scored, in bf16 with fp32
adapters.
Sequential is ``LocalTrainer``, one client after another; cohort is ``CohortTrainer`` at each width.
Utilisation is the model's FLOPs, forward and backward, over seconds and ``--peak-tflops`` (what the
card's maker states for dense bf16). Without CUDA it refuses; ``--device cpu`` runs a tiny model to
see that the script works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from cohort import full_examples
from measure import interleaved, peak_rss_bytes, publish, spread
from transformers import LlamaConfig, LlamaForCausalLM

from alignfed import builtin
from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.training.cohort import CohortTrainer
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.loading import load_base
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.templates import Example, TemplateSettings

BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
TINY = BILLION | {
    "vocab_size": 3200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
STEPS, LENGTH = 2, 512


def save_model(folder: Path, sizes: dict[str, int], dtype: torch.dtype, device: str) -> None:
    """Write a Llama of random parameters with the built-in tokenizer."""
    known = LlamaConfig.from_pretrained(str(builtin.MODEL_PATH)).vocab_size
    config = LlamaConfig.from_pretrained(
        str(builtin.MODEL_PATH), **(sizes | {"vocab_size": max(known, sizes["vocab_size"])})
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(builtin.MODEL_PATH) / name, folder)


def compare(
    folder: str, device: str, length: int, widths: list[int], repeats: int, peak: float | None
) -> dict[str, Any]:
    """Return tokens per second, utilisation and peak memory of each side."""
    settings = ModelSettings(folder, dtype="bfloat16", device=device)  # type: ignore[arg-type]
    base = load_base(settings, LoraSettings(16, 32.0), seed=0)
    encoder = Encoder(base, TemplateSettings("{prompt}", "{response}"), length)
    clients = max(widths)
    data = {
        client: ClientData(str(client), _examples(client, length), ()) for client in range(clients)
    }
    local = LocalSettings(steps=STEPS, batch_size=1, learning_rate=1e-4)
    start = base.initial_adapter()
    jobs = [TrainingJob(Task(client, client, 0, 0), start) for client in range(clients)]
    flops = base.training_flops_per_token(start)
    tokens = clients * STEPS * length
    alone = LocalTrainer(base, encoder, data, local, seed=0)
    trainers: dict[str, Any] = {"sequential": alone}
    for width in widths:
        if width > 1:
            trainers[f"cohort_{width}"] = CohortTrainer(
                base, encoder, data, local, seed=0, width=width
            )
    peaks: dict[str, int] = {}

    def side(name: str) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainers[name].train(jobs)
        if device == "cuda":
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated()
        else:
            peaks[name] = peak_rss_bytes()

    taken = interleaved({name: lambda name=name: side(name) for name in trainers}, repeats)
    shown: dict[str, Any] = {}
    for name, seconds in taken.items():
        rates = [tokens / one for one in seconds]
        shown[name] = {"tokens_per_s": spread(rates), "peak_bytes": peaks[name]}
        if peak is not None:
            shown[name]["utilisation"] = median(rates) * flops / (peak * 1e12)
        if name != "sequential":
            pairs = zip(taken["sequential"], seconds, strict=True)
            shown[name]["ratio_vs_sequential"] = spread([a / b for a, b in pairs])
            shown[name]["notes"] = trainers[name].take_notes()
    ratios = [one["ratio_vs_sequential"]["median"] for one in shown.values() if "notes" in one]
    return {
        "ratio_vs_sequential_best": max(ratios, default=1.0),
        "parameters": base.num_parameters,
        "flops_per_token": flops,
        "sides": shown,
    }


def _examples(client: int, length: int) -> tuple[Example, ...]:
    return tuple(
        Example(one.prompt, " ".join([one.response] * (length // 128 + 1)))
        for one in full_examples(client, STEPS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", default="1,2,4,8,16,32", help="clients trained together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16, for utilisation")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "torch sees no CUDA device, and this benchmark is about one; --device cpu runs a tiny"
            " model to see that the script works"
        )
    widths = sorted({int(one) for one in options.widths.split(",")})
    tiny = options.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), TINY if tiny else BILLION, torch.bfloat16, options.device)
        length = 64 if tiny else LENGTH
        figures = compare(
            folder, options.device, length, widths, options.repeats, options.peak_tflops
        )
    publish("gpu_smoke" if tiny else "gpu", figures | {"length": length, "device": options.device})


if __name__ == "__main__":
    main()
