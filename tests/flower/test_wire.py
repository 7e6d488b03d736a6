"""Adapters survive the wire, and nothing else does: every fault is one typed error."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter, LoraFactors, difference, norm
from alignfed.core.lora import exchange_of
from alignfed.core.reasons import RejectReason
from alignfed.errors import AdapterError
from alignfed.flower.blob import FIELDS, WireError, canonical, pack
from alignfed.flower.quantisation import BLOCK, dequantise, quantise
from alignfed.flower.wire import (
    Claims,
    Download,
    decode_download,
    decode_upload,
    download_encoding,
    encode_download,
    encode_upload,
    read_claims,
    upload_limits,
)
from tests.core.adapters import make_adapter, moved

BASE = make_adapter(1)
TRAINED = moved(BASE, 2)
CLAIMS = Claims("run-1", 7, 3, 40, "fp32", {"loss": 1.25, "tokens": 512.0})
LARGE = 1 << 20
ENCODINGS = ("fp32", "bf16", "fp16", "int8")


def upload(encoding="fp32", adapter=TRAINED, base=BASE, **changes):
    payload, _ = encode_upload(replace(CLAIMS, encoding=encoding, **changes), adapter, base)
    return payload


def same(first: Adapter, other: Adapter) -> bool:
    return first.checksum == other.checksum


def refused(payload, base=BASE) -> RejectReason:
    with pytest.raises(WireError) as caught:
        decode_upload(payload, base)
    assert str(caught.value)
    return caught.value.reason


def test_an_fp32_upload_arrives_bit_for_bit_with_all_it_says():
    claims, adapter = decode_upload(upload(), BASE)
    assert same(adapter, TRAINED)
    assert claims == replace(CLAIMS, size_bytes=len(upload()))
    update = claims.update(5, adapter)
    assert (update.task_id, update.client_id, update.base_version) == (7, 5, 3)
    assert update.num_examples == 40 and update.metrics == {"loss": 1.25, "tokens": 512.0}


@pytest.mark.parametrize(
    ("encoding", "most"), [("bf16", 2**-8), ("fp16", 2**-11), ("int8", 1 / 100)]
)
def test_a_lossy_upload_loses_a_fraction_of_the_step_and_not_of_the_weights(encoding, most):
    base = make_adapter(1, scale=1000.0)
    trained = moved(base, 2, 0.01)
    _, adapter = decode_upload(upload(encoding, trained, base), base)
    step = norm(difference(trained, base))
    # fp32's own rounding at 1000 is in the step already, and comes once more with the base.
    assert norm(difference(adapter, trained)) <= most * step + 1e-4


@pytest.mark.parametrize("encoding", ["fp32", "bf16", "fp16"])
def test_a_download_carries_its_layout_and_is_exact_where_the_encoding_is(encoding):
    lora = {"up": LoraFactors(torch.randn(3, 4), torch.randn(5, 3), 6.0, frozen=1)}
    adapter = Adapter.pack(lora, {"head": torch.randn(2, 2).to(torch.bfloat16)})
    payload = encode_download(Download("r", 4, adapter), encoding)
    found = decode_download(payload, max_bytes=LARGE)
    assert (found.run, found.base_version) == ("r", 4)
    assert found.adapter.layout == adapter.layout
    assert same(found.adapter, adapter) == (encoding == "fp32")
    assert norm(difference(found.adapter, adapter)) <= 2**-8 * norm(adapter)


def test_every_encoding_is_smaller_than_the_one_before():
    base = make_adapter(1, rank=64)
    sizes = [len(upload(encoding, moved(base, 1), base)) for encoding in ("fp32", "bf16", "int8")]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]
    assert abs(len(upload("fp16", moved(base, 1), base)) - sizes[1]) <= 16


def test_the_same_upload_is_the_same_bytes():
    assert upload("int8") == upload("int8")


def test_what_int8_lost_is_made_up_for_by_the_uploads_after_it():
    step = make_adapter(9, scale=1e-3)
    trained = Adapter(BASE.layout, {d: BASE.buffers[d] + step.buffers[d] for d in BASE.buffers})
    sums = {}
    for feedback in (False, True):
        carried, total = None, torch.zeros_like(BASE.buffers[torch.float32])
        for _ in range(50):
            payload, lost = encode_upload(replace(CLAIMS, encoding="int8"), trained, BASE, carried)
            carried = lost if feedback else None
            _, adapter = decode_upload(payload, BASE)
            total += difference(adapter, BASE).buffers[torch.float32]
        sums[feedback] = total
    truth = 50 * difference(trained, BASE).buffers[torch.float32]
    errors = {key: float((total - truth).norm()) for key, total in sums.items()}
    assert errors[True] < errors[False] / 10


def test_feedback_of_another_layout_is_left_out():
    plain, _ = encode_upload(replace(CLAIMS, encoding="int8"), TRAINED, BASE)
    other = make_adapter(3, rank=5)
    assert encode_upload(replace(CLAIMS, encoding="int8"), TRAINED, BASE, other)[0] == plain


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_numbers_that_are_not_finite_reach_admission_as_such(encoding, value):
    buffer = TRAINED.buffers[torch.float32].clone()
    buffer[3] = value
    spoiled = Adapter(TRAINED.layout, {torch.float32: buffer})
    payload, lost = encode_upload(replace(CLAIMS, encoding=encoding), spoiled, BASE)
    assert not decode_upload(payload, BASE)[1].is_finite()
    assert lost is None or lost.is_finite()
    claims = read_claims(upload(metrics={"loss": value}), max_bytes=LARGE)
    assert not math.isfinite(claims.metrics["loss"])


def test_fp16_refuses_what_it_cannot_hold_and_names_the_remedy():
    with pytest.raises(AdapterError, match="bf16"):
        upload("fp16", make_adapter(2, scale=1e6))


def test_weights_never_travel_down_in_int8():
    assert [download_encoding(one) for one in ENCODINGS] == ["fp32", "bf16", "fp16", "bf16"]
    with pytest.raises(AdapterError):
        encode_download(Download("r", 0, BASE), "int8")


@pytest.mark.parametrize("rule", ["factor", "ffa", "fedsa"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_lora_rule_s_uploads_travel_in_its_own_layout(rule, encoding):
    exchange = exchange_of(rule)
    base = exchange.upload(BASE)
    _, adapter = decode_upload(upload(encoding, exchange.upload(TRAINED), base), base)
    assert adapter.layout == exchange.upload_layout(BASE.layout)
    assert exchange.complete(adapter, BASE).layout == BASE.layout


@given(
    ranks=st.lists(st.integers(1, 5), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heads=st.lists(st.lists(st.integers(1, 4), max_size=3), max_size=2),
    seed=st.integers(0, 2**20),
    encoding=st.sampled_from(ENCODINGS),
)
@settings(max_examples=60, deadline=None)
def test_any_adapter_comes_back_in_its_own_layout(ranks, dtype, heads, seed, encoding):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lora = {
        f"layer.{i}": LoraFactors(draw(rank, 300 + i), draw(i + 1, rank), 1.5 * rank)
        for i, rank in enumerate(ranks)
    }
    base = Adapter.pack(lora, {f"head.{i}": draw(*shape) for i, shape in enumerate(heads)})
    trained = moved(base, seed, 0.01)
    claims, adapter = decode_upload(upload(encoding, trained, base), base)
    assert adapter.layout == base.layout
    assert claims.encoding == encoding
    if encoding == "fp32":
        assert same(adapter, trained)
    assert (
        norm(difference(adapter, trained))
        <= 0.02 * norm(difference(trained, base))
        + (0.0 if dtype == torch.float32 else 0.02 * norm(base))
        + 1e-6
    )


# --- damage -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_truncation_is_refused(encoding):
    payload = upload(encoding)
    for length in range(len(payload)):
        assert refused(payload[:length]) == RejectReason.MALFORMED


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_flipped_bit_is_refused(encoding):
    payload = bytearray(upload(encoding))
    for position in range(len(payload)):
        bit = 1 << (position % 8)
        payload[position] ^= bit
        refused(bytes(payload))
        payload[position] ^= bit
    decode_upload(bytes(payload), BASE)


@pytest.mark.parametrize("encoding", ["fp32", "bf16"])
def test_every_flipped_bit_of_a_download_is_refused(encoding):
    payload = bytearray(encode_download(Download("r", 4, BASE), encoding))
    for position in range(len(payload)):
        bit = 1 << (position * 5 % 8)
        payload[position] ^= bit
        with pytest.raises(WireError):
            decode_download(bytes(payload), max_bytes=LARGE)
        payload[position] ^= bit
    decode_download(bytes(payload), max_bytes=LARGE)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(payload):
    refused(payload)
    with pytest.raises(WireError):
        decode_download(payload, max_bytes=LARGE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def framed(header: str, data: bytes = b"") -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@given(json_values, st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_json_for_a_header_is_refused(value, data):
    refused(framed(json.dumps(value), data))
    refused(framed(json.dumps({"__metadata__": value}), data))
    refused(framed(json.dumps({"__metadata__": {FIELDS: canonical({"a": value})}}), data))


FIELDS_NOW = {
    "format": 1, "kind": "upload", "run": "run-1", "task_id": 7, "base_version": 3,
    "num_examples": 40, "encoding": "fp32", "metrics": {"loss": 1.0},
}  # fmt: skip


@given(st.sampled_from(sorted(FIELDS_NOW)), json_values)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_taken_for_what_it_is_or_refused(name, value):
    payload = pack(named(TRAINED), {**FIELDS_NOW, name: value})
    try:
        claims, adapter = decode_upload(payload, BASE)
    except WireError as error:
        assert error.reason == RejectReason.MALFORMED
    else:
        assert same(adapter, TRAINED)
        assert isinstance(claims.task_id, int) and isinstance(claims.num_examples, int)
        assert all(isinstance(number, float) for number in claims.metrics.values())


LAYOUT_NOW = {
    "lora": [["layers.0.q_proj", 6, 5, 2, 4.0, "float32", 0]],
    "dense": [["score.weight", [3, 6], "float32"]],
}


@given(
    st.sampled_from(["lora", "dense"]),
    st.none() | st.tuples(st.integers(0, 6), st.none() | st.integers(0, 2)),
    json_values,
)
@settings(max_examples=300, deadline=None)
def test_any_layout_in_a_download_is_taken_for_what_it_is_or_refused(part, place, value):
    layout = json.loads(json.dumps(LAYOUT_NOW))
    if place is None:
        layout[part] = value
    else:
        row = layout[part][0]
        if place[0] < len(row):
            row[place[0]] = value
        if place[1] is not None:
            layout[part] *= place[1]
    fields = {"format": 1, "kind": "download", "run": "r", "base_version": 0, "encoding": "fp32"}
    payload = pack({"score.weight": torch.ones(3, 6)}, {**fields, "layout": layout})
    try:
        found = decode_download(payload, max_bytes=LARGE).adapter
    except WireError:
        return
    assert found.layout.lora == () and dict(found.dense).keys() <= {"score.weight"}


def named(adapter):
    found = {}
    for name, factors in adapter.lora.items():
        found[name + ".lora_A"], found[name + ".lora_B"] = factors.a, factors.b
    return {**found, **adapter.dense}


def test_a_payload_made_by_hand_is_taken_when_it_is_right():
    assert same(decode_upload(pack(named(TRAINED), FIELDS_NOW), BASE)[1], TRAINED)


def hand_made(**changes):
    return pack({**named(TRAINED), **changes}, FIELDS_NOW)


class Bomb:
    """Notices being unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a payload was unpickled",))


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"x": torch.ones(2)}, file)
    return file.getvalue()


def without(name):
    tensors = named(TRAINED)
    del tensors[name]
    return pack(tensors, FIELDS_NOW)


HOSTILE = {
    "nothing": (b"", RejectReason.MALFORMED),
    "pickle": (pickle.dumps(Bomb()), RejectReason.MALFORMED),
    "old pickle": (pickle.dumps(Bomb(), protocol=0), RejectReason.MALFORMED),
    "torch.save": (torch_file(), RejectReason.MALFORMED),
    "ten times the size": (upload() + bytes(10 * len(upload()) + LARGE), RejectReason.TOO_LARGE),
    "trailing data": (upload() + b"\0", RejectReason.MALFORMED),
    "huge header length": (struct.pack("<Q", 2**63) + bytes(64), RejectReason.MALFORMED),
    "header beyond its limit": (
        framed(" " * (upload_limits(BASE.layout).header_bytes + 1)),
        RejectReason.TOO_LARGE,
    ),
    "nested header": (framed("[" * 9_000 + "]" * 8_000), RejectReason.MALFORMED),
    "a key twice": (framed('{"__metadata__":{},"__metadata__":{}}'), RejectReason.MALFORMED),
    "a number of 9,000 digits": (framed("1" * 9_000), RejectReason.MALFORMED),
    "no metadata": (pack({}, {})[:8] + b"{}", RejectReason.MALFORMED),
    "missing tensor": (without("score.weight"), RejectReason.WRONG_NAMES),
    "renamed tensor": (hand_made(**{"score.bias": torch.ones(3)}), RejectReason.WRONG_NAMES),
    "wrong shape": (hand_made(**{"score.weight": torch.ones(6, 3)}), RejectReason.WRONG_SHAPE),
    "wrong rank": (
        hand_made(**{"layers.0.q_proj.lora_A": torch.ones(3, 6)}),
        RejectReason.WRONG_SHAPE,
    ),
    "another dtype than it says": (
        hand_made(**{"score.weight": torch.ones(3, 6).half()}),
        RejectReason.WRONG_DTYPE,
    ),
    "another layout": (upload(adapter=make_adapter(1, rank=3), base=make_adapter(1, rank=3)),
                       RejectReason.WRONG_SHAPE),
    "a download": (encode_download(Download("run-1", 3, BASE), "fp32"), RejectReason.MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_refused_with_its_reason(name):
    payload, reason = HOSTILE[name]
    assert refused(payload) == reason


NAMED = {"extra": "fields", "metrics": "metric"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_id", True), ("task_id", "7"), ("task_id", 2**70), ("base_version", 1.0),
        ("num_examples", None), ("run", ""), ("run", "../../etc"), ("encoding", "fp8"),
        ("encoding", ["fp32"]), ("metrics", {"loss": "low"}), ("metrics", {"loss": 10**400}),
        ("metrics", {"a b": 1.0}), ("metrics", {str(i): 0.0 for i in range(65)}),
        ("format", 2), ("format", True), ("kind", "download"), ("extra", 1),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(name, value):
    with pytest.raises(WireError, match=NAMED.get(name, name)) as caught:
        decode_upload(pack(named(TRAINED), {**FIELDS_NOW, name: value}), BASE)
    assert caught.value.reason == RejectReason.MALFORMED


@pytest.mark.parametrize(
    ("name", "value"),
    [("task_id", -1), ("base_version", 99), ("num_examples", 0), ("num_examples", -4)],
)
def test_a_claim_that_admission_judges_is_passed_on_to_it(name, value):
    assert getattr(decode_upload(upload(**{name: value}), BASE)[0], name) == value


def test_a_scale_that_is_not_finite_gives_numbers_that_are_not():
    tensors = {}
    for name, tensor in named(TRAINED).items():
        tensors[name], tensors["scales:" + name] = quantise(tensor)
    tensors["scales:score.weight"][0] = math.nan
    payload = pack(tensors, {**FIELDS_NOW, "encoding": "int8"})
    assert not decode_upload(payload, BASE)[1].is_finite()


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), max_size=700))
@settings(max_examples=100, deadline=None)
def test_quantisation_is_off_by_at_most_half_a_step(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    codes, scales = quantise(values)
    found = dequantise(codes, scales)
    assert found.shape == values.shape
    for start in range(0, len(numbers), BLOCK):
        block = values[start : start + BLOCK].double()
        off = (found[start : start + BLOCK].double() - block).abs().max()
        assert off <= block.abs().max() / 254 * (1 + 1e-5) + 1e-43


def test_a_limit_holds_every_upload_of_its_layout_with_the_most_it_may_say():
    name = "ö" * 40
    base = Adapter.pack({name: LoraFactors(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    metrics = {f"{i:064d}": -1.2345678901234567e-300 for i in range(64)}
    for encoding in ENCODINGS:
        payload = upload(encoding, base, base, run="r" * 128, metrics=metrics)
        assert len(payload) <= upload_limits(base.layout).payload_bytes
        assert decode_upload(payload, base)[0].metrics == metrics
