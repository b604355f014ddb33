"""The data set keeps what upstream keeps, and says of everything else why it is not used."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1 import Batch, BucketBatchSampler, S1Dataset, collate

SYMBOLS = {symbol: number for number, symbol in enumerate(["!", "a", "b", "c", "UNK"])}


class Experiment:
    """An experiment folder with one good clip of 2 seconds, to which a test adds what it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text: list[str] = []
        self.codes: list[str] = []
        self.add("good.wav", ["a", "b", "c"] * 6, [7] * 50)

    def add(self, name: str, phones: list[str], codes: list[int]) -> None:
        self.text.append(f"{name}\t{' '.join(phones)}\tNone\tsome words")
        self.codes.append(f"{name}\t{' '.join(map(str, codes))}")

    def open(self, max_sec: float = 54) -> S1Dataset:
        text, codes = self.root / "2-name2text.txt", self.root / "6-name2semantic.tsv"
        text.write_text("\n".join(self.text) + "\n", encoding="utf-8")
        codes.write_text("\n".join(["item_name\tsemantic_audio", *self.codes]) + "\n", encoding="utf-8")
        return S1Dataset(text, codes, SYMBOLS, max_sec=max_sec)

    def put_bert(self, name: str, value: object) -> None:
        (self.root / "3-bert").mkdir(exist_ok=True)
        torch.save(value, self.root / "3-bert" / f"{name}.pt")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


def test_reads_phones_codes_and_text_features(experiment: Experiment) -> None:
    features = torch.randn(1024, 18).half()
    experiment.put_bert("good.wav", features)
    dataset = experiment.open()
    clip, bert = dataset[0]
    assert clip.name == "good.wav" and clip.phones == (1, 2, 3) * 6 and clip.codes == (7,) * 50
    assert clip.seconds == 2.0 and bert.dtype == torch.float32 and torch.equal(bert, features.float())
    assert dataset.dropped == []


@pytest.mark.parametrize(
    ("phones", "codes", "reason"),
    [
        (["a"] * 18, [1024] * 50, "not all within 0 and 1023"),
        (["a"] * 18, [-1] * 50, "not all within 0 and 1023"),
        (["a"] * 18, [], "no semantic codes"),
        (["zz"] + ["a"] * 17, [7] * 50, "'zz' is not in this version's table"),
        (["a", "", "b"] * 6, [7] * 50, "'' is not in this version's table"),
        (["a"] * 5, [7] * 50, "phones per second are outside 3 to 25"),
        (["a"] * 26, [7] * 25, "phones per second are outside 3 to 25"),
        (["a"] * 40, [7] * 76, "longer than 3 seconds"),
        (["a"] * 31, [7] * 75, "more than 30 phones"),
    ],
)
def test_drops_what_upstream_drops_and_says_why(
    experiment: Experiment, caplog: pytest.LogCaptureFixture, phones: list[str], codes: list[int], reason: str
) -> None:
    experiment.add("bad.wav", phones, codes)
    dataset = experiment.open(max_sec=3)
    assert [clip.name for clip in dataset.clips] == ["good.wav"]
    assert [item.name for item in dataset.dropped] == ["bad.wav"] and reason in dataset.dropped[0].reason
    assert "bad.wav is not trained on" in caplog.text and reason in caplog.text


def test_keeps_what_lies_on_the_limits(experiment: Experiment) -> None:
    experiment.add("slow.wav", ["a"] * 6, [7] * 50)  # exactly 3 phones a second
    experiment.add("fast.wav", ["a"] * 25, [7] * 25)  # exactly 25
    experiment.add("long.wav", ["a"] * 30, [7] * 75)  # exactly 3 seconds, and as many phones as fit
    assert len(experiment.open(max_sec=3).clips) == 4


def test_names_clips_without_text_and_lines_without_four_fields(experiment: Experiment) -> None:
    experiment.codes.append("lost.wav\t1 2 3")
    experiment.codes.append("odd.wav\t1 x 3")
    experiment.text.append("odd.wav\ta\tNone\twords")
    experiment.text.append("three\tfields\tonly")
    dropped = {item.name: item.reason for item in experiment.open().dropped}
    assert set(dropped) == {"lost.wav", "odd.wav", "2-name2text.txt, line 3"}
    assert "not in 2-name2text.txt" in dropped["lost.wav"] and "whole numbers" in dropped["odd.wav"]
    assert "has 3 fields where 4 are needed" in dropped["2-name2text.txt, line 3"]


@pytest.mark.parametrize(
    ("clips", "items"), [(1, 100), (24, 96), (49, 98), (51, 102), (99, 198), (100, 100), (130, 130)]
)
def test_few_clips_are_repeated_as_upstream_repeats_them(experiment: Experiment, clips: int, items: int) -> None:
    for number in range(1, clips):
        experiment.add(f"{number}.wav", ["a"] * 18, [7] * 50)
    dataset = experiment.open()
    assert len(dataset) == items == len(dataset.seconds)
    assert dataset[clips % items][0].name == "good.wav"


@pytest.mark.parametrize(("wanted", "batch"), [(8, 8), (40, 25), (1, 1)])
def test_an_epoch_has_at_least_four_micro_batches(experiment: Experiment, wanted: int, batch: int) -> None:
    assert experiment.open().batch_size(wanted) == batch


def test_collate_pads_on_the_right(experiment: Experiment) -> None:
    experiment.add("short.wav", ["b"] * 6, [9] * 25)
    experiment.put_bert("short.wav", torch.ones(1024, 6))
    dataset = experiment.open()
    batch = collate([dataset[0], dataset[1]])
    assert batch.names == ("good.wav", "short.wav")
    assert batch.phone_lengths == (18, 6) and batch.codes.lengths == (50, 25)
    assert batch.phones[1].tolist() == [2] * 6 + [0] * 12
    assert batch.codes.ids[1].tolist() == [9] * 25 + [1024] * 25
    assert batch.bert.shape == (2, 1024, 18)
    assert batch.bert[0].abs().sum() == 0 and batch.bert[1].sum() == 1024 * 6 and batch.bert[1, :, 6:].sum() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_samplers_batches_and_resumes(experiment: Experiment, workers: int) -> None:
    for number in range(120):
        experiment.add(f"{number}.wav", ["a"] * 18, [number] * (30 + number % 40))
    dataset = experiment.open()
    sampler = BucketBatchSampler(dataset.seconds, batch_size=8)
    expected = [tuple(dataset.clips[i].name for i in batch) for batch in sampler]

    def load() -> Iterator[Batch]:
        return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))

    loader = load()
    for names in expected[:3]:
        assert next(loader).names == names
        sampler.advance()
    assert [batch.names for batch in load()] == expected[3:]


def test_text_features_that_do_not_fit_leave_their_clip_out_by_name(experiment: Experiment) -> None:
    wrong = {"short.wav": torch.zeros(1024, 17), "list.wav": [1], "nan.wav": torch.full((1024, 18), float("nan"))}
    for name, value in wrong.items():
        experiment.add(name, ["a", "b", "c"] * 6, [7] * 50)
        experiment.put_bert(name, value)
    dataset = experiment.open()
    reasons = {item.name: item.reason for item in dataset.dropped}
    assert [clip.name for clip in dataset.clips] == ["good.wav"] and reasons.keys() == wrong.keys()
    assert "are [1024, 17]" in reasons["short.wav"] and "need [1024, 18]" in reasons["short.wav"]
    assert "are list" in reasons["list.wav"] and "not finite" in reasons["nan.wav"]


def test_damaged_or_hostile_text_features_are_refused_and_run_nothing(experiment: Experiment, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (trace,))

    experiment.add("other.wav", ["a", "b", "c"] * 6, [7] * 50)
    experiment.put_bert("good.wav", torch.zeros(1024, 18))
    dataset = experiment.open()
    path = tmp_path / "3-bert" / "good.wav.pt"
    content = path.read_bytes()
    hostile = io.BytesIO()
    torch.save(Hostile(), hostile)
    for damaged in (
        content[:-1000],
        b"",
        b"not a file of torch",
        pickle.dumps(Hostile(), protocol=2),
        hostile.getvalue(),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SovitsError, match=r"good\.wav\.pt cannot be read"):
            dataset[0]
        assert [clip.name for clip in experiment.open().clips] == ["other.wav"]
    assert not trace.exists()


def test_mandarin_without_text_features_is_mentioned_once(
    experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    experiment.open()
    assert "Mandarin" not in caplog.text
    experiment.text[0] = experiment.text[0].replace("None", str([2] * 9))
    experiment.open()
    assert caplog.text.count("1 clips in Mandarin have no text features") == 1 and "first good.wav" in caplog.text
    caplog.clear()
    experiment.put_bert("good.wav", torch.zeros(1024, 18))
    experiment.open()
    assert "Mandarin" not in caplog.text


def test_missing_and_empty_data_says_what_to_do(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(SovitsError, match="cannot be read; prepare the data set"):
        S1Dataset(tmp_path / "no.txt", tmp_path / "no.tsv", SYMBOLS)
    experiment.codes = []
    with pytest.raises(SovitsError, match=r"None of the clips .*the file lists none.* Prepare the data set"):
        experiment.open()
    experiment.codes = ["x.wav\t1 2", "y.wav\t3 4"]
    with pytest.raises(SovitsError, match=r"2 x it is not in 2-name2text\.txt"):
        experiment.open()


def test_a_very_long_clip_does_not_end_the_reading(experiment: Experiment) -> None:
    experiment.add("endless.wav", ["a"] * 18, [1000] * 60_000)
    dataset = experiment.open()
    assert [item.name for item in dataset.dropped] == ["endless.wav"]
