"""One sealed safetensors blob: named tensors and one record of fields, under one checksum.

Reading is strict and executes nothing: sizes are compared before anything is parsed, and every
fault is a ``WireError`` with a typed reason. The checksum finds damage, not malice: who sent a
blob is for the transport's keys to prove.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from alignfed.core.reasons import RejectReason
from alignfed.errors import AlignFedError

FIELDS = "alignfed"
"""The one metadata key: a JSON object in canonical form."""

_LENGTH_BYTES = 8

_WIRE_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
}
_WIRE_NAMES = {dtype: name for name, dtype in _WIRE_DTYPES.items()}

# What starts a pickle (protocols 2 to 5) or a zip archive, as torch.save writes them: malformed
# like any other bytes, but named, because somebody will want to know.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class WireError(AlignFedError):
    """Bytes from outside are not the payload they should be; nothing in them was executed.

    Attributes:
        reason: why, in the words of the server's admission.
    """

    reason: RejectReason

    def __init__(self, message: str, reason: RejectReason) -> None:
        """Keep the reason."""
        super().__init__(message, reason=reason)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a blob may be.

    Attributes:
        payload_bytes: of the whole blob.
        header_bytes: of its header, which is JSON and therefore dearer to read than its size.
    """

    payload_bytes: int
    header_bytes: int = 4 << 20


def pack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> bytes:
    """Return a blob of tensors (fp32, bf16, fp16 or int8) and JSON fields; equal in, equal out."""
    apart = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
    digest = _digest(fields, {name: (_WIRE_NAMES[t.dtype], t) for name, t in apart.items()})
    return bytes(save(apart, {FIELDS: canonical({**fields, "checksum": digest})}))


def read_fields(payload: bytes, limits: Limits) -> dict[str, Any]:
    """Return a blob's fields without looking at its tensors; the checksum is not verified.

    Raises:
        WireError: too large, truncated, or not such a blob.
    """
    size = len(payload)
    if size > limits.payload_bytes:
        raise WireError(
            f"the payload has {size} bytes, at most {limits.payload_bytes} are expected",
            RejectReason.TOO_LARGE,
        )
    if size < _LENGTH_BYTES:
        raise _malformed(f"{size} bytes are too few for a safetensors header")
    length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    if length > size - _LENGTH_BYTES:
        if payload.startswith(_PICKLES):
            raise _malformed("it begins like a pickle or a zip archive; only safetensors is read")
        raise _malformed(f"its header claims {length} bytes, {size - _LENGTH_BYTES} are there")
    if length > limits.header_bytes:
        raise WireError(
            f"the payload's header has {length} bytes, at most {limits.header_bytes} are expected",
            RejectReason.TOO_LARGE,
        )
    header = _parse(payload[_LENGTH_BYTES : _LENGTH_BYTES + length], "its header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {FIELDS}:
        raise _malformed(f"its metadata must be the one key {FIELDS!r}")
    text = metadata[FIELDS]
    fields = _parse(text, "its metadata") if isinstance(text, str) else {}
    if not fields or canonical(fields) != text:
        raise _malformed("its metadata is not one JSON object in canonical form")
    return fields


def unpack(
    payload: bytes, limits: Limits, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """Return the tensors of a blob, each of the expected dtype and shape.

    Args:
        payload: bytes from outside.
        limits: how large they may be.
        expected: dtype and shape by name; not one more and not one less may be there.

    Raises:
        WireError: anything differs, or the checksum does.
    """
    fields = read_fields(payload, limits)
    try:
        found = dict(deserialize(payload))  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _malformed(str(error)) from error
    if set(found) != set(expected):
        name = min(set(found) ^ set(expected))
        what = "is missing" if name in expected else "is not part of the adapter"
        raise WireError(f"tensor {name!r} {what}", RejectReason.WRONG_NAMES)
    tensors, seen = {}, {}
    for name, (dtype, shape) in expected.items():
        entry = found[name]
        if entry["dtype"] != _WIRE_NAMES[dtype]:
            raise WireError(
                f"{name!r} is {entry['dtype']}, expected {_WIRE_NAMES[dtype]}",
                RejectReason.WRONG_DTYPE,
            )
        if tuple(entry["shape"]) != shape:
            raise WireError(
                f"{name!r} is {tuple(entry['shape'])}, expected {shape}", RejectReason.WRONG_SHAPE
            )
        tensors[name] = _tensor(entry["data"], dtype, shape)
        seen[name] = (entry["dtype"], tensors[name])
    claimed = fields.pop("checksum", None)
    if claimed != (digest := _digest(fields, seen)):
        raise WireError(
            f"its checksum is {digest[:12]}, it claims {str(claimed)[:12]}: damaged on the way",
            RejectReason.WRONG_CHECKSUM,
        )
    return tensors


def canonical(fields: Mapping[str, Any]) -> str:
    """Return the one JSON text of some fields; NaN and infinity in Python's spelling."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def _parse(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _malformed(f"{what} is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _digest(fields: Mapping[str, Any], tensors: Mapping[str, tuple[str, Tensor]]) -> str:
    """SHA-256 over the fields and, by name, each tensor's dtype, shape and exact bits."""
    digest = hashlib.sha256(canonical(fields).encode())
    for name in sorted(tensors):
        dtype, tensor = tensors[name]
        digest.update(repr((name, dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _malformed(what: str) -> WireError:
    return WireError(f"not an adapter payload: {what}", RejectReason.MALFORMED)
