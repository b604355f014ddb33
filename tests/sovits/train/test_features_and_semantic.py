"""Features from small random models that the test stores, and codes from a small quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import soxr
import torch
from click.testing import CliRunner
from experiments import make_experiment

from lastgood_sovits.cli import main
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.features import levelled, make_features
from lastgood_sovits.s1 import S1Dataset
from lastgood_sovits.s2.dataset import load_tensor
from lastgood_sovits.semantic import write_semantic
from lastgood_sovits.speaker import SpeakerNetwork, log_mel_bands
from lastgood_sovits.text import symbol_ids

transformers = pytest.importorskip("transformers")


@pytest.fixture
def hubert(tmp_path: Path) -> Path:
    """As small as HuBERT can be, with its real down-sampling by 320."""
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.HubertModel(config).save_pretrained(tmp_path / "hubert")
    return tmp_path / "hubert"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n你\n好\n。\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=1024, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "voice"
    (folder / "recordings").mkdir(parents=True)
    for number in range(3):
        wave = torch.randn(44100 + 1000 * number, generator=torch.Generator().manual_seed(number)) * 0.1
        soundfile.write(folder / "recordings" / f"clip{number}.wav", wave.numpy(), 44100)
    lines = ["clip0.wav\tHH AH0 L OW1 .\tNone\thello.", "clip1.wav\tn i2 h ao3 .\t[2, 2, 1]\t你好。"]
    lines += ["clip2.wav\tHH AH0\tNone\thuh", "absent.wav\tHH AH0\tNone\thuh"]
    (folder / "2-name2text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_features_have_the_layout_that_training_reads(raw: Path, hubert: Path, bert: Path) -> None:
    made = make_features(raw, raw / "recordings", hubert, bert)
    assert (made.waves, made.hubert, made.bert) == (3, 3, 1) and list(made.left_out) == ["absent.wav"]
    for number in range(3):
        samples, rate = soundfile.read(raw / "5-wav32k" / f"clip{number}.wav", dtype="int16")
        features = load_tensor(raw / "4-cnhubert" / f"clip{number}.wav.pt")
        assert rate == 32000 and abs(features.shape[2] - len(samples) // 640) <= 1 and features.shape[:2] == (1, 16)
    assert load_tensor(raw / "3-bert" / "clip1.wav.pt").shape == (1024, 5)
    assert [path.name for path in (raw / "3-bert").iterdir()] == ["clip1.wav.pt"]


def test_a_byte_order_mark_costs_no_clip_and_only_line_feeds_end_lines(raw: Path, hubert: Path) -> None:
    path = raw / "2-name2text.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("hello", "hel\u2028lo"), encoding="utf-8-sig")
    made = make_features(raw, raw / "recordings", hubert)
    assert made.hubert == 3 and list(made.left_out) == ["absent.wav"]


def test_without_a_folder_the_recordings_are_those_of_the_list(raw: Path, hubert: Path) -> None:
    arguments = ["features", str(raw), "--hubert", str(hubert)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "give their folder with --audio" in done.output
    lines = [f"{raw / 'recordings' / f'clip{number}.wav'}|me|EN|some words" for number in (0, 2)]
    (raw / "voice.list").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and "2 of HuBERT" in done.output, done.output
    assert "clip1.wav is left out: there is no recording of it in the list" in done.output


def test_levels_are_half_normalised() -> None:
    stored = levelled(torch.tensor([0.5, -0.25])).stored
    assert stored.tolist() == [int((0.475 + 0.25) * 32768), int(-(0.2375 + 0.125) * 32768)]
    with pytest.raises(SovitsError, match=r"above 2\.2"):
        levelled(torch.tensor([3.0]))


def test_a_folder_without_a_model_is_an_error_and_nothing_is_fetched(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SovitsError, match="HuBERT cannot be loaded"):
        make_features(raw, raw / "recordings", tmp_path / "empty")


def test_speaker_vectors_come_with_a_network_that_is_stored_here(raw: Path, hubert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SpeakerNetwork(16)
    torch.save({**network.state_dict(), "seg_1.weight": torch.zeros(192, 5120)}, tmp_path / "sv.ckpt")
    arguments = ["features", str(raw), "--audio", str(raw / "recordings"), "--hubert", str(hubert)]
    done = CliRunner().invoke(main, [*arguments, "--sv", str(tmp_path / "sv.ckpt")])
    assert done.exit_code == 0 and "3 speaker vectors" in done.output
    vector = load_tensor(raw / "7-sv_cn" / "clip1.wav.pt")
    samples, _ = soundfile.read(raw / "5-wav32k" / "clip1.wav", dtype="float32")
    heard = torch.from_numpy(soxr.resample(samples, 32000, 16000))
    expected = network.eval()(log_mel_bands(heard)[None])
    assert vector.shape == (1, 5120) and torch.allclose(vector, expected, atol=1e-5)


def test_a_file_of_another_network_is_refused(raw: Path, hubert: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(16, 1, 3, 3)}, tmp_path / "sv.ckpt")
    with pytest.raises(SovitsError, match="not those of ERes2NetV2"):
        make_features(raw, raw / "recordings", hubert, speaker=tmp_path / "sv.ckpt")
    with pytest.raises(SovitsError, match="no such file"):
        make_features(raw, raw / "recordings", hubert, speaker=tmp_path / "missing.ckpt")


def test_semantic_codes_are_those_of_the_generator(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    from lastgood_sovits.s2.config import parse_config
    from lastgood_sovits.s2.synthesizer import Synthesizer
    from lastgood_sovits.train.trainer import replace
    from lastgood_sovits.weights_format import Version
    from lastgood_sovits.weights_write import write_s2_weights

    torch.manual_seed(0)
    model = Synthesizer(parse_config(experiment.s2).model)
    model.quantizer.codebook.initialise(torch.randn(64, 12))
    version: Version = "v2"
    path = tmp_path / "s2G.pth"
    tensors = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    write_s2_weights(path, tensors, experiment.s2, version=version, epoch=1, step=1, replace_file=replace)
    model.load_state_dict(tensors)
    (experiment.folder / "4-cnhubert" / "clip2.wav.pt").unlink()
    done = write_semantic(experiment.folder, path)
    assert done.clips == 7 and list(done.left_out) == ["clip2.wav"]
    lines = done.path.read_text().splitlines()
    assert lines[0] == "item_name\tsemantic_audio"
    for line in lines[1:]:
        name, codes = line.split("\t")
        expected = model.extract_codes(load_tensor(experiment.folder / "4-cnhubert" / f"{name}.pt"))
        assert [int(code) for code in codes.split()] == expected[0, 0].tolist()
    dataset = S1Dataset(experiment.folder / "2-name2text.txt", done.path, symbol_ids("v2"))
    assert len(dataset.clips) == 7


def test_weights_without_a_quantizer_are_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    before = (experiment.folder / "6-name2semantic.tsv").read_bytes()
    path = tmp_path / "other.pth"
    torch.save({"weight": {"model.x": torch.zeros(1)}, "config": {}, "info": ""}, path)
    with pytest.raises(SovitsError, match="has no quantizer"):
        write_semantic(experiment.folder, path)
    assert (experiment.folder / "6-name2semantic.tsv").read_bytes() == before
