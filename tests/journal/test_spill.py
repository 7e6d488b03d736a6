"""Uploads on disk are the uploads themselves."""

import sys

import pytest
import torch

from alignfed.core.adapter import Adapter, AdapterLayout
from alignfed.errors import JournalError
from alignfed.journal.spill import spilled
from tests.core.adapters import make_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_spilled_adapter_has_the_same_bits_and_its_file_no_name(tmp_path, dtype):
    adapter = make_adapter(1, dtype=dtype)
    found = spilled(adapter, tmp_path / "buffer")
    assert found.checksum == adapter.checksum
    assert found.layout is adapter.layout
    assert list((tmp_path / "buffer").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_spilled_adapter_lies_in_a_mapped_file(tmp_path):
    found = spilled(make_adapter(1), tmp_path)
    with open("/proc/self/maps", encoding="ascii") as maps:
        mapped = [line for line in maps if str(tmp_path) in line]
    assert len(mapped) == len(found.buffers)
    del found
    with open("/proc/self/maps", encoding="ascii") as maps:
        assert not any(str(tmp_path) in line for line in maps)


def test_an_empty_adapter_can_be_spilled(tmp_path):
    empty = Adapter(AdapterLayout((), ()), {})
    assert spilled(empty, tmp_path).checksum == empty.checksum


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file"):
        spilled(make_adapter(1), tmp_path / "file" / "buffer")
