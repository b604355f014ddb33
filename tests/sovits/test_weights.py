"""Upstream's files are read value for value and safely; what is written is what upstream takes it for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save

from lastgood.errors import DamagedError, LastGoodError, RefusedError
from lastgood_sovits.cli.weights import weights as command
from lastgood_sovits.convert import convert
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.resume import (
    newest_checkpoint,
    newest_pair,
    read_pair,
    resume_names,
    write_checkpoint,
    write_resume,
)
from lastgood_sovits.weights import Weights, read_weights
from lastgood_sovits.weights_format import (
    PRETRAINED,
    V1_BELOW,
    Mark,
    content_mark,
    discriminators,
    header_for,
    s1_name,
    s2_name,
    upstream_mark,
)
from lastgood_sovits.weights_write import half, save_torch, write_s1_weights, write_s2_weights

GOLDEN = Path(__file__).parent / "golden"
CONTENTS: dict[str, Any] = json.loads((GOLDEN / "weights/contents.json").read_text())
SOUND = [name for name in CONTENTS if not name.startswith("hostile")]


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    with path.open("wb") as file:
        write(file)


def keys(name: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads((GOLDEN / f"keys/{name}.json").read_text())["keys"]
    return found


def zeros(name: str) -> dict[str, torch.Tensor]:
    """A state dict of the default size that takes no memory until it is written."""
    return {key: torch.zeros(()).expand(shape) for key, (shape, _) in keys(name).items()}


def raw(found: Weights) -> dict[str, Any]:
    """The object as upstream saved it."""
    if found.kind == "s1-checkpoint":
        return {**(found.extra or {}), "state_dict": found.tensors, "optimizer_states": [found.optimizer]}
    if found.optimizer is not None:
        return {"model": found.tensors, "iteration": found.epoch, "optimizer": found.optimizer,
                "learning_rate": found.learning_rate}  # fmt: skip
    lora = {} if found.lora_rank is None else {"lora_rank": found.lora_rank}
    return {"weight": found.tensors, "config": found.config, "info": found.info, **lora}


def assert_described(expected: Any, found: Any, where: str = "") -> int:
    """Compares with contents.json; gives back how many tensors were compared."""
    if isinstance(expected, dict) and "tensor" in expected:
        assert isinstance(found, torch.Tensor), where
        assert list(found.shape) == expected["tensor"], where
        assert str(found.dtype) == f"torch.{expected['dtype']}", where
        assert found.flatten()[:4].tolist() == expected["values_first4"], where
        return 1
    if isinstance(expected, dict):
        expected = expected.get("HParams", expected)
        assert isinstance(found, dict), where
        # JSON has text keys only, and a Lightning checkpoint was taken apart and put together in another order.
        assert {str(key) for key in found} == expected.keys(), where
        return sum(assert_described(expected[str(key)], value, f"{where}.{key}") for key, value in found.items())
    if isinstance(expected, list):
        assert isinstance(found, list | tuple), where
        assert len(found) == len(expected), where
        return sum(assert_described(a, b, f"{where}[]") for a, b in zip(expected, found, strict=True))
    if isinstance(expected, str) and expected.startswith("<pathlib.PosixPath: "):
        # The start of this path was replaced by one of the same length.
        expected = expected[20:-1].replace("experiments/", "/srv/voices/")
    assert type(found) is type(expected), where
    assert found == expected, where
    return 0


@pytest.mark.parametrize("name", SOUND)
def test_every_value_of_upstreams_files_is_read(name: str) -> None:
    found = read_weights(GOLDEN / "weights" / name)
    assert assert_described(CONTENTS[name]["content"], raw(found), name) > 3
    assert found.size == CONTENTS[name]["bytes"]
    assert found.header == CONTENTS[name]["first_two_bytes"]


@pytest.mark.parametrize("name", SOUND)
def test_upstreams_own_detection_is_repeated(name: str) -> None:
    detected = CONTENTS[name]["upstream_version_detection"]
    data = (GOLDEN / "weights" / name).read_bytes()
    mark = upstream_mark(data[:8192], len(data))
    if detected is not None:
        assert mark is not None
        assert [mark.symbols, mark.version, mark.lora] == detected


@pytest.mark.parametrize(
    ("name", "kind", "version", "epoch", "step", "lora"),
    [
        ("tiny_v1_e1_s5.pth", "s2", "v1", 1, 5, None),
        ("tiny_v2_e1_s5.pth", "s2", "v2", 1, 5, None),
        ("tiny_v2Pro_e1_s5.pth", "s2", "v2Pro", 1, 5, None),
        ("tiny_v2ProPlus_e1_s5.pth", "s2", "v2ProPlus", 1, 5, None),
        ("tiny_v3_e1_s5_l32.pth", "s2", "v3", 1, 5, 32),
        ("tiny_v4_e1_s5_l32.pth", "s2", "v4", 1, 5, 32),
        ("s1/tinyexp-e1.ckpt", "s1", "v2", 1, None, None),
        ("s1/epoch=0-step=5.ckpt", "s1-checkpoint", "v2", 1, 5, None),
        ("resume/G_233333333333.pth", "s2G-resume", "v2", 1, None, None),
        ("resume/D_233333333333.pth", "s2D-resume", "v2", 1, None, None),
    ],
)
def test_kind_version_and_progress_are_told_by_content(
    name: str, kind: str, version: str, epoch: int, step: int | None, lora: int | None
) -> None:
    found = read_weights(GOLDEN / "weights" / name, map_location="meta")
    assert (found.kind, found.version, found.epoch, found.step, found.lora_rank) == (kind, version, epoch, step, lora)


def test_a_small_v2_file_is_v2_where_upstream_goes_by_size() -> None:
    assert read_weights(GOLDEN / "weights/tiny_v2_e1_s5.pth").notes == (
        "upstream would take this file for v1, by its 8558 bytes",
    )


@pytest.mark.parametrize("header", [b"00", b"01", b"02", b"03", b"04", b"05", b"06"])
def test_every_header_is_read(tmp_path: Path, header: bytes) -> None:
    name = next(name for name in SOUND if CONTENTS[name]["first_two_bytes"] == "05")
    data = (GOLDEN / "weights" / name).read_bytes()
    (tmp_path / "权重.pth").write_bytes(header + data[2:])
    found = read_weights(tmp_path / "权重.pth")
    assert found.header == header.decode()
    assert found.version == "v2Pro"
    assert bool(found.notes) == (header != b"05")
    (tmp_path / "权重.pth").write_bytes(b"07" + data[2:])
    with pytest.raises(LastGoodError, match="neither a file"):
        read_weights(tmp_path / "权重.pth")


@pytest.mark.parametrize("name", [name for name in CONTENTS if name.startswith("hostile")])
def test_hostile_files_are_refused_and_do_not_run(name: str) -> None:
    marker = Path(CONTENTS[name]["payload"].rpartition(" ")[2])
    assert not marker.exists()
    path = GOLDEN / "weights" / name
    with pytest.raises(RefusedError, match=r"wants to use (posix|nt)\.system.*nothing was run"):
        read_weights(path)
    result = CliRunner().invoke(command, ["verify", str(path)])
    assert result.exit_code == 1
    assert "posix.system" in result.output
    assert not marker.exists()


@pytest.mark.parametrize("name", SOUND)
def test_a_changed_byte_in_a_tensor_is_found(tmp_path: Path, name: str) -> None:
    data = bytearray((GOLDEN / "weights" / name).read_bytes())
    restored = b"PK" + data[2:]
    with zipfile.ZipFile(io.BytesIO(restored)) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    data[info.header_offset + 64 + info.file_size // 2] ^= 4
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(DamagedError):
        read_weights(tmp_path / "a.pth")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (
        [1],
        {"a": 1},
        {"weight": {"a": 1}},
        {"weight": {}},
        {"model": {}, "iteration": 1, "optimizer": {}},
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(SovitsError, match=r"a\.pth: "):
            read_weights(tmp_path / "a.pth")


# what is told by the keys of real models


@pytest.mark.parametrize("version", ["v1", "v2", "v2Pro", "v2ProPlus", "v3"])
def test_content_tells_the_version_of_real_models(version: str) -> None:
    mark = content_mark(zeros(f"G_{version}"), {}, None)
    assert mark is not None
    assert (mark.version, mark.symbols, mark.lora) == (version, "v1" if version == "v1" else "v2", False)


def test_v4_is_told_by_its_config_and_lora_by_its_keys() -> None:
    tensors = zeros("export_lora32")
    mark = content_mark(tensors, {"model": {"version": "v4"}}, None)
    assert mark is not None
    assert (mark.version, mark.lora) == ("v4", True)
    with pytest.raises(SovitsError, match="no mark for a whole v4"):
        header_for("v4", False)


def test_a_published_file_is_known_by_its_md5_where_its_tensors_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s2Gv4.pth"
    torch.save({"weight": {"cfm.x": torch.zeros(3000), "enc_p.text_embedding.weight": torch.zeros(732, 2)}}, path)
    assert read_weights(path).version == "v3"
    md5 = hashlib.md5(path.read_bytes()[:8192], usedforsecurity=False).hexdigest()
    monkeypatch.setitem(PRETRAINED, md5, Mark("v2", "v4", False))
    assert (read_weights(path).version, read_weights(path).notes) == ("v4", ())


def test_discriminators_are_counted() -> None:
    assert (discriminators(keys("D_v2")), discriminators(keys("D_v2Pro"))) == (6, 8)


# writing


def upstream_loads(path: Path) -> Any:
    """What upstream's loader does, but for weights_only."""
    data = path.read_bytes()
    return torch.load(io.BytesIO(b"PK" + data[2:]), map_location="cpu", weights_only=True)


def upstream_detects(path: Path) -> str:
    """Upstream's rules again, written from its description and not from our table."""
    head, size = path.read_bytes()[:2], path.stat().st_size
    if head != b"PK":
        return ["v1", "v2", "v3", "v3", "v4", "v2Pro", "v2ProPlus"][int(head)]
    return "v1" if size < 82978 * 1024 else "v2" if size < 700 * 1024 * 1024 else "v3"


CONFIG = {"train": {"lr": 1e-4, "betas": [0.8, 0.99]}, "model": {"version": "v2"}, "data": {"mel_fmax": None}}


@pytest.mark.parametrize("version", ["v1", "v2", "v2Pro", "v2ProPlus"])
def test_default_size_is_detected_by_upstream(tmp_path: Path, version: Any) -> None:
    path = tmp_path / s2_name("voice", 8, 120)
    config = read_weights(GOLDEN / f"weights/tiny_{version}_e1_s5.pth").config
    write_s2_weights(path, zeros(f"G_{version}"), config, version=version, epoch=8, step=120, replace_file=replace_file)
    assert upstream_detects(path) == version
    with path.open("rb") as file:
        # v1 and v2 stay readable for programs from before there were headers.
        assert (file.read(2) == b"PK") == (version in ("v1", "v2"))
        if version in ("v1", "v2"):
            assert abs(path.stat().st_size - V1_BELOW) < 60_000
    with zipfile.ZipFile(io.BytesIO(b"PK" + path.read_bytes()[2:])) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"archive"}
    found = read_weights(path)
    assert (found.kind, found.version, found.epoch, found.step, found.notes) == ("s2", version, 8, 120, ())
    assert list(found.tensors) == [key for key in keys(f"G_{version}") if "enc_q" not in key]
    assert len(keys(f"G_{version}")) - len(found.tensors) == 103


@pytest.mark.slow
def test_real_values_of_default_size_survive(tmp_path: Path) -> None:
    sys.path.insert(0, str(GOLDEN))
    try:
        import fill  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    shapes = {key: shape for key, (shape, _) in keys("G_v2").items()}
    state = fill.fill_state_dict(shapes)
    write_s2_weights(tmp_path / "a.pth", state, CONFIG, version="v2", epoch=1, step=2, replace_file=replace_file)
    assert upstream_detects(tmp_path / "a.pth") == "v2"
    for name, tensor in read_weights(tmp_path / "a.pth").tensors.items():
        assert torch.equal(tensor, state[name].half())


def small(version: str) -> dict[str, torch.Tensor]:
    golden = "tiny_v3_e1_s5_l32" if version == "v3" else f"tiny_{version}_e1_s5"
    tensors = {name: tensor.float() for name, tensor in read_weights(GOLDEN / f"weights/{golden}.pth").tensors.items()}
    return {**tensors, "enc_q.pre.weight": torch.ones(2, 2, 1)}


@pytest.mark.parametrize(("version", "header"), [("v1", b"PK"), ("v2", b"01"), ("v2Pro", b"05"), ("v2ProPlus", b"06")])
def test_small_models_are_detected_too(tmp_path: Path, version: Any, header: bytes) -> None:
    state = small(version)
    path = tmp_path / "权重.pth"
    write_s2_weights(path, state, CONFIG, version=version, epoch=3, step=40, replace_file=replace_file)
    assert path.read_bytes()[:2] == header
    assert upstream_detects(path) == version
    loaded = upstream_loads(path)
    assert list(loaded) == ["weight", "config", "info"]
    assert loaded["info"] == "3epoch_40iteration"
    assert loaded["config"] == CONFIG
    assert "enc_q.pre.weight" not in loaded["weight"]
    for name, tensor in loaded["weight"].items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, state[name].half())


def test_lora_is_marked_and_has_its_rank(tmp_path: Path) -> None:
    state = small("v3")
    for version, header in (("v3", b"03"), ("v4", b"04")):
        path = tmp_path / s2_name("voice", 2, 30, 32)
        assert path.name == "voice_e2_s30_l32.pth"
        write_s2_weights(
            path, state, CONFIG, version=version, epoch=2, step=30, lora_rank=32, replace_file=replace_file  # type: ignore[arg-type]
        )  # fmt: skip
        assert path.read_bytes()[:2] == header
        assert upstream_loads(path)["lora_rank"] == 32


def test_stage_1_weights_are_as_upstream_writes_them(tmp_path: Path) -> None:
    golden = read_weights(GOLDEN / "weights/s1/tinyexp-e1.ckpt")
    path = tmp_path / s1_name("tinyexp", 1)
    state = {name: tensor.float() for name, tensor in golden.tensors.items()}
    write_s1_weights(path, state, golden.config, epoch=1, replace_file=replace_file)
    theirs = torch.load(GOLDEN / "weights/s1/tinyexp-e1.ckpt", weights_only=True)
    ours = torch.load(path, weights_only=True)
    assert list(theirs) == list(ours) == ["weight", "config", "info"]
    assert theirs["config"] == ours["config"]
    assert theirs["info"] == ours["info"]
    assert type(ours["weight"]) is OrderedDict
    assert list(theirs["weight"]) == list(ours["weight"])
    assert all(torch.equal(theirs["weight"][name], ours["weight"][name]) for name in state)
    with pytest.raises(SovitsError, match=r"named model\.\*"):
        write_s1_weights(path, {"h.weight": torch.ones(1)}, {}, epoch=1, replace_file=replace_file)


def test_overflow_is_reported_by_name_before_anything_is_written(tmp_path: Path) -> None:
    state = small("v2")
    state["dec.ups.0.weight_v"][0, 0, 0] = 70_000
    state["ref_enc.fc.fc.bias"][0] = float("nan")
    with pytest.raises(SovitsError, match=r"dec\.ups\.0\.weight_v \(largest value 70000\), ref_enc\.fc\.fc\.bias"):
        write_s2_weights(tmp_path / "a.pth", state, CONFIG, version="v2", epoch=1, step=1, replace_file=replace_file)
    assert list(tmp_path.iterdir()) == []


def test_half_gives_every_tensor_its_own_memory_and_keeps_integers() -> None:
    base = torch.arange(1000.0)
    result = half({"a": base[:2], "b": base[:2], "n": torch.tensor([2**40])})
    assert result["a"].untyped_storage().nbytes() == 4
    assert result["a"].data_ptr() != result["b"].data_ptr()
    assert result["n"].tolist() == [2**40]


def test_an_error_of_the_disk_is_raised_as_it_was(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    def on_full_disk(path: Path, write: Callable[[BinaryIO], None]) -> None:
        write(Full())

    with pytest.raises(OSError, match="No space left on device"):
        write_s2_weights(
            tmp_path / "a.pth", small("v2"), CONFIG, version="v2", epoch=1, step=1, replace_file=on_full_disk
        )


def test_an_error_of_the_disk_is_raised_where_torch_only_says_that_writing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(content: Any, file: Any) -> None:
        try:
            file.write(b"PK")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file") from None

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device"):
        save_torch(tmp_path / "a.pth", {}, lambda path, write: write(Full()))


def test_configs_with_live_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(SovitsError, match="SimpleNamespace"):
        config = {"model": types.SimpleNamespace(a=1)}
        write_s2_weights(path, small("v2"), config, version="v2", epoch=1, step=1, replace_file=replace_file)
    assert not path.exists()


# resume files


def test_a_pair_is_continued_and_written_again(tmp_path: Path) -> None:
    folder = GOLDEN / "weights/resume"
    g, d = read_pair(folder / "G_233333333333.pth", folder / "D_233333333333.pth")
    assert (g.epoch, d.epoch, g.learning_rate) == (1, 1, 1e-4)
    assert g.optimizer is not None and d.optimizer is not None
    assert g.optimizer["param_groups"][0]["lr"] == 9.99875e-05
    for name, found in zip(resume_names(None), (g, d), strict=True):
        assert found.optimizer is not None and found.learning_rate is not None and found.epoch is not None
        write_resume(
            tmp_path / name, found.tensors, found.optimizer, epoch=found.epoch, learning_rate=found.learning_rate,
            replace_file=replace_file,
        )  # fmt: skip
        theirs, ours = (torch.load(path / name, weights_only=True) for path in (folder, tmp_path))
        assert list(theirs) == list(ours)
        assert assert_described(CONTENTS[f"resume/{name}"]["content"], ours) > 3
        # The optimizer takes it.
        groups = [
            [torch.nn.Parameter(torch.zeros(1)) for _ in group["params"]] for group in ours["optimizer"]["param_groups"]
        ]
        torch.optim.AdamW([{"params": group} for group in groups]).load_state_dict(ours["optimizer"])
    assert newest_pair(tmp_path) == (tmp_path / "G_233333333333.pth", tmp_path / "D_233333333333.pth")


def _pair(folder: Path, step: int, epochs: tuple[int, int]) -> None:
    golden = read_pair(*(GOLDEN / "weights/resume" / name for name in resume_names(None)))
    for name, epoch, found in zip(resume_names(step), epochs, golden, strict=True):
        write_resume(
            folder / name,
            found.tensors,
            found.optimizer or {},
            epoch=epoch,
            learning_rate=1e-4,
            replace_file=replace_file,
        )


def test_g_and_d_of_different_epochs_are_no_pair(tmp_path: Path) -> None:
    _pair(tmp_path, 10, (3, 2))
    with pytest.raises(SovitsError, match=r"from epoch 3 and .* from epoch 2: not a pair"):
        read_pair(tmp_path / "G_10.pth", tmp_path / "D_10.pth")
    with pytest.raises(SovitsError, match="not the resume files of G and D"):
        read_pair(tmp_path / "D_10.pth", tmp_path / "G_10.pth")


def test_the_newest_whole_pair_is_found_and_a_damaged_one_is_not_taken(tmp_path: Path) -> None:
    assert newest_pair(tmp_path) is None
    _pair(tmp_path, 9, (1, 1))
    _pair(tmp_path, 10, (2, 2))
    _pair(tmp_path, 233333333333, (1, 1))  # left over from another setting: upstream would take it
    assert newest_pair(tmp_path) == (tmp_path / "G_10.pth", tmp_path / "D_10.pth")
    os.truncate(tmp_path / "D_10.pth", 3000)
    assert newest_pair(tmp_path) == (tmp_path / "G_233333333333.pth", tmp_path / "D_233333333333.pth")
    for path in tmp_path.glob("G_*"):
        os.truncate(path, 3000)
    with pytest.raises(SovitsError, match=r"no pair of resume files is whole.*G_10\.pth: the file is cut off"):
        newest_pair(tmp_path)


def shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(item) for item in value]
    return type(value)


def test_a_lightning_checkpoint_is_written_as_lightning_does(tmp_path: Path) -> None:
    golden = read_weights(GOLDEN / "weights/s1/epoch=0-step=5.ckpt")
    assert golden.extra is not None and golden.optimizer is not None
    path = tmp_path / "epoch=0-step=5.ckpt"
    write_checkpoint(
        path, golden.tensors, golden.optimizer, golden.extra["lr_schedulers"][0], golden.config,
        epoch=1, step=5, batches=24, replace_file=replace_file,
    )  # fmt: skip
    ours = torch.load(path, weights_only=True)  # upstream's own file fails here, for a path object
    theirs = raw(golden)
    assert list(ours) == ["epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
                          "optimizer_states", "lr_schedulers", "hparams_name", "hyper_parameters"]  # fmt: skip
    assert ours["loops"] == theirs["loops"]
    assert set(ours) == set(theirs)
    for name in ("epoch", "global_step", "lr_schedulers", "hparams_name"):
        assert ours[name] == theirs[name], name
    assert shape_of(ours["optimizer_states"]) == shape_of(theirs["optimizer_states"])
    assert ours["hyper_parameters"]["config"] == theirs["hyper_parameters"]["config"]
    assert ours["hyper_parameters"]["output_dir"] == golden.config["output_dir"]
    assert ours["hyper_parameters"].keys() == theirs["hyper_parameters"].keys()
    again = read_weights(path)
    assert (again.epoch, again.step, again.kind) == (1, 5, "s1-checkpoint")


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    golden = GOLDEN / "weights/s1/epoch=0-step=5.ckpt"
    assert newest_checkpoint(tmp_path) is None
    for name in ("epoch=0-step=5.ckpt", "epoch=9-step=50.ckpt", "epoch=10-step=55.ckpt", "epoch=11-step=60-v1.ckpt"):
        shutil.copy(golden, tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch=10-step=55.ckpt"
    os.truncate(tmp_path / "epoch=10-step=55.ckpt", 1000)
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch=9-step=50.ckpt"
    for path in tmp_path.glob("*.ckpt"):
        os.truncate(path, 1000)
    with pytest.raises(SovitsError, match="no checkpoint is whole"):
        newest_checkpoint(tmp_path)


# convert, and the command line


@pytest.mark.parametrize("name", [n for n in SOUND if n.startswith("tiny") or n.endswith("e1.ckpt")])
def test_safetensors_and_back_changes_nothing(tmp_path: Path, name: str) -> None:
    source = GOLDEN / "weights" / name
    suffix = source.suffix
    convert(source, tmp_path / "a.safetensors", replace_file=replace_file)
    convert(tmp_path / "a.safetensors", tmp_path / f"b{suffix}", replace_file=replace_file)
    original, middle, back = (read_weights(p) for p in (source, tmp_path / "a.safetensors", tmp_path / f"b{suffix}"))
    for found in (middle, back):
        assert (found.kind, found.version, found.info, found.config, found.lora_rank) == (
            original.kind, original.version, original.info, original.config, original.lora_rank
        )  # fmt: skip
        assert set(found.tensors) == set(original.tensors)
        for key, tensor in original.tensors.items():
            assert tensor.dtype == found.tensors[key].dtype
            assert torch.equal(tensor, found.tensors[key])
    upstream_loads(tmp_path / f"b{suffix}")  # no HParams any more
    if original.kind == "s2":
        assert upstream_detects(tmp_path / f"b{suffix}") == original.version


def test_a_safetensors_file_whose_length_looks_like_a_header_is_read(tmp_path: Path) -> None:
    # The length of its header comes first; 12336 is "00" in two bytes.
    tensors = read_weights(GOLDEN / "weights/tiny_v2_e1_s5.pth").tensors
    plain = len(save(tensors, {"pad": ""})) - sum(tensor.nbytes for tensor in tensors.values()) - 8
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"pad": "x" * (12336 - plain)}))
    assert (tmp_path / "a.safetensors").read_bytes()[:2] == b"00"
    assert read_weights(tmp_path / "a.safetensors").version == "v2"


def test_the_header_is_added_and_stripped(tmp_path: Path) -> None:
    source = GOLDEN / "weights/tiny_v2Pro_e1_s5.pth"
    for header, expected in (("never", b"PK"), ("always", b"05"), ("upstream", b"05")):
        convert(source, tmp_path / "a.pth", header=header, replace_file=replace_file)  # type: ignore[arg-type]
        assert (tmp_path / "a.pth").read_bytes()[:2] == expected
    convert(GOLDEN / "weights/tiny_v1_e1_s5.pth", tmp_path / "a.pth", header="always", replace_file=replace_file)
    assert (tmp_path / "a.pth").read_bytes()[:2] == b"00"


def test_the_state_of_a_run_is_not_converted(tmp_path: Path) -> None:
    for name in ("resume/G_233333333333.pth", "s1/epoch=0-step=5.ckpt"):
        with pytest.raises(SovitsError, match="only weights can be converted"):
            convert(GOLDEN / "weights" / name, tmp_path / "a.pth", replace_file=replace_file)


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_show_says_what_a_file_is() -> None:
    code, output = run("show", GOLDEN / "weights/tiny_v3_e1_s5_l32.pth")
    assert code == 0
    assert "version: v3\nlora_rank: 32\nepoch: 1\nstep: 5\n" in output
    for name in SOUND:
        code, output = run("show", GOLDEN / "weights" / name, "--json")
        assert code == 0
        assert json.loads(output)["bytes"] == CONTENTS[name]["bytes"]


def test_verify_tells_good_from_bad(tmp_path: Path) -> None:
    sound = [GOLDEN / "weights" / name for name in SOUND]
    code, output = run("verify", *sound)
    assert (code, output.count(": whole")) == (0, len(sound))
    bad = tmp_path / "a.pth"
    bad.write_bytes((GOLDEN / "weights/tiny_v2Pro_e1_s5.pth").read_bytes()[:-100])
    code, output = run("verify", sound[0], bad, tmp_path / "none.pth", "--json")
    found = json.loads(output)
    assert code == 1
    assert [entry["ok"] for entry in found.values()] == [True, False, False]
    assert "cut off" in found[str(bad)]["problems"][0]


def test_convert_command_keeps_an_existing_target(tmp_path: Path) -> None:
    source, target = GOLDEN / "weights/tiny_v2_e1_s5.pth", tmp_path / "a.safetensors"
    assert run("convert", source, target)[0] == 0
    code, output = run("convert", source, target)
    assert (code, "exists; --force replaces it" in output) == (1, True)
    assert run("convert", source, target, "--force", "--json")[0] == 0
    code, output = run("convert", source, tmp_path / "a.bin")
    assert (code, "the ending says the format" in output) == (1, True)
