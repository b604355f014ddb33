"""The commit record: what was written is read, and anything else is damage, said in words."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood import manifest as manifests
from lastgood.errors import DamagedError
from lastgood.manifest import Chunk, Manifest, RankRecord, ShardRecord, TensorRecord, checksum, compact, parse

DIGEST = checksum(b"x")


def example() -> Manifest:
    return Manifest(
        step=7,
        generation=2,
        attempt="abc",
        parent="step-00000006",
        time=1.5,
        world_size=2,
        metrics={"loss": 0.5, "bad": float("inf")},
        versions={"torch": "2"},
        program={"command": ["train.py", "ä"]},
        objects={"model": {"state": {"w": {"$": "tensor", "v": "model.w"}}}, "n": 3},
        kinds={"model": "module", "n": "value"},
        tensors={
            "model.w": TensorRecord(
                "F32",
                (4, 3),
                (
                    Chunk(0, 4096, 4120, DIGEST, (0, 0), (2, 3)),
                    Chunk(1, 4096, 4120, DIGEST, (2, 0), (2, 3)),
                ),
            ),
            "rank1/x": TensorRecord("U8", (5,), (Chunk(1, 4120, 4125, DIGEST, (0,), (5,)),)),
            "empty": TensorRecord("BF16", (0, 2), (Chunk(0, 4120, 4120, DIGEST, (0, 0), (0, 2)),)),
            "scalar": TensorRecord("F64", (), (Chunk(0, 4120, 4128, DIGEST, (), ()),)),
        },
        ranks={0: RankRecord({"r": 1}), 1: RankRecord(None, {"n": 4}, {"x": "rank1/x"})},
        shards=(ShardRecord("00000.safetensors", 4128, 4096, DIGEST), ShardRecord("00001.bin", 4125, 4096, DIGEST)),
        strides={"model.w": (1, 4)},
    )


def signed(body: Any) -> bytes:
    """A manifest with a right checksum, whatever it says."""
    text = (body if isinstance(body, str) else json.dumps(body)).encode()
    return b'{"lastgood":1,"checksum":"%s","manifest":%s}\n' % (checksum(text).encode(), text)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=3), inner, max_size=12),
    max_leaves=40,
)


@given(tree=_TREES, width=st.integers(1, 150))
def test_what_is_encoded_in_parts_is_what_is_encoded_at_once(tree: Any, width: int) -> None:
    wide = {"many": {f"k{index}": tree for index in range(width)}, "one": tree}
    assert compact(wide) == json.dumps(wide, separators=(",", ":"))


def test_what_was_written_is_read() -> None:
    assert parse(example().to_bytes(), "m") == example()
    assert json.loads(example().to_bytes())["lastgood"] == 1


NAMES = st.text(min_size=1, max_size=8)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    step=st.integers(0, 2**63 - 1),
    metrics=st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3),
    objects=st.dictionaries(NAMES, JSONS.filter(lambda j: '"$"' not in json.dumps(j)), max_size=3),
    program=st.dictionaries(NAMES, JSONS, max_size=2),
    names=st.lists(st.text(max_size=20), min_size=3, max_size=3, unique=True),
)
def test_any_content_is_read_as_it_was_written(
    step: int, metrics: dict[str, float], objects: Any, program: Any, names: list[str]
) -> None:
    first = example()
    tensors = dict(
        zip([*names, "rank1/x"], [*list(first.tensors.values())[::2], first.tensors["scalar"]], strict=False)
    )
    tensors = {names[0]: first.tensors["model.w"], names[1]: first.tensors["empty"], names[2]: first.tensors["scalar"]}
    tensors["rank1/x" if "rank1/x" not in tensors else "rank1/x+"] = first.tensors["rank1/x"]
    ranks = {0: RankRecord(None), 1: RankRecord(None, objects, {"x": list(tensors)[-1]})}
    written = dataclasses.replace(
        first,
        step=step,
        metrics=metrics,
        objects=objects,
        kinds=dict.fromkeys(objects, "value"),
        program=program,
        tensors=tensors,
        strides={names[0]: (1, 4)},
        ranks=ranks,
    )
    assert parse(written.to_bytes(), "m") == written


def test_every_truncation_and_every_flipped_bit_is_damage() -> None:
    data = example().to_bytes()
    for end in range(len(data)):
        with pytest.raises(DamagedError, match=r"^m "):
            parse(data[:end], "m")
    for at in range(len(data)):
        for bit in (0, 6):
            altered = bytearray(data)
            altered[at] ^= 1 << bit
            with pytest.raises(DamagedError, match=r"^m "):
                parse(bytes(altered), "m")


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), kind=st.sampled_from(["insert", "delete", "set", "append"]))
def test_any_altered_byte_is_damage(at: int, byte: int, kind: str) -> None:
    data = example().to_bytes()
    at %= len(data)
    altered = bytearray(data)
    if kind == "insert":
        altered.insert(at, byte)
    elif kind == "delete":
        del altered[at]
    elif kind == "append":
        altered.append(byte)
    else:
        altered[at] = byte
    if altered == data:
        return
    with pytest.raises(DamagedError):
        parse(bytes(altered), "m")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"{}", "cut off or was altered"),
        (b"\x80\x04.", "cut off or was altered"),
        (example().to_bytes().replace(b'"lastgood":1', b'"lastgood":2'), "version 2.*knows 1: update lastgood"),
        (example().to_bytes().replace(b'"lastgood":1', b'"lastgood":0'), "version 0.*was altered"),
        (example().to_bytes().replace(b"step", b"stop", 1), "checksum does not match"),
        (signed("[]"), "valid checksum but no valid content"),
        (signed("{}"), "valid checksum but no valid content"),
        (signed("[" * 200_000), "valid checksum but no valid content"),
        (signed('{"a":' * 50_000), "valid checksum but no valid content"),
        (signed("9" * 10_000), "valid checksum but no valid content"),
    ],
)
def test_damage_is_said_in_words(data: bytes, words: str) -> None:
    with pytest.raises(DamagedError, match=words):
        parse(data, "m")


def change(path: list[Any], value: Any) -> Callable[[Any], None]:
    def apply(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return apply


W = ["tensors", "model.w"]
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "shard in the parent": (change(["shards", 0, 0], "../x"), "not a plain file name"),
    "shard of the root": (change(["shards", 0, 0], "/etc/passwd"), "not a plain file name"),
    "shard of a drive": (change(["shards", 0, 0], "C:x"), "not a plain file name"),
    "shard in a directory": (change(["shards", 0, 0], "a/b"), "not a plain file name"),
    "shard with a backslash": (change(["shards", 0, 0], "a\\b"), "not a plain file name"),
    "shard with a zero": (change(["shards", 0, 0], "a\0"), "not a plain file name"),
    "shard of dots": (change(["shards", 0, 0], ".."), "not a plain file name"),
    "shard that ends a line": (change(["shards", 0, 0], "a\n"), "not a plain file name"),
    "shard that is a stream": (change(["shards", 0, 0], "a:b"), "not a plain file name"),
    "shard that is the manifest": (change(["shards", 0, 0], "Manifest.json"), "not a plain file name"),
    "shards of one name": (change(["shards", 1, 0], "00000.SAFETENSORS"), "two shards have the same name"),
    "parent outside": (change(["parent"], "../x"), "parent"),
    "negative size": (change(["shards", 0, 1], -1), "no size"),
    "size of the wrong kind": (change(["shards", 0, 1], 4128.0), "no size"),
    "size that is true": (change(["step"], True), "no size"),
    "negative begin": (change([*W, 2, 0, 1], -4), "no size"),
    "end before begin": (change([*W, 2, 0, 2], 4000), "does not fit its shape"),
    "begin in the header": (change([*W, 2, 0], [0, 4000, 4024, DIGEST, [0, 0], [2, 3]]), "overlap or leave a hole"),
    "overlapping bytes": (change(["tensors", "scalar", 2, 0], [0, 4112, 4120, DIGEST, [], []]), "overlap or leave"),
    "a hole at the end": (change(["shards", 0, 1], 5000), "end at byte 4128, the file at 5000"),
    "unknown shard": (change([*W, 2, 0, 0], 9), "wrong form"),
    "unknown type": (change([*W, 0], "F128"), "unknown type 'F128'"),
    "another type": (change([*W, 0], "F64"), "does not fit its shape"),
    "another shape": (change([*W, 1], [4, 4]), "do not fill it"),
    "fewer dimensions": (change([*W, 1], [12]), "wrong form"),
    "huge shape": (change([*W, 1], [2**62, 2**62]), "do not fill it"),
    "huge empty shape": (change(["tensors", "empty"], ["U8", [0, 2**80], []]), "no size"),
    "chunk outside": (change([*W, 2, 1, 4], [3, 0]), "outside its shape"),
    "chunks on each other": (change([*W, 2, 1, 4], [0, 0]), "overlap"),
    "shifted whole": (change(["tensors", "rank1/x", 2, 0, 4], [1]), "outside its shape"),
    "no chunks": (change(["tensors", "rank1/x", 2], []), "do not fill it"),
    "rank outside": (change(["ranks", "2"], {"random": None, "objects": {}, "local": {}}), "no rank 2 among 2"),
    "negative rank": (change(["ranks", "-1"], {"random": None, "objects": {}, "local": {}}), "no rank -1"),
    "local tensor that is not there": (change(["ranks", "1", "local", "x"], "y"), "'y', which is not in the check"),
    "value that names no tensor": (change(["objects", "n"], {"$": "tensor", "v": "gone"}), "'gone'"),
    "value too deep": (change(["objects", "n"], json.loads("[" * 400 + "]" * 400)), "deep"),
    "objects without kinds": (change(["kinds"], {}), "kind"),
    "no ranks": (change(["ranks"], {}), "rank 0"),
    "strides of nothing": (change(["strides", "gone"], [1]), "'gone' cannot have the strides"),
    "strides of fewer dimensions": (change(["strides", "model.w"], [1]), "cannot have the strides"),
    "strides with a hole": (change(["strides", "model.w"], [1, 5]), "cannot have the strides"),
    "strides that overlap": (change(["strides", "model.w"], [1, 1]), "cannot have the strides"),
    "expanded": (change(["strides", "model.w"], [0, 1]), "cannot have the strides"),
    "negative strides": (change(["strides", "model.w"], [-3, 1]), "no size"),
    "no world": (change(["world_size"], 0), "rank"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_manifest_with_a_right_checksum_and_hostile_content_is_damage(kind: str) -> None:
    edit, words = HOSTILE[kind]
    body = copy.deepcopy(json.loads(example().to_bytes())["manifest"])
    assert parse(signed(body), "m") == example()
    edit(body)
    with pytest.raises(DamagedError, match=words):
        parse(signed(body), "m")


def test_many_chunks_are_checked_fast_or_refused() -> None:
    count = 17_000
    chunks = [[0, 4096 + i, 4097 + i, DIGEST, [i, 0], [1, 1]] for i in range(count)]
    body = copy.deepcopy(json.loads(example().to_bytes())["manifest"])
    body["tensors"] = {"x": ["U8", [count, 1], chunks]}
    body["shards"], body["ranks"]["1"]["local"] = [["a", 4096 + count, 4096, DIGEST]], {}
    body["objects"], body["kinds"] = {}, {}
    with pytest.raises(DamagedError, match="17000 chunks"):
        parse(signed(body), "m")


def test_a_manifest_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from lastgood import catalog

    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_bytes(b"x" * 101)
    monkeypatch.setattr(catalog, "MAX_BYTES", 100)
    (entry,) = catalog.committed(tmp_path)
    with pytest.raises(DamagedError, match="101 bytes, more than the 100"):
        catalog.read_manifest(entry)
    assert manifests.MAX_BYTES >= 1 << 28
