"""Files made to do harm, with right digests: every kind is refused by name, in little time and memory."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import clipquant
from clipquant import quantize
from clipquant.artifact import (
    ArtifactError,
    load_quantized,
    read_artifact,
    read_metadata,
    read_outline,
    verify_artifact,
)
from clipquant.cli import main
from clipquant.report import render_page, report_of

sys.path.insert(0, str(Path(__file__).parent))
from made_up import ONE, seal, tabled, weight

NAN, INF = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))


class Lone(nn.Module):
    def __init__(self, shape=(2, 4)):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))


def plain(codes=bytes(4), shape=(2, 4), **about):
    return seal(*weight(codes, shape, **about))


def with_entries(**entries):
    parts, about = weight(bytes(4), (2, 4))
    return seal(parts, {**about, **entries})


def with_part(name, kind, shape, data):
    parts, about = weight(bytes(4), (2, 4))
    return seal({**parts, name: (kind, shape, data)}, about)


def with_report(**report):
    return with_entries(report=report)


def rows(bits, shape, codes=b"", **about):
    return seal(*weight(codes, shape, by_row=bits, **about))


def coded(stream, shape=(2, 4), **about):
    return seal(*weight(stream, shape, **{"coding": "range", **about}), version=3)


REFUSED = {
    "a function of torch": (plain(dtype="load"), "tensors.w.dtype must be one of"),
    "a dtype of another kind": (plain(dtype="int8"), "tensors.w.dtype must be one of"),
    "a shape without axes": (plain(shape=[]), "tensors.w.shape must be of 1 axes"),
    "a negative side": (plain(shape=[-2, -4]), "tensors.w.shape must be a whole number"),
    "a side of text": (plain(shape=["2", 4]), "tensors.w.shape must be a whole number"),
    "a side that is true": (plain(shape=[True, 8]), "tensors.w.shape must be a whole number"),
    "sides that overflow": (plain(shape=[2**40, 2**40]), "tensors.w.shape must be a shape"),
    "many axes": (plain(shape=[1] * 33 + [8]), "tensors.w.shape must be a shape"),
    "an empty weight of many rows": (plain(b"", [2**50, 0]), "tensors.w.shape must be of axes up to"),
    "bits of text": (plain(bits="4"), "tensors.w.bits must be a whole number from 1 to 8"),
    "bits that are no whole number": (plain(bits=4.0), "tensors.w.bits must be a whole number"),
    "no bits for all": (plain(b"", bits=0), "tensors.w.bits must be a whole number from 1 to 8"),
    "too many bits": (plain(bits=9), "tensors.w.bits must be a whole number from 1 to 8"),
    "bits of rows without rows": (plain(bits="rows"), "'rows' where, and only where"),
    "rows without bits of rows": (rows(b"\4\4", (2, 4), bytes(4)).replace(b"rows", b"ROWS"), "damaged"),
    "wide rows": (rows(b"\4\x09", (2, 4), bytes(8)), "w.bits must be from 0 to 8; got 9"),
    "too few codes": (plain(bytes(3)), "w.q must be 4 bytes"),
    "too few codes by rows": (rows(b"\4\4", (2, 4), bytes(3)), "w.q must be of 4 bytes; got 3"),
    "levels beyond the bits": (plain(levels=16), "tensors.w.levels must be a whole number from 1 to 15"),
    "levels of no end": (plain(levels=10**12), "tensors.w.levels must be a whole number"),
    "levels by rows": (rows(b"\4\4", (2, 4), bytes(4), levels=3), "tensors.w.levels must be left out"),
    "codes beyond the levels": (plain(b"\xff" * 4, levels=8), "w.q must hold codes from 0 to 8; got 15"),
    "a group of none": (plain(granularity=0), "tensors.w.granularity must be a whole number"),
    "a group beyond the columns": (plain(granularity=10**9), "tensors.w.granularity must be"),
    "a granularity of another kind": (plain(granularity="row"), "tensors.w.granularity must be"),
    "a coding in an older format": (plain(coding="range"), "tensors.w.coding must be left out"),
    "a coding unknown": (coded(bytes(5), coding="zip"), "tensors.w.coding must be left out, or in files of"),
    "a coding that is true": (coded(bytes(5), coding=True), "tensors.w.coding must be left out"),
    "a stream without a head": (coded(bytes(4)), "w.q must be a stream of .* its head is none"),
    "a stream of no bytes": (coded(b""), "w.q must be a stream of .* its head is none"),
    "a stream of an unknown kind": (coded(bytes(4) + b"\4"), "w.q must be a stream of .* its head is none"),
    "a stream of half a word": (coded(bytes(7)), "w.q must be a stream of .* its head is none"),
    "a stream of noise": (coded(bytes(5) + b"\x5a\xc3\x11\x99" * 9), "w.q must be a stream of .* behind its last code"),
    "a stream of other codes": (coded(bytes(9)), "w.q must be a stream of .* differ from their checksum"),
    "a stream of rows": (coded(bytes(9), by_row=b"\4\4"), "w.q must be a stream of .* their checksum"),
    "an axis of no weight": (plain(axis=2), "tensors.w.axis must be a whole number from -2 to 1"),
    "a stack of no matrices": (plain(axis=-1), "tensors.w.shape must be of 3 axes or more"),
    "a stack of empty matrices": (plain(shape=[2, 0, 4], axis=-1), "tensors.w.shape must be of axes of 1 or more"),
    "a stack in groups": (plain(shape=[2, 2, 2], axis=-2, groups=2), "tensors.w.groups must be"),
    "groups that do not divide": (plain(shape=[2, 4], axis=1, groups=3), "tensors.w.groups must be"),
    "groups of none": (plain(axis=1, groups=0), "tensors.w.groups must be"),
    "a method of no text": (plain(method=["rtn"]), "tensors.w.method must be text"),
    "symmetric with a zero": (plain(symmetric=True), "tensors.w.symmetric must be"),
    "scales that are NaN": (plain(scale=NAN), "w.scale must be finite"),
    "zeros that are infinite": (plain(zero=INF), "w.zero must be finite"),
    "scales of another shape": (plain(scales=(4, 1), scale=ONE * 4, zero=ONE * 4), "w.scale.shape must be"),
    "scales of whole numbers": (with_part("w.scale", "I32", [1, 1], ONE), "w.scale.dtype must be"),
    "no codes": (seal({"w.scale": ("F32", [1, 1], ONE)}, weight(b"", (2, 4))[1]), "w.q must stand in the file"),
    "codes of two axes": (with_part("w.q", "U8", [2, 2], bytes(4)), "w.q.shape must be of one axis"),
    "codes of floats": (with_part("w.q", "F32", [1], bytes(4)), "w.q.dtype must be"),
    "a dtype unknown": (with_part("x", "F8_E8M0", [1], b"\0"), "x.dtype must be one of"),
    "a shape longer than its bytes": (with_part("x", "F32", [3], bytes(8)), "x.data_offsets must be as long"),
    "two weights of one name": (with_part("w", "F32", [1], bytes(4)), "tensors.w must have a name of its own"),
    "weights in a list": (with_entries(tensors=[]), "tensors must be an object"),
    "a weight that is none": (with_entries(tensors={"w": 3}), "tensors.w must be an object"),
    "an alias of nothing": (with_entries(aliases={"a": "b"}), "aliases.a must be the key of a tensor"),
    "aliases in a cycle": (with_entries(aliases={"a": "b", "b": "a"}), "aliases.a must be the key"),
    "an alias of itself": (with_entries(aliases={"w": "w"}), "aliases.w must not be a key of its own"),
    "an alias of a part": (with_entries(aliases={"a": "w.q"}), "aliases.a must be the key of a tensor"),
    "aliases in a list": (with_entries(aliases=[1]), "aliases must be an object"),
    "left of numbers": (with_entries(left=[1]), "left must be a list of 3"),
    "left of negative bytes": (with_entries(left=[["a", -1, "b"]]), "left must be a whole number"),
    "versions of numbers": (with_entries(versions={"torch": 2}), "versions.torch must be text"),
    "no format": (with_entries(format_version=None), "format_version is None"),
    "a format that is true": (with_entries(format_version=True), "format_version is True"),
    "a report in a list": (with_entries(report=[]), "report must be an object"),
    "metrics of no pair": (with_report(metrics=1), "report.metrics must be a list of 2"),
    "a metric of text": (with_report(metrics=[{"a": "1"}, {}]), r"report.metrics\[0\].a must be a finite"),
    "a mode unknown": (with_report(mode="up"), "report.mode must be 'min' or 'max'"),
    "a layer of no list": (with_report(layers={"w": 3}), "report.layers.w must be a list"),
    "a layer of four": (with_report(layers={"w": [1, 2, "", 3]}), "report.layers.w must be a list of 3 or 6"),
    "a histogram upside down": (with_report(layers={"w": [1, 2, "", 3, 2, "0"]}), "from its smallest"),
    "a histogram of no digits": (with_report(layers={"w": [1, 2, "", 1, 2, "-"]}), "digits from 0 to 63"),
    "a trial of two": (with_report(budget={"trials": [[1, 2]]}), r"report.budget.trials\[0\] must be a list of 4"),
    "a monitor of lone surrogates": (with_report(monitor="\ud800"), "report.monitor must be text without lone"),
    "a name of lone surrogates": (with_entries(left=[["\ud800", 1, "b"]]), "left must be text without lone"),
    "a name without end": (with_entries(aliases={"a" * 5000: "w"}), "a name in aliases must be text"),
    "a note without end": (with_report(calibration="a" * 5000), "report.calibration must be text of at most"),
    "JSON nested deeply": (
        seal(*weight(bytes(4), (2, 4)), ',"deep":' + "[" * 100_000 + "]" * 100_000), "nested deeper than 64"
    ),
    "objects nested deeply": (
        seal(*weight(bytes(4), (2, 4)), ',"deep":' + '{"[":' * 99 + "0" + "}" * 99), "nested deeper than 64"
    ),
    "an entry twice": (seal(*weight(bytes(4), (2, 4)), ',"left":[],"left":[]'), "names an entry twice"),
    "a number of many digits": (seal(*weight(bytes(4), (2, 4)), ',"n":' + "9" * 10_000), "at most 20 digits"),
    "a number that is none": (seal(*weight(bytes(4), (2, 4)), ',"n":NaN'), "finite numbers; got 'NaN'"),
    "a table that is none": (tabled(b"[]"), "its table must be an object"),
    "a table without entries": (tabled(b"{}"), "entries must be a list"),
    "a table that names one twice": (
        tabled(json.dumps({"entries": [["a", "U8", [1]]] * 2}).encode(), b"ab"), "stands there twice"
    ),
    "a table of fewer bytes": (
        tabled(json.dumps({"entries": [["a", "U8", [1]]]}).encode(), b"ab"), "the tensors must fill 2 bytes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_by_name_everywhere(kind, tmp_path, capsys):
    data, said = REFUSED[kind]
    path = tmp_path / "made_up.safetensors"
    path.write_bytes(data)
    calls = [
        lambda: load_quantized(path),
        lambda: load_quantized(path, Lone()),
        lambda: load_quantized(path, Lone(), packed=True),
        lambda: read_artifact(path),
        lambda: read_outline(path),
    ]
    for call in calls[:1]:
        with pytest.raises(ArtifactError, match=said):
            call()
    for call in calls[1:]:
        with pytest.raises(ArtifactError):
            call()
    damage = verify_artifact(path)
    assert damage
    for command in (["inspect", path], ["report", path], ["compare", path, path], ["verify", path]):
        assert main(list(map(str, command))) == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 3
    assert len(shown.out.splitlines()) == 1


def test_a_file_that_says_nothing_wrong_loads(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(plain(b"\x10\x32\x54\x76"))
    assert torch.equal(load_quantized(path)["w"], torch.arange(8.0).reshape(2, 4) - 1)
    assert load_quantized(path, Lone()).w[1, 3] == 6
    assert "made" not in str(verify_artifact(path))
    held = read_outline(path)
    assert "</html>" in render_page(report_of(held.weights, held.metadata, 100))


def test_names_that_hold_brackets_and_quotes_are_no_depth(tmp_path):
    path = tmp_path / "a"
    name = '[{"' * 90 + "\\"
    parts, about = weight(bytes(4), (2, 4))
    path.write_bytes(seal({**parts, name: ("F32", [1], ONE)}, about))
    assert load_quantized(path)[name] == 1


class TestRowsOfNoBits:
    """They cost a file nothing: only a model that has them, or a word of the caller's, makes them large."""

    def test_small_ones_load_without_a_model(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(rows(b"\0\4", (2, 4), bytes(2)))
        assert load_quantized(path)["w"].shape == (2, 4)

    def test_large_ones_need_the_model_or_a_limit(self, tmp_path):
        path, shape = tmp_path / "a", (2, 5_000_000)
        path.write_bytes(rows(b"\0\0", shape))
        for read in (load_quantized, read_artifact):
            with pytest.raises(
                ArtifactError, match=r"rows of 0 bits .* 50,000,000 bytes .* max_constant_bytes"
            ):
                read(path)
        assert load_quantized(path, max_constant_bytes=50_000_000)["w"].shape == shape
        assert load_quantized(path, Lone(shape)).w[1, -1] == -1
        assert read_outline(path).weights.tensors["w"].numel == 10_000_000
        assert verify_artifact(path) == []

    def test_streams_of_next_to_nothing_need_them_too(self, tmp_path, monkeypatch):
        """Beyond 8 codes a byte a stream is paid for by nothing."""
        monkeypatch.setattr("clipquant.artifact.weights.ROOM", 400_000)
        layer, path = nn.Linear(200, 200, bias=False), tmp_path / "a"
        layer.weight.data.zero_()[0, 0] = 1
        quantize(layer, 2, method="rtn", progress=False).save(path, coding="entropy")
        with pytest.raises(
            ArtifactError, match=r"codes of far less than a bit .* max_constant_bytes"
        ):
            load_quantized(path)
        assert load_quantized(path, max_constant_bytes=200_000)["weight"].sum() == 1
        assert load_quantized(path, nn.Linear(200, 200, bias=False)).weight.sum() == 1
        assert read_outline(path).weights.tensors["weight"].numel == 40_000
        assert verify_artifact(path) == []

    def test_another_model_does_not_make_them(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(rows(b"\0\0", (2, 150_000_000)))
        with pytest.raises(
            ArtifactError, match=r"w is \(2, 150000000\) in the file, \(2, 4\) in the model"
        ):
            load_quantized(path, Lone())


BOMBS = {
    "rows of no bits": rows(b"\0\0", (2, 150_000_000)),
    "bits that are none": plain(b"", (2, 150_000_000), bits=0),
    "a square of none": plain(b"", (10**6, 10**6), bits=0),
    "rows without columns": plain(b"", (2**40, 0)),
    "a float without elements": with_part("x", "F32", [2**40, 0], b""),
    "a group beyond all": plain(granularity=10**10),
    "a table that inflates": tabled(b"[" + b"0," * (60 << 20) + b"0]"),
    "a table of lists": tabled(b'{"entries":[' + b"[]," * (4 << 20) + b"[]]}"),
    "lists without end": seal(*weight(bytes(4), (2, 4)), ',"x":[' + "[]," * (3 << 20) + "[]]"),
    "quotes without end": seal(*weight(bytes(4), (2, 4)), ',"x":[' + '"",' * (2 << 20) + '""]'),
    "objects without end": seal(
        *weight(bytes(4), (2, 4)), ',"x":[' + '{"a":0},' * (1 << 20) + "0]"
    ),
    "a header said to be long": struct.pack("<Q", 2**62) + bytes(100),
    "a stream of next to nothing": coded(bytes(5), (150, 10**6)),
    "streams that the room just holds": coded(bytes(5), (1290, 1290)),
    "a stream by rows of no bits": coded(bytes(5), (2, 150_000_000), by_row=b"\0\0"),
    "one code a row": coded(bytes(5) + bytes(4 << 10), (1 << 20, 6), granularity="tensor"),
    "one bit a row": plain(b"\1" * (1 << 17), (1 << 20, 1), bits=1, levels=1, granularity="tensor"),
}
MEASURE = """
import json, resource, sys, time
from clipquant import load_quantized
from clipquant.artifact import read_metadata, read_outline, verify_artifact
from clipquant.report import render_page, report_of
def report(path):
    held = read_outline(path)
    render_page(report_of(held.weights, held.metadata, 1000))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in [sys.argv[1], *sys.argv[1:]]:  # the first takes the memory of what is used at first
    for call in (load_quantized, verify_artifact, read_metadata, report):
        before, start = peak(), time.perf_counter()
        try: call(path)
        except ValueError: pass
        print(json.dumps([path, call.__name__, peak() - before, time.perf_counter() - start]))
"""


def test_memory_and_time_are_in_proportion_to_the_file(tmp_path):
    first = tmp_path / "first"
    first.write_bytes(plain())
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    paths = [first, *(tmp_path / name for name in BOMBS)]
    source = str(Path(clipquant.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{MEASURE}", *map(str, paths)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()][4:]
    assert len(lines) == 4 * len(paths)
    for path, call, megabytes, seconds in lines:
        size = Path(path).stat().st_size / 1e6
        assert megabytes < 64 + 2 * size, (path, call)
        assert seconds < 1 + 2 * size, (path, call)


def test_metadata_is_read_from_a_table_without_the_tensors(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(
        tabled(json.dumps({"entries": [["a", "U8", [2]]], "left": []}).encode(), b"ab")
    )
    assert read_metadata(path)["entries"] == [["a", "U8", [2]]]
