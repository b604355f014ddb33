"""Clips: what is used, what is left out and why, and how they are joined to a batch."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from s2_tiny import Prepare, tiny_config
from torch.utils.data import DataLoader

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.batch import Batch, collate
from lastgood_sovits.s2.dataset import ClipDataset, load_tensor, read_phonemes
from lastgood_sovits.s2.sampler import BucketSampler
from lastgood_sovits.text import symbol_ids


def test_order_is_sorted_and_few_clips_are_repeated(prepare: Prepare) -> None:
    data = ClipDataset(prepare(), tiny_config())
    assert data.names == ["a.wav", "b.wav", "c.wav"] * 33
    assert data.lengths[:3] == [45, 40, 50]
    assert data.left_out == {}


def test_a_clip_has_matching_lengths_and_the_ids_of_its_phonemes(prepare: Prepare) -> None:
    clip = ClipDataset(prepare(), tiny_config())[0]
    assert clip.name == "a.wav"
    assert clip.spec.shape == (1025, 45) and clip.ssl.shape == (12, 45) and clip.wave.shape == (28800,)
    ids = symbol_ids("v2")
    assert clip.text.tolist() == [ids[p] for p in ("HH", "AH0", "L", "OW1", ".")] and clip.sv is None
    # HuBERT gave 44 frames; the last is repeated.
    assert torch.equal(clip.ssl[:, 44], clip.ssl[:, 43])


def test_pro_versions_read_speaker_vectors(prepare: Prepare) -> None:
    clip = ClipDataset(prepare(), tiny_config("v2Pro"))[0]
    assert clip.sv is not None and clip.sv.shape == (20,)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def _pickle_with_code(path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (print, ("executed",))

    path.write_bytes(pickle.dumps(Evil(), protocol=2))


def _short(path: Path) -> None:
    soundfile.write(path, torch.zeros(21119).numpy(), 32000, subtype="PCM_16")


def _not_finite(path: Path) -> None:
    torch.save(torch.full((1, 12, 44), float("nan")), path)


BROKEN = [
    ("5-wav32k/a.wav", _truncate, "needs"),
    ("5-wav32k/a.wav", lambda p: p.write_bytes(b""), "cannot be read as a sound file"),
    ("5-wav32k/a.wav", Path.unlink, "is missing"),
    ("5-wav32k/a.wav", _short, "it is 0.64 s long, and usable are clips from 0.66 s to 38.00 s"),
    ("4-cnhubert/a.wav.pt", _truncate, "cannot be read as a tensor file"),
    ("4-cnhubert/a.wav.pt", Path.unlink, "is missing"),
    ("4-cnhubert/a.wav.pt", _pickle_with_code, "cannot be read as a tensor file"),
    ("4-cnhubert/a.wav.pt", lambda p: torch.save({"a": 1}, p), "holds a dict"),
    ("4-cnhubert/a.wav.pt", lambda p: torch.save(torch.zeros(1, 12, 40), p), "(1, 12, 45)"),
    ("4-cnhubert/a.wav.pt", lambda p: torch.save(torch.zeros(1, 11, 45), p), "(1, 11, 45)"),
    ("4-cnhubert/a.wav.pt", _not_finite, "not finite"),
    ("7-sv_cn/a.wav.pt", Path.unlink, "is missing"),
    ("7-sv_cn/a.wav.pt", lambda p: torch.save(torch.zeros(1, 19), p), "19 numbers instead of 20"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), BROKEN)
def test_a_broken_clip_is_left_out_by_name(
    prepare: Prepare,
    file: str,
    damage: Callable[[Path], object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = prepare()
    damage(folder / file)
    data = ClipDataset(folder, tiny_config("v2Pro"))
    assert set(data.names) == {"b.wav", "c.wav"}
    assert list(data.left_out) == ["a.wav"] and reason in data.left_out["a.wav"]
    assert "a.wav" in caplog.text and reason in caplog.text
    assert "executed" not in capsys.readouterr().out


def test_unknown_or_missing_phonemes_and_malformed_lines_are_reported(
    prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepare()
    text = "a.wav\tHH qq\tNone\tx\nb.wav\tHH\tNone\tx\nc.wav\t\tNone\tx\nd.wav\tHH\n"
    (folder / "2-name2text.txt").write_text(text, encoding="utf-8")
    data = ClipDataset(folder, tiny_config())
    assert set(data.names) == {"b.wav"}
    assert "'qq'" in data.left_out["a.wav"] and "no phonemes" in data.left_out["c.wav"]
    assert "line 4" in caplog.text


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_belongs_to_none(prepare: Prepare) -> None:
    folder = prepare()
    path = folder / "2-name2text.txt"
    text = path.read_text().replace("hello", "hel\u2028lo\x85")
    path.write_bytes("\ufeff".encode() + text.replace("\n", "\r\n").encode())
    assert "\u2028" in path.read_text(encoding="utf-8")
    data = ClipDataset(folder, tiny_config())
    assert data.names[:3] == ["a.wav", "b.wav", "c.wav"] and data.left_out == {}
    assert read_phonemes(path)[1] == []


@pytest.mark.parametrize("part", ["2-name2text.txt", "4-cnhubert", "5-wav32k", "7-sv_cn"])
def test_a_missing_part_says_which_preparation_to_run(prepare: Prepare, part: str) -> None:
    folder = prepare()
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SovitsError, match=rf"{part} does not exist: run step 1[AB]"):
        ClipDataset(folder, tiny_config("v2Pro"))


def test_no_folder_no_clip_and_no_usable_clip_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(SovitsError, match="is no folder"):
        ClipDataset(tmp_path / "absent", tiny_config())
    folder = prepare(())
    with pytest.raises(SovitsError, match="lists no clip"):
        ClipDataset(folder, tiny_config())
    folder = prepare(("a.wav",))
    (folder / "5-wav32k" / "a.wav").unlink()
    with pytest.raises(SovitsError, match=r"none of the 1 clips.*missing"):
        ClipDataset(folder, tiny_config())


def test_a_clip_damaged_after_the_check_raises_with_its_name(prepare: Prepare) -> None:
    folder = prepare()
    data = ClipDataset(folder, tiny_config())
    (folder / "5-wav32k" / "a.wav").write_bytes(b"")
    with pytest.raises(SovitsError, match=r"a\.wav"):
        data[0]


def test_tensors_load_from_both_formats_of_torch(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(torch.ones(2, dtype=torch.float16), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        assert torch.equal(load_tensor(tmp_path / "x.pt"), torch.ones(2))


def test_a_batch_is_padded_sorted_and_even(prepare: Prepare) -> None:
    data = ClipDataset(prepare(), tiny_config("v2Pro"))
    batch = collate([data[0], data[1], data[2]])
    assert batch.names == ("c.wav", "a.wav", "b.wav") and batch.lengths.tolist() == [50, 45, 40]
    assert batch.spec.shape == (3, 1025, 52) and batch.ssl.shape == (3, 12, 52) and batch.wave.shape == (3, 1, 32000)
    assert batch.sv is not None and batch.sv.shape == (3, 20)
    assert not batch.spec[1, :, 45:].any() and not batch.wave[1, :, 28800:].any() and not batch.ssl[1, :, 45:].any()
    assert torch.equal(batch.spec[1, :, :45], data[0].spec) and batch.text_lengths.tolist() == [5, 5, 5]
    assert collate([data[0]]).spec.shape[2] == 46


def test_a_loader_with_workers_gives_the_same_batches_in_every_run(prepare: Prepare) -> None:
    folder = prepare()

    def run() -> list[Batch]:
        data = ClipDataset(folder, tiny_config())
        sampler = BucketSampler(data.lengths, 40)
        return list(DataLoader(data, batch_sampler=sampler, num_workers=1, collate_fn=collate))

    first, second = run(), run()
    assert len(first) == 3 and [b.names for b in first] == [b.names for b in second]
    assert all(torch.equal(a.wave, b.wave) and torch.equal(a.ssl, b.ssl) for a, b in zip(first, second, strict=True))
