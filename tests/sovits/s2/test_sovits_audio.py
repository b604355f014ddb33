"""Spectrograms against upstream's.

Tolerance: 1e-5 absolute for the spectrogram, 3e-5 for the logarithmic mel. The reference values themselves are up to
9.5e-6 from a float64 computation (Fourier transforms of different processors round differently), so 1e-5 is too little.
"""

from pathlib import Path

import pytest
import soundfile
import torch
from s2_golden import assert_close, read_json, read_tensors

from lastgood_sovits.audio import mel_filter_bank, mel_from_spectrogram, read_wave, spectrogram
from lastgood_sovits.errors import SovitsError

REFERENCE = read_json("audio.json")


@pytest.mark.parametrize(("setting", "wave"), [("v1v2", "wave32k"), ("v3", "wave24k"), ("v4", "wave32k")])
def test_spectrogram_and_mel_equal_upstream(setting: str, wave: str) -> None:
    tensors, s = read_tensors("audio.safetensors"), REFERENCE[setting]
    spec = spectrogram(tensors[wave], s["n_fft"], s["hop"], s["win"])
    assert list(spec.shape) == REFERENCE["stats"][f"{setting}.spec"]["shape"]
    assert_close(spec[:, ::16], tensors[f"{setting}.spec"], "spectrogram", 1e-5)
    stats = REFERENCE["stats"][f"{setting}.spec"]
    assert abs(float(spec.double().sum()) - stats["sum"]) < 1e-6 * stats["abs_sum"]
    mel = mel_from_spectrogram(spec, s["sr"], s["n_fft"], s["n_mels"], s["fmin"], s["fmax"])
    assert_close(mel, tensors[f"{setting}.mel"], "mel", 3e-5)


@pytest.mark.parametrize("setting", ["v1v2", "v3", "v4"])
def test_mel_filters_equal_librosa(setting: str) -> None:
    s = REFERENCE[setting]
    filters = mel_filter_bank(s["sr"], s["n_fft"], s["n_mels"], s["fmin"], s["fmax"])
    expected = s["mel_basis"]
    # A filter corner that falls on a bin is 0 or 1e-17, depending on the order of the operations.
    assert abs(int((filters != 0).sum()) - expected["nonzero"]) <= 1
    assert filters.argmax(1).tolist() == expected["row_max_bin"]
    assert_close(filters.double().sum(1), torch.tensor(expected["row_sum"], dtype=torch.float64), "row sums", 1e-7)


def test_number_of_frames_is_samples_div_hop() -> None:
    for samples, frames in REFERENCE["frames_by_samples(n_fft 2048, hop 640)"].items():
        assert spectrogram(torch.zeros(1, int(samples)), 2048, 640, 2048).shape[-1] == frames


def test_silence_has_the_floor_value() -> None:
    spec = spectrogram(torch.zeros(1, 6400), 2048, 640, 2048)
    assert float(spec.max()) == pytest.approx(REFERENCE["zero_signal"]["spec_value"], rel=1e-6)
    mel = mel_from_spectrogram(spec, 32000, 2048, 128)
    assert float(mel.max()) == pytest.approx(REFERENCE["zero_signal"]["mel_value"], rel=1e-6)


def test_a_wave_too_short_to_reflect_is_refused() -> None:
    with pytest.raises(SovitsError, match="at least 705"):
        spectrogram(torch.zeros(1, 704), 2048, 640, 2048)


def test_window_first_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        mel_from_spectrogram(spectrogram(torch.zeros(1, 500), 98, 32, 98), 8000, 98, 5)
    wave = torch.randn(1, 500, requires_grad=True)
    mel_from_spectrogram(spectrogram(wave, 98, 32, 98), 8000, 98, 5).sum().backward()
    assert wave.grad is not None and torch.isfinite(wave.grad).all()


def test_reading_averages_channels_and_resamples(tmp_path: Path) -> None:
    tone = torch.sin(torch.arange(16000) * 0.05)
    soundfile.write(tmp_path / "a.wav", torch.stack([tone, torch.zeros_like(tone)], 1).numpy(), 16000, subtype="PCM_16")
    wave = read_wave(tmp_path / "a.wav", 32000)
    assert wave.shape == (32000,) and wave.dtype == torch.float32
    assert float((wave[1000:-1000:2] - tone[500:-500] / 2).abs().max()) < 1e-2


@pytest.mark.parametrize("content", [b"", b"not a sound file at all"])
def test_unreadable_sound_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(SovitsError, match=r"broken\.wav"):
        read_wave(path, 32000)
