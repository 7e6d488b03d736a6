import numpy as np
import pytest

from alignfed.errors import DataError, ModelError
from alignfed.training.encoding import Encoder, join
from alignfed.training.templates import Example, TemplateSettings
from tests.training.samples import TEMPLATE, sums, texts

BOS, EOS = 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def ids(base, text):
    return base.tokenizer(text, add_special_tokens=False).input_ids


def test_only_response_and_end_are_scored(base):
    sequences = Encoder(base, TEMPLATE, 64).encode([Example("12+3=", "15")])
    assert sequences[0].tolist() == [BOS, *ids(base, "12+3="), *ids(base, "15"), EOS]
    assert sequences.prompt_lengths.tolist() == [6]


def test_a_prompt_s_tokens_are_the_same_with_and_without_its_response(base):
    encoder = Encoder(base, TEMPLATE, 64)
    whole = encoder.encode(sums(0, 9))
    prompts = encoder.encode_prompts(sums(0, 9), room=8)
    for row in range(9):
        length = whole.prompt_lengths[row]
        assert prompts[row].tolist() == whole[row][:length].tolist()


def test_a_long_prompt_is_cut_from_the_left_and_keeps_its_opening(base):
    sequences = Encoder(base, TEMPLATE, 10).encode([Example("abcdefghijklmn", "xyz")])
    assert sequences[0].tolist() == [BOS, *ids(base, "jklmn"), *ids(base, "xyz"), EOS]
    assert sequences.prompt_lengths.tolist() == [6]


def test_a_response_too_long_on_its_own_loses_its_right_end(base):
    sequences = Encoder(base, TEMPLATE, 5).encode([Example("abc", "uvwxyz")])
    assert sequences[0].tolist() == [BOS, *ids(base, "uvwx")]
    assert sequences.prompt_lengths.tolist() == [1]


def test_prompts_leave_room_for_what_is_generated(base):
    encoder = Encoder(base, TEMPLATE, 10)
    prompts = encoder.encode_prompts([Example("abcdefghijklmn", "")], room=6)
    assert prompts[0].tolist() == [BOS, *ids(base, "lmn")]
    with pytest.raises(ModelError, match="no place for a prompt"):
        encoder.encode_prompts([Example("a", "")], room=10)


def test_a_tokenizer_without_opening_token_gets_none(base):
    base.bos_id = None
    sequences = Encoder(base, TEMPLATE, 64).encode([Example("1=", "2")])
    assert sequences[0].tolist() == [*ids(base, "1="), *ids(base, "2"), EOS]
    with pytest.raises(DataError, match="example 0 gives no token before"):
        Encoder(base, TEMPLATE, 64).encode([Example("", "2")])


def test_chat_turns_come_from_the_tokenizer_s_template(base):
    base.tokenizer.chat_template = CHAT_TEMPLATE
    encoder = Encoder(base, TemplateSettings("{q}", "{a}", chat=True), 64)
    sequences = encoder.encode([Example("hi", "ho")])
    assert sequences[0].tolist() == [BOS, *ids(base, "u:hi\na:"), *ids(base, "ho"), EOS]
    assert sequences.prompt_lengths.tolist() == [8]
    assert encoder.encode_prompts([Example("hi", "ho")], 4)[0].tolist() == sequences[0][:8].tolist()


def test_a_long_chat_prompt_keeps_its_opening(base):
    base.tokenizer.chat_template = CHAT_TEMPLATE
    encoder = Encoder(base, TemplateSettings("{q}", "{a}", chat=True), 8)
    sequences = encoder.encode([Example("abcdef", "ho")])
    assert sequences[0].tolist() == [BOS, *ids(base, "f\na:"), *ids(base, "ho"), EOS]


def test_a_chat_template_that_rewrites_its_prompt_is_refused(base):
    base.tokenizer.chat_template = (
        "{% if add_generation_prompt %}?{% endif %}{{ messages[0].content }}"
    )
    encoder = Encoder(base, TemplateSettings("{q}", "{a}", chat=True), 64)
    with pytest.raises(ModelError, match="does not continue"):
        encoder.encode([Example("hi", "ho")])


def test_chat_without_a_chat_template_is_refused(base):
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(base, TemplateSettings("{q}", "{a}", chat=True), 64)


def test_a_language_model_without_response_template_is_refused(base):
    with pytest.raises(DataError, match="response template"):
        Encoder(base, TemplateSettings("{q}"), 64)


@pytest.mark.parametrize("length", [1, 129])
def test_a_length_the_model_does_not_have_is_refused(base, length):
    with pytest.raises(ModelError, match="max_length"):
        Encoder(base, TEMPLATE, length)


def test_a_classifier_s_text_is_cut_as_its_tokenizer_cuts(classifier):
    sequences = Encoder(classifier, TemplateSettings("{text}"), 6).encode(
        [Example("abcdefgh", "", 3), Example("ab", "", 1)]
    )
    assert sequences[0].tolist() == [BOS, *ids(classifier, "abcde")]
    assert sequences[1].tolist() == [BOS, *ids(classifier, "ab")]
    assert sequences.labels.tolist() == [3, 1]


def test_joined_sequences_keep_their_order(classifier):
    encoder = Encoder(classifier, TemplateSettings("{text}"), 64)
    parts = [encoder.encode(texts(0, 3)), encoder.encode(texts(3, 4))]
    together, joined = encoder.encode(texts(0, 7)), join(parts)
    for name in ("tokens", "starts", "prompt_lengths", "labels"):
        assert np.array_equal(getattr(together, name), getattr(joined, name))
