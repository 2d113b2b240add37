import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.codes.pack import pack, packed_bytes, unpack


def bit_stream(codes, bits):
    """The definition, bit by bit, with numpy: LSB first, no gaps, zero padding."""
    stream = ((codes.numpy()[:, None] >> np.arange(bits)) & 1).reshape(-1)
    return np.packbits(stream.astype(np.uint8), bitorder="little")


@given(bits=st.integers(1, 8), numel=st.integers(0, 200), seed=st.integers(0, 99))
def test_packing_is_the_dense_bit_stream_and_unpacking_its_inverse(bits, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8, generator=generator)
    data = pack(codes, bits)
    assert np.array_equal(data.numpy(), bit_stream(codes, bits))
    assert data.numel() == packed_bytes(bits, (numel,)) == (numel * bits + 7) // 8
    assert torch.equal(unpack(data, bits, (numel,)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lengths_around_the_chunk_size(bits):
    for numel in ((1 << 20) - 1, 1 << 20, (1 << 20) + 9):
        codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, (numel,)), codes)


@given(widths=st.lists(st.integers(0, 8), max_size=12), columns=st.integers(1, 40))
def test_with_a_width_a_row_each_row_starts_on_a_byte(widths, columns):
    bits = torch.tensor(widths, dtype=torch.uint8)
    codes = torch.stack(
        [torch.randint(0, 2**w, (columns,), dtype=torch.uint8) for w in widths]
        or [torch.zeros(columns, dtype=torch.uint8)]
    )[: len(widths)]
    data = pack(codes, bits)
    alone = [bit_stream(row, w) for row, w in zip(codes, widths, strict=True) if w]
    assert np.array_equal(data.numpy(), np.concatenate([np.zeros(0, np.uint8), *alone]))
    assert torch.equal(unpack(data, bits, (len(widths), columns)), codes)
    assert data.numel() == packed_bytes(bits, (len(widths), columns))


def test_bytes_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"take 3 bytes; got 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, (8,))


def test_the_byte_order_is_that_of_compressed_tensors_for_4_and_8_bits():
    numeric = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = torch.randint(-8, 8, (3, 32), dtype=torch.int8)
    theirs = numeric.pack_to_int32(values, 4).view(torch.uint8).reshape(-1)
    ours = pack((values + 8).to(torch.uint8), 4)
    assert torch.equal(ours, theirs)
