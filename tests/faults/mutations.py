"""Hostile versions of a file: seeded, so that a number names the same one always."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from lastgood.manifest import checksum

HUGE = [0, 1, -1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 4096]
NAMES = [
    "..",
    "../..",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "C:\\x",
    "\0",
    "",
    ".",
    "x" * 5000,
    "\ud800",
]
_VALUES: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    dict,
    list,
    lambda: "",
    lambda: 0.5,
    lambda: 1e308,
    lambda: {"$": "tensor", "v": "model.0.weight"},
    lambda: {"$": "tuple", "v": 5},
    lambda: {"$": "float", "v": "inf"},
    lambda: {"$": "bytes", "v": "!"},
    lambda: {"$": {"$": []}},
    lambda: [[]] * 1000,
]


def scramble(data: bytes, draw: random.Random) -> bytes:
    """Some bytes differ: flipped, cut off, moved, doubled, zeroed, or made huge."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(len(out) + 1)
        length = draw.choice([1, 2, 4, 8, 64, 512, draw.randrange(1, len(out) + 2)])
        part = bytes(out[at : at + length])
        kind = draw.randrange(10)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = part * min(draw.choice([1, 2, 50]), 1 + (4 << 20) // len(part or b"x"))
        elif kind == 3:
            other = draw.randrange(len(out) + 1)
            there = bytes(out[other : other + len(part)])
            out[at : at + len(there)], out[other : other + len(part)] = there, part[: len(there)]
        elif kind == 4:
            out[at : at + length] = bytes(len(part))
        elif kind == 5:
            out[at : at + length] = b"\xff" * len(part)
        elif kind == 6:
            out[at : at + length] = draw.randbytes(len(part))
        elif kind == 7:
            size = draw.choice([2, 4, 8])
            number = draw.choice(HUGE) % (1 << 8 * size)
            out[at : at + size] = number.to_bytes(size, draw.choice(["little", "big"]))
        elif kind == 8 and (digits := list(re.finditer(rb"\d+", bytes(out[:100_000])))):
            match = draw.choice(digits)
            out[match.start() : match.end()] = str(draw.choice(HUGE)).encode()
        elif at < len(out):
            out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        _places(value, found)
    return found


def hostile_json(text: bytes, draw: random.Random) -> bytes:
    """Valid JSON of nearly the same form, with something in it that has no business there."""
    tree = json.loads(text)
    for _ in range(draw.choice([1, 1, 2, 4])):
        places = _places(tree, [])
        if not places:
            break
        holder, key = draw.choice(places)
        kind = draw.randrange(7)
        if kind == 0:
            holder[key] = draw.choice(HUGE)
        elif kind == 1:
            holder[key] = draw.choice(NAMES)
        elif kind == 2:
            other, name = draw.choice(places)
            if _depth(other[name]) < 50:  # Copied, so that it cannot hold itself.
                holder[key] = json.loads(json.dumps(other[name]))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[draw.choice(NAMES)] = holder.pop(key)
        elif kind == 5 and isinstance(holder[key], int | str):
            holder[key] = holder[key] * draw.choice([2, 1000, -1])
        else:
            holder[key] = draw.choice(_VALUES)()
    out = json.dumps(tree, separators=(",", ":")).encode()
    kind = draw.randrange(20)
    if kind == 0:  # One value becomes a pit.
        pit = draw.choice([b"[", b'{"a":']) * draw.choice([900, 5000, 200_000])
        return re.sub(rb":\d+", lambda _: b":" + pit, out, count=1)
    if kind == 1:  # A key twice.
        return out.replace(b"{", b'{"step":1,"step":2,', 1)
    if kind == 2:
        return re.sub(rb"\d+", lambda _: b"9" * draw.choice([400, 5000, 100_000]), out, count=1)
    if kind == 3:
        return out.replace(b'"', draw.choice([b"NaN", b"Infinity", b"\\ud800", b"\xff"]) + b'"', 1)
    return out


def _depth(tree: Any) -> int:
    level, depth = [tree], 0
    while level and depth < 100:
        level = [v for t in level for v in (t.values() if isinstance(t, dict) else t if isinstance(t, list) else ())]
        depth += 1
    return depth


def hostile_manifest(data: bytes, draw: random.Random) -> bytes:
    """A manifest whose checksum is right."""
    start = data.index(b'"manifest":') + len(b'"manifest":')
    body = hostile_json(data[start:-2], draw)
    return b'{"lastgood":1,"checksum":"%s","manifest":%s}\n' % (checksum(body).encode(), body)


def hostile_safetensors(data: bytes, draw: random.Random) -> bytes:
    """A header whose length is right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = hostile_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


_OPERATIONS = [bytes([code]) for code in range(256)] + [
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"csubprocess\nPopen\n",
    b"ctorch\nload\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"X\x08\x00\x00\x00touch xx",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"(X\x02\x00\x00\x00ids\x85R",
    b"\x8a\x08" + b"\xff" * 8,
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"\x8e" + b"\xff" * 8,
    b"]q\x00h\x00a",
    b"(" * 10_000,
    b"\x85" * 10_000,
]


def hostile_pickle(data: bytes, draw: random.Random) -> bytes:
    """A pickle with instructions put in, left out or altered, and numbers made huge."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 2, 5, 20])):
        at = draw.randrange(len(out))
        kind = draw.randrange(4)
        if kind == 0:
            out[at:at] = draw.choice(_OPERATIONS)
        elif kind == 1:
            del out[at : at + draw.randrange(1, 12)]
        elif kind == 2:
            numbers = [match.start() for match in re.finditer(rb"[KMJ]", bytes(out))] or [0]
            at = draw.choice(numbers)
            out[at : at + 2] = b"\x8a\x08" + (draw.choice(HUGE) % (1 << 64)).to_bytes(8, "little")
        else:
            out[at] = draw.randrange(256)
        if not out:
            break
    return bytes(out)


def hostile_zip(data: bytes, draw: random.Random) -> bytes:
    """A zip with right checksums, in whose parts or names something is wrong."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(draw.choice([1, 1, 2])):
        at = draw.randrange(len(members))
        name, content = members[at]
        kind = draw.randrange(8)
        if kind == 0:
            members[at] = (name.split("/")[0] + "/" + (draw.choice(NAMES).replace("\ud800", "x") or "x"), content)
        elif kind == 1:
            members.append((name, content[: len(content) // 2]))
        elif kind == 2:
            del members[at]
            if not members:
                return data[:100]
        elif kind == 3:
            members[at] = (name, scramble(content, draw))
        elif kind == 4:
            members[at] = (name, bytes(draw.choice([10, 4096, 8 << 20])))
        else:
            pickles = [i for i, (title, _) in enumerate(members) if title.endswith(".pkl")]
            if pickles:
                title, content = members[pickles[0]]
                members[pickles[0]] = (title, hostile_pickle(content, draw))
    out = io.BytesIO()
    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            if name in archive.NameToInfo:
                info.filename = info.orig_filename = name  # Python warns of the second one, and writes it.
            archive.writestr(info, content)
    return scramble(out.getvalue(), draw) if draw.random() < 0.1 else out.getvalue()
