"""Sound files, linear spectrograms and mel spectrograms, equal to those that the published GPT-SoVITS models know.

The mel filter bank follows Slaney's Auditory Toolbox (1998), as librosa computes it with `htk=False, norm="slaney"`.
It is built here: one function does not justify a dependency that brings a JIT compiler with it.
"""

import math
from functools import lru_cache
from pathlib import Path

import soundfile  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lastgood_sovits.errors import SovitsError

POWER_FLOOR = 1e-8
"""Added to the power before the square root, so that its gradient at silence is finite."""

MEL_FLOOR = 1e-5
"""Smallest mel magnitude before the logarithm: silence becomes ln(1e-5) = -11.5."""

# Slaney's scale: linear below 1000 Hz (200/3 Hz per mel), logarithmic above (27 steps for every factor of 6.4).
_HZ_PER_MEL = 200.0 / 3.0
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _HZ_PER_MEL
    return _LOG_START_MEL + math.log(hz / _LOG_START_HZ) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    logarithmic = _LOG_START_HZ * torch.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return torch.where(mel < _LOG_START_MEL, mel * _HZ_PER_MEL, logarithmic)


def mel_filter_bank(
    sampling_rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Computes triangular mel filters of equal area.

    Args:
        sampling_rate: in Hz.
        n_fft: window length of the Fourier transform, in samples.
        n_mels: number of filters.
        fmin: lowest frequency, in Hz.
        fmax: highest frequency, in Hz; None means half the sampling rate.

    Returns:
        Float32 tensor (n_mels, n_fft // 2 + 1).
    """
    top = sampling_rate / 2 if fmax is None else fmax
    bins = torch.linspace(0, sampling_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    corners = _mel_to_hz(torch.linspace(_hz_to_mel(fmin), _hz_to_mel(top), n_mels + 2, dtype=torch.float64))
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * (2.0 / (right - left))).float()


@lru_cache(maxsize=16)
def _filters(
    sampling_rate: int,
    n_fft: int,
    n_mels: int,
    fmin: float,
    fmax: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # A tensor made in inference mode could never be used in training again, and this one outlives its first caller.
    with torch.inference_mode(False):
        return mel_filter_bank(sampling_rate, n_fft, n_mels, fmin, fmax).to(device, dtype)


@lru_cache(maxsize=16)
def _window(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(length).to(device, dtype)


def spectrogram(wave: Tensor, n_fft: int, hop_length: int, win_length: int) -> Tensor:
    """Computes the magnitude of the short-time Fourier transform.

    The ends are reflected by (n_fft - hop_length) / 2 samples, which gives exactly n // hop_length frames.

    Args:
        wave: float tensor (batch, n), more than (n_fft - hop_length) / 2 samples long, in -1 .. 1.
        n_fft: window length of the transform, in samples.
        hop_length: samples from one frame to the next.
        win_length: length of the Hann window, in samples.

    Returns:
        Tensor (batch, n_fft // 2 + 1, n // hop_length).

    Raises:
        SovitsError: if the wave is too short to be reflected.
    """
    pad = (n_fft - hop_length) // 2
    if wave.shape[-1] <= pad:
        raise SovitsError(
            f"a wave of {wave.shape[-1]} samples is too short for a spectrogram with a window of {n_fft} samples: "
            f"at least {pad + 1} are needed"
        )
    # What F.pad(mode="reflect") gives; but the gradient of that has no fixed order of sums on CUDA.
    padded = torch.cat((wave[:, 1 : pad + 1].flip(1), wave, wave[:, -pad - 1 : -1].flip(1)), dim=1)
    window = _window(win_length, wave.dtype, wave.device)
    transform = torch.stft(padded, n_fft, hop_length, win_length, window, center=False, return_complex=True)
    return torch.sqrt(torch.view_as_real(transform).square().sum(-1) + POWER_FLOOR)


def mel_from_spectrogram(
    spec: Tensor, sampling_rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Takes the natural logarithm of the mel bands of a magnitude spectrogram.

    Args:
        spec: tensor (batch, n_fft // 2 + 1, frames) from `spectrogram`.
        sampling_rate, n_fft, n_mels, fmin, fmax: see `mel_filter_bank`.

    Returns:
        Tensor (batch, n_mels, frames), at least ln(1e-5).
    """
    filters = _filters(sampling_rate, n_fft, n_mels, fmin, fmax, spec.dtype, spec.device)
    return torch.log(torch.clamp(torch.matmul(filters, spec), min=MEL_FLOOR))


def read_wave(path: Path, sampling_rate: int) -> Tensor:
    """Reads a sound file in this process, whatever format libsndfile knows.

    Args:
        path: the file.
        sampling_rate: of the result, in Hz. A file of another rate is resampled, several channels are averaged.

    Returns:
        Float32 tensor (n,) in -1 .. 1.

    Raises:
        SovitsError: if the file cannot be read or has no samples.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise SovitsError(f"{path} cannot be read as a sound file ({error}): prepare this clip again") from error
    if not len(samples):
        raise SovitsError(f"{path} has no samples: prepare this clip again")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate != sampling_rate:
        import soxr  # type: ignore[import-not-found, import-untyped, unused-ignore]  # needed for foreign rates only

        mono = soxr.resample(mono, rate, sampling_rate)
    return torch.from_numpy(mono.copy())
