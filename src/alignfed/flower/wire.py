"""Adapters as bytes: one safetensors blob each way, every fault typed, nothing unpickled.

A download is the adapter itself with its layout. An upload leaves its layout out: the server knows
what it sent. In fp32 an upload is the trained adapter, bit for bit. In the lossy encodings it is
the difference from what the client was sent, which is small, so that rounding costs a fraction of
the step and not a fraction of the weights; the server adds its own copy of the base. int8 may carry
error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): what one upload lost
is added to the client's next, and never leaves the client otherwise.

NaN and infinite numbers pass: the server's admission refuses and records them like a simulation's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfed.core.adapter import (
    Adapter,
    AdapterLayout,
    DenseShape,
    LoraShape,
    difference,
    linear_combination,
    require_same_layout,
    zeros_like,
)
from alignfed.core.update import Update
from alignfed.errors import AdapterError
from alignfed.flower.blob import Limits, pack, read_fields, unpack
from alignfed.flower.fields import FORMAT, bad_field, check_fields, layout_value, require_run
from alignfed.flower.messages import Encoding
from alignfed.flower.quantisation import dequantise, num_blocks, quantise

_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
_SUFFIX = {"a": ".lora_A", "b": ".lora_B", "dense": ""}
_SCALES = "scales:"


@dataclass(frozen=True, slots=True)
class Download:
    """What a device starts from.

    Attributes:
        run: the server's run.
        base_version: the server version it belongs to.
        adapter: the adapter, as the encoding left it.
    """

    run: str
    base_version: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Claims:
    """What an upload says of itself; nobody has checked it against anything.

    Attributes:
        run: the run it was trained for.
        task_id: the task it answers.
        base_version: the server version it started from.
        num_examples: training examples it was computed from.
        encoding: how its numbers travel.
        metrics: what the client reports.
        size_bytes: bytes that travelled.
    """

    run: str
    task_id: int
    base_version: int
    num_examples: int
    encoding: Encoding
    metrics: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int = 0

    def update(self, client_id: int, adapter: Adapter) -> Update:
        """Return the update that the coordinator is told of."""
        return Update(
            self.task_id, client_id, self.base_version, adapter, self.num_examples, self.metrics
        )


def download_encoding(encoding: Encoding) -> Encoding:
    """Return how an adapter travels down where uploads use ``encoding``.

    int8 is for differences alone: the weights themselves would lose what training added to them.
    """
    return "bf16" if encoding == "int8" else encoding


def encode_download(download: Download, encoding: Encoding) -> bytes:
    """Return the bytes of an adapter on its way to a device.

    Raises:
        AdapterError: int8 was asked for, or fp16 cannot hold a number.
    """
    if encoding == "int8":
        raise AdapterError("an adapter is not sent down in int8; use download_encoding")
    fields = {
        "format": FORMAT,
        "kind": "download",
        "run": require_run(download.run),
        "base_version": download.base_version,
        "encoding": encoding,
        "layout": layout_value(download.adapter.layout),
    }
    return pack(_encoded(download.adapter, encoding), fields)


def decode_download(payload: bytes, *, max_bytes: int) -> Download:
    """Return the adapter that a server sent.

    Raises:
        WireError: the payload is larger than ``max_bytes`` or is not a download.
    """
    limits = Limits(max_bytes)
    fields = check_fields(read_fields(payload, limits), "download")
    if fields["encoding"] == "int8":
        raise bad_field("encoding", "int8", "is for uploads alone")
    adapter = _decoded(payload, limits, fields["layout"], fields["encoding"])
    return Download(fields["run"], fields["base_version"], adapter)


def encode_upload(
    claims: Claims, adapter: Adapter, base: Adapter, carried: Adapter | None = None
) -> tuple[bytes, Adapter | None]:
    """Return an upload's bytes, and in int8 what they lost, to be carried to the next upload.

    Args:
        claims: what goes with it; its size is not looked at.
        adapter: what travels of the trained adapter (``Exchange.upload``).
        base: the same of what the client was sent; equal in layout.
        carried: what the upload before lost; left out where its layout is another.

    Raises:
        AdapterError: the layouts differ, or fp16 cannot hold a number.
    """
    fields = {
        "format": FORMAT,
        "kind": "upload",
        "run": require_run(claims.run),
        "task_id": claims.task_id,
        "base_version": claims.base_version,
        "num_examples": claims.num_examples,
        "encoding": claims.encoding,
        "metrics": dict(claims.metrics),
    }
    require_same_layout(adapter, base)
    if claims.encoding == "fp32":
        return pack(_encoded(adapter, "fp32"), fields), None
    change = difference(adapter.to(torch.float32), base.to(torch.float32))
    if claims.encoding != "int8":
        return pack(_encoded(change, claims.encoding), fields), None
    if carried is not None and carried.layout == change.layout:
        change = linear_combination([(1.0, change), (1.0, carried)])
    tensors = _encoded(change, "int8")
    lost = difference(change, _assembled(tensors, change.layout, "int8"))
    # Numbers that are not finite must not follow the client into its next upload.
    return pack(tensors, fields), lost if lost.is_finite() else zeros_like(lost)


def read_claims(payload: bytes, *, max_bytes: int) -> Claims:
    """Return what an upload says of itself, at the cost of reading its header.

    Raises:
        WireError: the payload is larger than ``max_bytes`` or is not an upload.
    """
    return _claims(payload, Limits(max_bytes))


def decode_upload(payload: bytes, base: Adapter) -> tuple[Claims, Adapter]:
    """Return an upload's claims and its adapter, in the layout of ``base``.

    Args:
        payload: bytes from a device.
        base: what travels of the adapter that the task's client was sent (``Exchange.upload``).

    Raises:
        WireError: larger than any upload of this layout, damaged, or not such an upload.
    """
    limits = upload_limits(base.layout)
    claims = _claims(payload, limits)
    if claims.encoding == "fp32":
        return claims, _decoded(payload, limits, base.layout, "fp32")
    change = _decoded(payload, limits, _plain(base.layout), claims.encoding)
    whole = linear_combination([(1.0, base.to(torch.float32)), (1.0, change)])
    return claims, _in_layout(whole, base.layout)


def upload_limits(layout: AdapterLayout) -> Limits:
    """Return how large an upload of a layout can be at most, in any encoding."""
    names = [name + _SUFFIX[part] for name, part, *_ in layout.slices]
    # Twice, because int8 names its scales too. 160 bytes hold an entry around its name, whose
    # letters JSON may spell with six; 16 KiB hold the fields.
    header_bytes = (16 << 10) + sum(2 * (160 + 6 * len(name)) for name in names)
    elements = sum(layout.sizes.values())
    return Limits(header_bytes + 4 * elements, header_bytes)


# --- tensors ------------------------------------------------------------------------------


def _named(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names on the wire."""
    found = {}
    for name, factors in adapter.lora.items():
        found[name + _SUFFIX["a"]], found[name + _SUFFIX["b"]] = factors.a, factors.b
    clash = [name for name in adapter.dense if name in found or name.startswith(_SCALES)]
    if clash:
        raise AdapterError(f"tensor {clash[0]!r} has a name that the wire uses itself")
    return {**found, **adapter.dense}


def _encoded(adapter: Adapter, encoding: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, values in _named(adapter).items():
        if encoding == "int8":
            found[name], found[_SCALES + name] = quantise(values)
            continue
        found[name] = values.to(_DTYPES[encoding])
        if encoding == "fp16" and bool((found[name].isinf() & values.isfinite()).any()):
            raise AdapterError(
                f"{name!r} holds {float(values.abs().max()):.4g}, beyond fp16's 65504; use bf16"
            )
    return found


def _decoded(payload: bytes, limits: Limits, layout: AdapterLayout, encoding: str) -> Adapter:
    """Return an adapter of ``layout`` from a payload's tensors."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, part, _, shape, _ in layout.slices:
        key = name + _SUFFIX[part]
        expected[key] = (_DTYPES[encoding], shape)
        if encoding == "int8":
            expected[_SCALES + key] = (torch.float32, (num_blocks(torch.Size(shape).numel()),))
    return _assembled(unpack(payload, limits, expected), layout, encoding)


def _assembled(tensors: Mapping[str, Tensor], layout: AdapterLayout, encoding: str) -> Adapter:
    """Put named wire tensors into the flat buffers of a layout."""
    pieces: dict[torch.dtype, list[Tensor]] = {}
    for name, part, dtype, _, _ in layout.slices:
        key = name + _SUFFIX[part]
        values = tensors[key]
        if encoding == "int8":
            values = dequantise(values, tensors[_SCALES + key])
        pieces.setdefault(dtype, []).append(values.to(dtype).reshape(-1))
    return Adapter(layout, {dtype: torch.cat(parts) for dtype, parts in pieces.items()})


def _plain(layout: AdapterLayout) -> AdapterLayout:
    """Return a layout with every tensor in fp32: differences of halves need more digits."""
    if set(layout.sizes) <= {torch.float32}:
        return layout
    return AdapterLayout(
        tuple(
            (name, LoraShape(s.in_dim, s.out_dim, s.rank, s.alpha, "float32", s.frozen))
            for name, s in layout.lora
        ),
        tuple((name, DenseShape(s.shape, "float32")) for name, s in layout.dense),
    )


def _in_layout(adapter: Adapter, layout: AdapterLayout) -> Adapter:
    if adapter.layout == layout:
        return Adapter(layout, adapter.buffers)
    return _assembled(_named(adapter), layout, "fp32")


def _claims(payload: bytes, limits: Limits) -> Claims:
    fields = check_fields(read_fields(payload, limits), "upload")
    return Claims(
        fields["run"],
        fields["task_id"],
        fields["base_version"],
        fields["num_examples"],
        fields["encoding"],
        fields["metrics"],
        len(payload),
    )
