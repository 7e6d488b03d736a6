"""Small real models and tokenizers, made once a session; nothing is downloaded."""

import os
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from alignfed.training.loading import load_base
from alignfed.training.models import BaseModel
from alignfed.training.settings import LoraSettings, ModelSettings

os.environ["HF_HUB_OFFLINE"] = "1"

CHARACTERS = string.ascii_letters + string.digits + " .,:;?!=+-*/#$\n"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save_tokenizer(folder: Path, *, opening: bool) -> None:
    """One token a character; with an opening token before every text if asked for."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def tiny_llama_config(**changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(11)
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return folder


@pytest.fixture(scope="session")
def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.2,
        num_labels=5,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, bert_config: BertConfig) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(12)
    BertForSequenceClassification(bert_config).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return folder


@pytest.fixture(scope="session")
def bert_without_pooler_folder(
    tmp_path_factory: pytest.TempPathFactory, bert_config: BertConfig
) -> Path:
    folder = tmp_path_factory.mktemp("bert-without-pooler")
    torch.manual_seed(13)
    BertModel(bert_config, add_pooling_layer=False).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return folder


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(14)
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=130,
        initializer_range=0.2,
        num_labels=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return folder


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The real data and model, where the environment names them."""
    named = os.environ.get("ALIGNFED_SHARED")
    if named is None:
        pytest.skip("ALIGNFED_SHARED is not set: no real data to test on")
    folder = Path(named)
    assert folder.is_dir(), f"ALIGNFED_SHARED names {folder}, which is no folder"
    return folder


@pytest.fixture
def base(llama_folder: Path) -> BaseModel:
    return load_base(ModelSettings(str(llama_folder)), LoraSettings(rank=4, alpha=8.0), seed=3)


@pytest.fixture
def classifier(bert_folder: Path) -> BaseModel:
    return load_base(
        ModelSettings(str(bert_folder), task="sequence_classification", num_labels=5),
        LoraSettings(rank=4, alpha=8.0),
        seed=3,
    )
