"""Make the built-in tokenizer and base model: ``python scripts/make_builtin.py``.

The same seed on the same machine with the same versions gives the same files. It takes about ten
minutes on two cores, and needs torch 2.9 or newer for its optimizer (the package does not). The
base sees plain text only (``alignfed.builtin.text``), never an instruction of the corpus.
"""

import argparse
import json
import math
import platform
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from check_builtin import encoded, exact_match
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignfed.builtin import MODEL_PATH, corpus, text

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
WORD_START = "\u2581"
LONGEST_TOKENS = 256
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_RECORDS = 5_000
EXACT_MATCH_RECORDS = 1_300


@dataclass(frozen=True, slots=True)
class Settings:
    """What determines the result, besides versions and machine."""

    seed: int
    steps: int
    batch_size: int
    length: int
    learning_rate: float
    hidden: int
    layers: int
    heads: int
    intermediate: int


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a unigram tokenizer with one token a word, and bytes for whatever it does not know.

    A piece's score is its log frequency, so that a known word always beats its spelling.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(WORD_START), pre_tokenizers.Punctuation()]
    )
    texts = list(islice(text.documents(random.Random(f"{seed}/tokenizer")), TOKENIZER_DOCUMENTS))
    for record in corpus.training_records(TOKENIZER_RECORDS, seed):
        texts += [record["instruction"] + ":", record["input"], record["response"]]
    counts = Counter(piece for one in texts for piece, _ in splitter.pre_tokenize_str(one))
    scores = {chr(code): -20.0 for code in range(33, 127)} | {WORD_START: -20.0}
    scores |= {piece: math.log(n / counts.total()) for piece, n in counts.items()}
    scores[f"{WORD_START}="] = -10.0  # the prompt's sign: one token, though never in text
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS]
    pieces += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    pieces += sorted(scores.items())
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(WORD_START)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=LONGEST_TOKENS,
    )


def token_rows(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int
) -> Iterator[list[int]]:
    """Yield rows of ``length`` tokens: whole documents back to back, each ended, the last cut."""
    documents = text.documents(rng)
    row: list[int] = []
    while True:
        for ids in tokenizer(list(islice(documents, 256)), add_special_tokens=False)["input_ids"]:
            row += [*ids, tokenizer.eos_token_id]
            if len(row) >= length:
                yield row[:length]
                row = []


def make_model(settings: Settings, vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained Llama with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=LONGEST_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pretrain(model: LlamaForCausalLM, rows: Iterator[list[int]], settings: Settings) -> list[float]:
    """Train in place on next tokens; return the loss of every step, in nats a token."""
    # Muon for the layers' matrices, AdamW for the embedding and the norms' gains. A trial with
    # AdamW alone (at 3e-3, on a slightly different mixture) took 2.6M tokens to a loss of 1.7,
    # this 1.0M.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizers = (
        torch.optim.Muon(
            matrices,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY},
                {"params": gains, "weight_decay": 0.0},
            ],
            betas=BETAS,
        ),
    )
    started = time.monotonic()
    losses: list[float] = []
    for step in range(settings.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        rate = settings.learning_rate * min((step + 1) / WARMUP_STEPS, 0.02 + 0.98 * cosine)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch = torch.tensor(list(islice(rows, settings.batch_size)))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            mean = sum(losses[-50:]) / 50
            print(f"step {step + 1} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
    return losses


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a standard Hugging Face folder: weights in float16, to be loaded in float32."""
    model.to(torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    # Half the bytes on disk, but half precision is slow and coarse on a CPU.
    _edit_json(out / "config.json", dtype="float32")
    # Version 5 of transformers writes a class name that version 4 does not know.
    _edit_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit_json(path: Path, **changes: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def main() -> None:
    """Make the tokenizer, train the base, and record how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=24, help="rows a step")
    parser.add_argument("--length", type=int, default=96, help="tokens a row")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=352)
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    out: Path = options.pop("out")
    torch.set_num_threads(options.pop("threads"))
    settings = Settings(**options)

    torch.manual_seed(settings.seed)
    started = time.monotonic()
    tokenizer = make_tokenizer(settings.seed)
    model = make_model(settings, len(tokenizer))
    print(f"{len(tokenizer)} tokens, {model.num_parameters()} parameters", flush=True)
    rows = token_rows(tokenizer, random.Random(f"{settings.seed}/text"), settings.length)
    losses = pretrain(model, rows, settings)
    write_folder(out, model, tokenizer)

    stored = LlamaForCausalLM.from_pretrained(out)
    records = corpus.evaluation_records(EXACT_MATCH_RECORDS, settings.seed)
    base_exact_match, _ = exact_match(stored, encoded(records, tokenizer), records)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": settings.seed,
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch_size * settings.length,
        "parameters": stored.num_parameters(),
        "vocabulary": len(tokenizer),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "base_exact_match": round(base_exact_match, 4),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
