"""Codes to an entropy-coded stream and back: exact, near the entropy, and never anything else than its own error."""

import math
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipquant.errors import MissingPackageError
from clipquant.quant.codes import entropy
from clipquant.quant.codes.adaptive import CLASSES, Frequencies, Surroundings
from clipquant.quant.codes.entropy import HEAD, StreamError, decode, encode
from clipquant.quant.codes.grid import Grid, row_levels
from clipquant.quant.codes.lines import Lines

pytest.importorskip("constriction")

SPREADS = (
    0.0,
    0.02,
    0.3,
    1.0,
    100.0,
)  # standard deviation of the codes, in the alphabet's half width


def matrix_of(rows, columns, bits, spread, seed):
    """Return codes (rows, columns) with a grid; `bits` a number or a list of each row's own."""
    random = torch.Generator().manual_seed(seed)
    widths = torch.tensor(bits, dtype=torch.uint8).expand(rows)
    top = row_levels(widths).double()
    values = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    codes = ((values * spread + 1) * top / 2).round().clamp(min=0).minimum(top).to(torch.uint8)
    levels = 2**bits - 1 if isinstance(bits, int) else row_levels(widths)
    zero = (top / 2 * torch.rand(rows, 1, generator=random)).half()
    return codes, Grid(torch.ones(rows, 1).half(), zero, levels, max(columns, 1)), widths


def adaptive_bits(codes, alphabet):
    """Return what Krichevsky and Trofimov's adaptive code takes, which learns after every single code."""
    counts = np.bincount(codes.reshape(-1).numpy(), minlength=alphabet)
    grown = sum(math.lgamma(count + 0.5) - math.lgamma(0.5) for count in counts)
    whole = math.lgamma(counts.sum() + alphabet / 2) - math.lgamma(alphabet / 2)
    return (whole - grown) / math.log(2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 90), st.integers(1, 8), st.sampled_from(SPREADS), st.integers(0, 99)
)  # fmt: skip
def test_codes_of_one_width_there_and_back(rows, columns, bits, spread, seed):
    codes, grid, _ = matrix_of(rows, columns, bits, spread, seed)
    stream = encode(codes, grid, bits)
    assert torch.equal(decode(stream, grid, bits, (rows, columns)), codes)
    assert 8 * len(stream) <= 1.01 * adaptive_bits(codes, 2**bits) + 8 * 64


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 90), st.sampled_from(SPREADS),
    st.integers(0, 99),
)  # fmt: skip
def test_rows_of_their_own_widths_there_and_back(bits, columns, spread, seed):
    codes, grid, widths = matrix_of(len(bits), columns, bits, spread, seed)
    stream = encode(codes, grid, widths)
    assert torch.equal(decode(stream, grid, widths, tuple(codes.shape)), codes)
    least = sum(adaptive_bits(codes[widths == w], 2**w) for w in set(bits) if w)
    assert 8 * len(stream) <= 1.01 * least + 8 * 64 * max(len(set(bits)), 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (70, 70), (3, 2049), (2049, 3)])
def test_every_form_there_and_back(shape, symmetric):
    codes, grid, _ = matrix_of(*shape, 4, 0.2, 0)
    if symmetric:
        grid = Grid(grid.scale, None, 15, grid.group_size)
    assert torch.equal(decode(encode(codes, grid, 4), grid, 4, shape), codes)


def test_a_grid_that_all_rows_share_and_more_rows_than_are_coded_together(monkeypatch):
    monkeypatch.setattr(entropy, "_ROWS", 100)
    codes, grid, _ = matrix_of(350, 30, 3, 0.2, 0)
    shared = Grid(grid.scale[:1], grid.zero[:1], 7, 30)
    assert torch.equal(decode(encode(codes, shared, 3), shared, 3, (350, 30)), codes)


@pytest.mark.parametrize("bits", [2, 8])
def test_constant_codes_cost_next_to_nothing(bits):
    codes, grid, _ = matrix_of(200, 500, bits, 0.0, 0)
    assert len(encode(codes, grid, bits)) < 64 + 100_000 // 250
    nothing = torch.zeros(5, 10, dtype=torch.uint8)
    widths = torch.zeros(5, dtype=torch.uint8)
    grid = Grid(torch.ones(5, 1), torch.zeros(5, 1), row_levels(widths), 10)
    stream = encode(nothing, grid, widths)
    assert len(stream) == HEAD
    assert torch.equal(decode(stream, grid, widths, (5, 10)), nothing)


def test_rows_and_columns_of_unlike_spread_take_less_than_their_entropy_together():
    random = torch.Generator().manual_seed(0)
    many = (
        torch.rand(64, 1, generator=random)
        * torch.rand(1, 400, generator=random).sort().values
        * 0.5
    )
    codes = 1 + (torch.rand(64, 400, generator=random) < many).to(torch.uint8)
    grid = Grid(torch.ones(64, 1), None, 2, 400)
    share = np.bincount(codes.reshape(-1).numpy()) / codes.numel()
    fixed = -sum(p * math.log2(p) for p in share if p) * codes.numel() / 8
    assert len(encode(codes, grid, 2)) < 0.93 * fixed


def test_the_bytes_are_the_same_on_every_machine():
    rows, columns = torch.arange(60)[:, None], torch.arange(100)[None]
    zero = rows % 5 + 1
    far = (rows * 7919 + columns * 104_729 + 31 * rows * columns) % 97 < (rows + columns) // 3
    codes, grid = (far + zero).to(torch.uint8), Grid(torch.ones(60, 1), zero.float(), 7, 100)
    found = [zlib.crc32(entropy._encoded(codes.numpy(), grid, 3, way)) for way in range(4)]
    assert found == GOLDEN


GOLDEN = [
    3475282889,
    2202437563,
    630713816,
    131594458,
]  # of constriction 0.5.0: another one must give the same


class TestFaults:
    """Bytes that no codes gave: refused, in no more time than good ones take."""

    CODES, GRID, _ = matrix_of(20, 60, 4, 0.3, 0)

    def refused(self, raw, bits=4, shape=(20, 60)):
        with pytest.raises(StreamError):
            decode(torch.frombuffer(bytearray(raw), dtype=torch.uint8), self.GRID, bits, shape)

    def stream(self):
        return encode(self.CODES, self.GRID, 4).numpy().tobytes()

    def test_a_head_that_is_none(self):
        for raw in (
            b"\0",
            bytes(4),
            bytes(6),
            self.stream() + b"\0",
            bytes(4) + b"\x04",
            self.stream()[:-2],
        ):
            self.refused(raw)

    def test_every_byte_changed(self):
        raw = self.stream()
        for place in range(0, len(raw), 3):
            self.refused(raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :])

    def test_words_cut_off_or_too_many_or_none_of_a_stream(self):
        raw = self.stream()
        self.refused(raw[:-8])
        self.refused(raw[:HEAD])
        self.refused(raw + bytes(12))
        for seed in range(40):
            words = np.random.default_rng(seed).bytes(4 * (seed + 1))
            self.refused(raw[:4] + bytes([seed % 3]) + words)
            self.refused(raw[:5] + b"\xff" * 4 * (seed + 1))

    def test_another_shape(self):
        for columns in (0, 1, 59, 61):
            self.refused(self.stream(), shape=(20, columns))

    def test_without_the_library_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "constriction", None)
        with pytest.raises(MissingPackageError, match=r"constriction.*clipquant\[entropy\]"):
            encode(self.CODES, self.GRID, 4)


def test_frequencies_are_whole_small_and_follow_what_was_seen():
    frequencies = Frequencies(2, 4)
    for _ in range(300):
        frequencies.add_(np.full(1000, 2, np.int32), np.ones(1000, np.uint8))
        frequencies.follow_()
    for index in range(2):
        own = frequencies.of(index)
        assert own.dtype == np.int64
        assert own.min() >= 1
        assert own.sum() < 2**23
        assert own.argmax() == 2, "a class of which nothing is known is like all together"


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_lines_join_to_the_matrix(rows, columns):
    lines = Lines(rows, columns)
    matrix = np.random.default_rng(0).integers(0, 255, (rows, columns), dtype=np.uint8)
    held = lines.split(matrix)
    assert np.array_equal(lines.join(held), matrix)
    assert sum(lines.width(line) for line in range(lines.count)) == columns
    assert all(0 < lines.width(line) <= lines.across for line in range(lines.count))
    for line in range(lines.count):
        assert np.array_equal(held[line, :, : lines.width(line)], matrix[:, line :: lines.count])


def test_classes_tell_rows_and_columns_far_from_zero():
    lines = Lines(1024, 3)
    around = Surroundings(lines, np.full((1024, 1), 4, np.int64))
    codes = np.full((1024, 1), 2, np.uint8)
    codes[:10] = 7
    assert len(np.unique(around.classes(0))) == 1
    around.add_(0, codes)
    classes = around.classes(1)
    assert classes[:10].min() > classes[10:].max()
    assert classes.max() < CLASSES
