"""Many clients at once against one after another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from alignfed.core.adapter import difference, norm
from alignfed.core.ports import TrainingJob
from alignfed.core.update import Task
from alignfed.errors import ModelError
from alignfed.training import cohort as cohort_module
from alignfed.training.cohort import CohortTrainer
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.loading import load_base
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.settings import LoraSettings, ModelSettings
from alignfed.training.stacked import StackedAdapters
from alignfed.training.stacked_layers import StackedForward
from alignfed.training.stacked_pass import StackedPass
from alignfed.training.templates import Example, TemplateSettings
from alignfed.training.width import bytes_per_client, fastest
from tests.training.conftest import save_tokenizer, tiny_llama_config
from tests.training.samples import TEMPLATE, moved, reranked

SETTINGS = LocalSettings(steps=3, batch_size=3, learning_rate=5e-3)
QUICK = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sentences(client_id, count):
    """Prompts and answers of very different lengths."""
    return tuple(
        Example("ab" * (1 + (client_id * 7 + n * 5) % 19), "cde" * (1 + n % 5), n % 5)
        for n in range(count)
    )


def clients(sizes):
    return {
        i: ClientData(f"client-{i}", sentences(i, size), sentences(i, 1))
        for i, size in enumerate(sizes)
    }


def trainers(base, changes=SETTINGS, sizes=(7, 4, 9), width=None, seed=0):
    template = TemplateSettings("{text}") if base.is_classifier else TEMPLATE
    encoder = Encoder(base, template, 48)
    data = clients(sizes)
    return (
        LocalTrainer(base, encoder, data, changes, seed),
        CohortTrainer(base, encoder, data, changes, seed, width=width or len(sizes)),
    )


def job(client_id, adapter, dispatch=0):
    return TrainingJob(Task(client_id, client_id, 0, dispatch), adapter)


def jobs_of(base, ranks, shake=0.02):
    found = []
    for client_id, rank in enumerate(ranks):
        start = moved(base.initial_adapter(), seed=client_id, size=shake)
        if rank is not None:
            names = {name: 1 + (rank + i) % 5 for i, name in enumerate(sorted(start.lora))}
            start = reranked(start, names, seed=client_id)
        found.append(job(client_id, start))
    return found


def require_equal(jobs, alone, together):
    for one, expected, found in zip(jobs, alone, together, strict=True):
        assert found.adapter.layout == one.adapter.layout
        assert found.num_examples == expected.num_examples
        # Adam divides a gradient by its own size: one that is nothing but rounding moves its
        # element as far as any other.
        assert found.metrics == pytest.approx(expected.metrics, rel=5e-4)
        moved_by = norm(difference(expected.adapter, one.adapter))
        assert moved_by > 1e-3
        assert norm(difference(found.adapter, expected.adapter)) < 1e-2 * moved_by


@pytest.fixture(scope="module")
def llama(llama_folder):
    return load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 3)


@pytest.fixture(scope="module")
def llama_classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-classifier")
    torch.manual_seed(15)
    LlamaForSequenceClassification(tiny_llama_config(num_labels=5)).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    return folder


def classifier_of(folder, **changes):
    return load_base(
        ModelSettings(str(folder), task="sequence_classification", num_labels=5, **changes),
        LoraSettings(4, 8.0),
        3,
    )


@pytest.fixture(scope="module")
def bases(llama, llama_classifier_folder, bert_folder, roberta_folder):
    return {
        "llama": llama,
        "llama classifier": classifier_of(llama_classifier_folder),
        "bert classifier": classifier_of(bert_folder),
        "roberta classifier": classifier_of(roberta_folder),
    }


amounts = st.one_of(
    st.builds(lambda n: {"steps": n}, st.integers(1, 4)),
    st.builds(lambda x: {"steps": None, "epochs": x}, st.sampled_from([0.5, 1.0, 1.5])),
)
policies = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "decay": st.sampled_from(["none", "linear", "cosine"]),
        "warmup_steps": st.integers(0, 2),
        "max_grad_norm": st.sampled_from([0.0, 0.05, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "fedprox_mu": st.sampled_from([0.0, 2.0]),
        "representation_penalty": st.sampled_from([0.0, 0.3]),
    }
)


@pytest.mark.parametrize(
    "kind", ["llama", "llama classifier", "bert classifier", "roberta classifier"]
)
@QUICK
@given(
    cohort=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([None, 1, 2, 5])), min_size=1, max_size=5
    ),
    amount=amounts,
    policy=policies,
    width=st.integers(1, 5),
)
def test_together_and_alone_give_the_same_numbers(kind, bases, cohort, amount, policy, width):
    base = bases[kind]
    changes = replace(SETTINGS, **amount, **policy)
    alone, together = trainers(base, changes, [size for size, _ in cohort], width)
    jobs = jobs_of(base, [rank for _, rank in cohort])
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert together.take_notes() == ()


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj",),
        ("down_proj", "lm_head"),
        ("layers.1.mlp.up_proj",),
        ("o_proj", "gate_proj", "k_proj"),
    ],
    ids=str,
)
def test_any_linear_layer_may_be_adapted(llama_folder, targets):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(3, 6.0, targets=targets), 3)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None, 2, 5])
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert together.take_notes() == ()


@pytest.mark.parametrize(
    "whole", [("lm_head",), ("input_layernorm", "norm"), ("embed_tokens",)], ids=str
)
def test_any_module_may_be_trained_whole(tmp_path, whole):
    torch.manual_seed(3)
    folder = tmp_path
    LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=False)).save_pretrained(folder)
    save_tokenizer(folder, opening=True)
    base = load_base(ModelSettings(str(folder)), LoraSettings(3, 6.0, modules_to_save=whole), 3)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert together.take_notes() == ()


def test_layernorms_trained_whole_are_stacked(bert_folder):
    base = load_base(
        ModelSettings(str(bert_folder), task="sequence_classification", num_labels=5),
        LoraSettings(3, 6.0, modules_to_save=("LayerNorm", "pooler", "word_embeddings")),
        3,
    )
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert together.take_notes() == ()


def test_position_embeddings_trained_whole_are_found_out(bert_folder):
    # All clients look up the same positions in one row: there is nothing to split.
    base = load_base(
        ModelSettings(str(bert_folder), task="sequence_classification", num_labels=5),
        LoraSettings(3, 6.0, modules_to_save=("position_embeddings",)),
        3,
    )
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    (note,) = together.take_notes()
    assert "one at a time" in note


@pytest.mark.parametrize("kind", ["llama_folder", "bert_folder"])
def test_checkpointing_gives_the_same_numbers_together(kind, request):
    folder = request.getfixturevalue(kind)
    if kind == "bert_folder":
        base = classifier_of(folder, gradient_checkpointing=True)
    else:
        base = load_base(
            ModelSettings(str(folder), gradient_checkpointing=True), LoraSettings(4, 8.0), 3
        )
    alone, together = trainers(base)
    jobs = jobs_of(base, [None, 1, 5])
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert not base.peft_model.training


def test_bf16_bases_train_fp32_adapters_together(llama_folder):
    base = load_base(ModelSettings(str(llama_folder), dtype="bfloat16"), LoraSettings(4, 8.0), 3)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None, 1, 5])
    for one, expected, found in zip(jobs, alone.train(jobs), together.train(jobs), strict=True):
        moved_by = norm(difference(expected.adapter, one.adapter))
        assert norm(difference(found.adapter, expected.adapter)) < 0.2 * moved_by
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=2e-2)
    assert together.take_notes() == ()


def test_adapters_come_back_in_the_dtype_they_were_sent_in(llama):
    alone, together = trainers(llama)
    jobs = [
        job(i, moved(llama.initial_adapter(), i).to(dtype))
        for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16])
    ]
    expected, found = alone.train(jobs), together.train(jobs)
    for one, other, sent in zip(expected, found, jobs, strict=True):
        assert one.adapter.layout == other.adapter.layout == sent.adapter.layout
        assert other.metrics == pytest.approx(one.metrics, rel=1e-4)


def test_the_same_jobs_at_the_same_width_give_the_same_bits(llama):
    jobs = jobs_of(llama, [None, 2, 5])
    first, second = (trainers(llama)[1].train(jobs) for _ in range(2))
    assert [one.adapter.checksum for one in first] == [one.adapter.checksum for one in second]
    assert [one.metrics for one in first] == [one.metrics for one in second]


def test_tasks_of_their_own_numbers_of_steps_train_together(llama):
    jobs = [
        TrainingJob(replace(one.task, steps=steps), one.adapter)
        for one, steps in zip(jobs_of(llama, [None] * 3), (2, 5, 1), strict=True)
    ]
    alone, together = trainers(llama)
    expected = alone.train(jobs)
    require_equal(jobs, expected, together.train(jobs))
    assert [together.work(one.task) for one in jobs] == [alone.work(one.task) for one in jobs]


def test_results_come_in_the_order_of_the_jobs(llama):
    changes = replace(SETTINGS, steps=None, epochs=1.0)
    _, together = trainers(llama, changes, (2, 9, 5, 7), width=2)
    jobs = jobs_of(llama, [None] * 4)
    forwards, backwards = together.train(jobs), together.train(jobs[::-1])
    assert [one.adapter.checksum for one in forwards] == [
        one.adapter.checksum for one in backwards[::-1]
    ]
    assert [one.num_examples for one in forwards] == [2, 9, 5, 7]


def test_no_jobs_give_no_results(llama):
    assert trainers(llama)[1].train([]) == []


def test_padded_ranks_stay_zero_and_are_not_clipped_with(llama):
    jobs = jobs_of(llama, [1, 5])
    stack = StackedAdapters([one.adapter for one in jobs], llama.device)
    one_pass = StackedPass(llama, 0.0)
    data = trainers(llama, sizes=(4, 4))[1].alone.data
    batch = one_pass.collate([next(data.batches(i, data.plan(i, 0))) for i in range(2)])
    leaves = stack.leaves(2)
    with StackedForward(llama) as forward:
        forward.use(leaves)
        one_pass.backward(batch, leaves)
    padded = 0
    for name, factors in leaves.lora.items():
        rank = jobs[0].adapter.lora[name].rank
        places = dict(zip(map(id, leaves.tensors), leaves.gradients, strict=True))
        for leaf in (factors.down, factors.up):
            padded += leaf[0, rank:].numel()
            assert not leaf[0, rank:].any()
            assert not places[id(leaf)][0, rank:].any()
    assert padded > 0


def test_nothing_is_computed_for_frozen_weights_or_below_the_first_adapter(llama_folder):
    base = load_base(
        ModelSettings(str(llama_folder)), LoraSettings(3, 6.0, targets=("layers.1.mlp.up_proj",)), 3
    )
    graphs = {}
    layers = base.peft_model.get_base_model().model.layers
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output, place=place: graphs.update({place: output.requires_grad})
        )
        for place, layer in enumerate(layers)
    ]
    _, together = trainers(base)
    together.train(jobs_of(base, [None] * 3))
    for handle in handles:
        handle.remove()
    assert graphs == {0: False, 1: True}
    assert all(one.grad is None for one in base.peft_model.parameters() if not one.requires_grad)


def test_the_base_is_left_as_it_was(llama):
    before = {name: one.detach().clone() for name, one in llama.peft_model.named_parameters()}
    forwards = {name: vars(m).get("forward") for name, m in llama.peft_model.named_modules()}
    one_pass_jobs = jobs_of(llama, [None, 2, 5])
    _, together = trainers(llama)
    together.train(one_pass_jobs)
    llama.install(llama.initial_adapter())
    frozen = {
        name: one for name, one in llama.peft_model.named_parameters() if not one.requires_grad
    }
    assert all(torch.equal(before[name], one) for name, one in frozen.items())
    after = {name: vars(m).get("forward") for name, m in llama.peft_model.named_modules()}
    assert forwards == after


def test_layers_are_restored_when_a_step_fails(llama):
    layer = next(iter(llama.lora_layers.values()))
    with pytest.raises(ZeroDivisionError), StackedForward(llama):
        assert "forward" in vars(layer)
        raise ZeroDivisionError
    assert "forward" not in vars(layer)


def test_dropout_is_trained_one_at_a_time_and_said(llama_folder):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0, dropout=0.3), 3)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    expected, found = alone.train(jobs), together.train(jobs)
    assert [one.adapter.checksum for one in expected] == [one.adapter.checksum for one in found]
    (note,) = together.take_notes()
    assert "dropout" in note
    assert together.take_notes() == ()


def test_a_mixture_of_experts_is_right_stacked_or_not(tmp_path):
    config = MixtralConfig(
        vocab_size=tiny_llama_config().vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(4)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, opening=True)
    lora = LoraSettings(4, 8.0, targets=("q_proj", "v_proj"))
    base = load_base(ModelSettings(str(tmp_path)), lora, 3)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    require_equal(jobs, alone.train(jobs), together.train(jobs))


class Shuffling(nn.Module):
    """Gives a layer positions in another order, as routing by expert does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        order = torch.arange(inputs.shape[0]).flip(0)
        return self.layer(inputs[order])[order]


def test_a_model_that_reorders_rows_is_found_out(llama_folder):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 3)
    block = base.peft_model.get_base_model().model.layers[0].mlp
    block.up_proj = Shuffling(block.up_proj)
    alone, together = trainers(base)
    jobs = jobs_of(base, [None] * 3)
    expected, found = alone.train(jobs), together.train(jobs)
    assert [one.adapter.checksum for one in expected] == [one.adapter.checksum for one in found]
    (note,) = together.take_notes()
    assert "numbers change" in note


def test_masks_are_left_out_for_causal_models_alone(bases):
    masked = {}
    for name, base in bases.items():
        _, together = trainers(base)
        together.train(jobs_of(base, [None] * 3))
        masked[name] = together._pass.masked
    assert masked == {
        "llama": False,
        "llama classifier": False,
        "bert classifier": True,
        "roberta classifier": True,
    }


def test_running_out_of_memory_halves_the_width_and_says_so(llama, monkeypatch):
    alone, together = trainers(llama, sizes=(5,) * 6)
    plain = StackedPass.backward

    def crowded(self, stacked, leaves):
        if stacked.count > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return plain(self, stacked, leaves)

    monkeypatch.setattr(StackedPass, "backward", crowded)
    jobs = jobs_of(llama, [None] * 6)
    require_equal(jobs, alone.train(jobs), together.train(jobs))
    assert together.width == 1 or together.width == 2
    notes = together.take_notes()
    assert len(notes) >= 1 and all("ran out of memory" in note for note in notes)


def test_no_memory_for_one_client_is_an_error_with_a_remedy(llama, monkeypatch):
    _, together = trainers(llama)
    jobs = jobs_of(llama, [None] * 3)
    together.train(jobs)

    def never(self, stacked, leaves):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StackedPass, "backward", never)
    with pytest.raises(ModelError, match="batch_size"):
        together.train(jobs)


def test_other_errors_are_not_taken_for_lack_of_memory(llama, monkeypatch):
    _, together = trainers(llama)
    jobs = jobs_of(llama, [None] * 3)
    together.train(jobs)

    def broken(self, stacked, leaves):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(StackedPass, "backward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        together.train(jobs)


def test_an_adapter_of_another_base_is_refused(llama, bases):
    _, together = trainers(llama)
    with pytest.raises(ModelError, match="does not fit"):
        together.train([job(0, bases["bert classifier"].initial_adapter())])


def test_a_width_below_one_is_refused(llama):
    encoder = Encoder(llama, TEMPLATE, 48)
    with pytest.raises(ModelError, match="at least 1"):
        CohortTrainer(llama, encoder, clients((3,)), SETTINGS, 0, width=0)


def test_the_width_is_chosen_by_measurement_and_kept(llama):
    encoder = Encoder(llama, TEMPLATE, 48)
    one = CohortTrainer(llama, encoder, clients((5, 5)), SETTINGS, 0)
    assert one.width is None
    chosen = one.choose_width(jobs_of(llama, [None] * 2), max_width=4)
    assert one.width == chosen.width <= chosen.limit == 4
    assert chosen.tokens_per_s[1] > 0 and chosen.width in chosen.tokens_per_s


def test_the_width_chosen_with_dropout_is_one(llama_folder):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0, dropout=0.3), 3)
    _, together = trainers(base)
    chosen = together.choose_width(jobs_of(base, [None]))
    assert chosen.width == together.width == 1
    assert "dropout" in chosen.notes[0]


def test_scarce_memory_limits_the_width(llama, monkeypatch):
    _, together = trainers(llama)
    monkeypatch.setattr(cohort_module, "free_bytes", lambda device: 1)
    chosen = together.choose_width(jobs_of(llama, [None]))
    assert chosen.width == chosen.limit == 1
    assert "memory limits the width" in chosen.notes[0]


def test_a_width_that_does_not_fit_is_not_chosen(llama, monkeypatch):
    _, together = trainers(llama)
    plain = StackedPass.backward

    def crowded(self, stacked, leaves):
        if stacked.count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, stacked, leaves)

    monkeypatch.setattr(StackedPass, "backward", crowded)
    monkeypatch.setattr(
        cohort_module, "fastest", lambda measure, limit: (4 if measure(4) else 2, {})
    )
    chosen = together.choose_width(jobs_of(llama, [None]))
    assert chosen.width == together.width == 2
    assert "a cohort of 4 ran out of memory" in chosen.notes[0]


@pytest.mark.parametrize(
    ("speeds", "limit", "width", "tried"),
    [
        ({1: 100, 2: 90}, 16, 1, [1, 2]),
        ({1: 100, 2: 102, 4: 500}, 16, 1, [1, 2]),
        ({1: 100, 2: 150, 4: 200, 8: 205}, 16, 4, [1, 2, 4, 8]),
        ({1: 100, 2: 150, 4: 200, 8: 300, 16: 400}, 16, 16, [1, 2, 4, 8, 16]),
        ({1: 100, 2: 150, 4: 200, 6: 300}, 6, 6, [1, 2, 4, 6]),
        ({1: 100, 2: 150, 4: None}, 16, 2, [1, 2]),
        ({1: 100}, 1, 1, [1]),
    ],
    ids=str,
)
def test_the_fastest_width_is_kept_while_wider_ones_gain(speeds, limit, width, tried):
    assert fastest(speeds.__getitem__, limit) == (width, {one: speeds[one] for one in tried})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_estimate_covers_what_is_kept_and_not_much_more(llama_folder, checkpointing):
    base = load_base(ModelSettings(str(llama_folder)), LoraSettings(4, 8.0), 3)
    data = trainers(base, sizes=(8,))[1].alone.data
    batch = next(data.batches(0, data.plan(0, 0)))
    one_pass = StackedPass(base, 0.0)
    one_pass.masked = False
    stack = one_pass.stack([base.initial_adapter()])
    leaves = stack.leaves(1)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with StackedForward(base) as forward, torch.autograd.graph.saved_tensors_hooks(keep, keep):
        forward.use(leaves)
        one_pass.backward(one_pass.collate([batch]), leaves)
    weights = {one.untyped_storage().data_ptr() for one in base.peft_model.parameters()}
    weights.add(stack.values.untyped_storage().data_ptr())
    activations = sum(size for place, size in kept.items() if place not in weights)
    estimate = (
        bytes_per_client(
            base.architecture,
            tokens=batch.num_tokens,
            targets=len(batch.targets),
            outputs=base.architecture.vocab_size,
            adapter_parameters=base.adapter_parameters,
            activation_bytes=4,
            gradient_checkpointing=checkpointing,
        )
        - 20 * base.adapter_parameters
    )
    if checkpointing:
        assert estimate < activations
    else:
        assert activations < estimate < 3 * activations
