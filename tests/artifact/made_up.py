"""Files with right digests that say what a test wants them to say."""

import hashlib
import json
import struct
import zlib

ONE = struct.pack("<f", 1.0)


def seal(tensors, about, tail="", version=1):
    """Return a file of (dtype, shape, bytes) by name; `tail` is put at the end of its metadata."""
    blob, header = b"", {}
    for name, (kind, shape, data) in tensors.items():
        place = [len(blob), len(blob) + len(data)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": place}
        blob += data
    said = {
        "format_version": version, "aliases": {}, "left": [], "versions": {}, "tensors": {}, **about,
        "sha256": "0" * 64,
    }  # fmt: skip
    return sealed(header, json.dumps(said)[:-1] + tail + "}", blob)


def sealed(header, text, blob):
    head = json.dumps({"__metadata__": {"clipquant": text}, **header}).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    digest = hashlib.sha256(head + blob).hexdigest().encode()
    return head.replace(b"0" * 64, digest, 1) + blob


def weight(codes, shape, *, scale=ONE, zero=ONE, scales=(1, 1), by_row=None, **about):
    """Return the parts and the record of one weight "w"."""
    parts = {
        "w.q": ("U8", [len(codes)], codes),
        "w.scale": ("F32", list(scales), scale),
        "w.zero": ("F32", list(scales), zero),
    }
    if by_row is not None:
        parts["w.bits"] = ("U8", [len(by_row)], by_row)
    record = {
        "bits": "rows" if by_row is not None else 4, "levels": None if by_row is not None else 15, "symmetric": False,
        "granularity": "channel", "axis": 0, "groups": 1, "shape": list(shape), "dtype": "float32",
        "method": "rtn",
    }  # fmt: skip
    return parts, {"tensors": {"w": {**record, **about}}}


def tabled(raw, data=b"", version=2):
    """Return a file with a table that inflates to `raw`."""
    table = zlib.compress(raw, 9)
    header, end = {}, 0
    for name, size in (("data", len(data)), ("digests", 0), ("table", len(table))):
        place = [end, end + size]
        header[f"clipquant.{name}"] = {"dtype": "U8", "shape": [size], "data_offsets": place}
        end += size
    said = json.dumps({"format_version": version, "sha256": "0" * 64})
    return sealed(header, said, data + table)
