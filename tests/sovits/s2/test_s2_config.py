"""Upstream's configuration file, read as it is; and values that cannot work, refused with a sentence."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from s2_reference import published_config

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.config import Config, DataConfig, ModelConfig, TrainConfig, parse_config, read_config


def web_file(version: str = "v2Pro") -> dict[str, Any]:
    """What upstream's web page writes, with its names and types."""
    return {
        "train": {
            "log_interval": 100, "eval_interval": 500, "seed": 1234, "epochs": 8, "learning_rate": 0.0001,
            "betas": [0.8, 0.99], "eps": 1e-09, "batch_size": 12, "fp16_run": True, "lr_decay": 0.999875,
            "segment_size": 20480, "init_lr_ratio": 1, "warmup_epochs": 0, "c_mel": 45, "c_kl": 1.0,
            "text_low_lr_rate": 0.4, "grad_ckpt": False, "pretrained_s2G": "G.pth", "pretrained_s2D": "D.pth",
            "if_save_latest": True, "if_save_every_weights": True, "save_every_epoch": 4, "gpu_numbers": "0-1",
            "lora_rank": "32",
        },
        "data": {
            "max_wav_value": 32768.0, "sampling_rate": 32000, "filter_length": 2048, "hop_length": 640,
            "win_length": 2048, "n_mel_channels": 128, "mel_fmin": 0.0, "mel_fmax": None, "add_blank": True,
            "n_speakers": 300, "cleaned_text": True, "exp_dir": "logs/voice",
        },
        "model": {
            "inter_channels": 192, "hidden_channels": 192, "filter_channels": 768, "n_heads": 2, "n_layers": 6,
            "kernel_size": 3, "p_dropout": 0.0, "resblock": "1", "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "upsample_rates": [10, 8, 2, 2, 2],
            "upsample_initial_channel": 512, "upsample_kernel_sizes": [16, 16, 8, 2, 2], "n_layers_q": 3,
            "use_spectral_norm": False, "gin_channels": 1024, "semantic_frame_rate": "25hz",
            "freeze_quantizer": True, "version": version,
        },
        "s2_ckpt_dir": "logs/voice", "content_module": "cnhubert", "save_weight_dir": "SoVITS_weights_v2Pro",
        "name": "voice", "version": version,
    }  # fmt: skip


def test_upstreams_file_is_read_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tmp_s2.json"
    path.write_text(json.dumps(web_file()), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        config = read_config(path)
    assert config.model == published_config("v2Pro").model
    assert config.data == DataConfig(exp_dir="logs/voice")
    assert config.train.epochs == 8 and config.train.c_mel == 45.0 and config.train.betas == (0.8, 0.99)
    assert config.train.pretrained_s2G == "G.pth" and config.train.gpu_numbers == "0-1"
    assert (config.name, config.save_weight_dir, config.segment_frames) == ("voice", "SoVITS_weights_v2Pro", 32)
    (record,) = caplog.records
    for key in ("train.eval_interval", "model.n_layers_q", "data.add_blank", "content_module", "version"):
        assert key in record.message


def test_an_empty_file_has_upstreams_defaults() -> None:
    assert parse_config({}) == Config(data=DataConfig(), model=ModelConfig(), train=TrainConfig())


def test_numbers_from_a_slider_and_null_are_understood() -> None:
    config = parse_config({"train": {"batch_size": 4.0, "pretrained_s2G": None, "fp16_run": 0}})
    assert config.train.batch_size == 4 and config.train.pretrained_s2G == "" and config.train.fp16_run is False


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("train", "batch_size", 0, "train.batch_size is 0; it must be above 0"),
        ("train", "batch_size", 2.5, "train.batch_size is 2.5; a whole number is needed"),
        ("train", "batch_size", "4", "train.batch_size is '4'; a whole number is needed"),
        ("train", "betas", [0.8], "train.betas"),
        ("train", "betas", 0.8, "train.betas is 0.8; a list of the right kind is needed"),
        ("train", "epochs", [3], "train.epochs is [3]; a whole number is needed"),
        ("train", "epochs", float("inf"), "a whole number is needed"),
        ("model", "upsample_rates", ["10"], "model.upsample_rates is '10'; a whole number is needed"),
        ("model", "resblock_dilation_sizes", [1, 3, 5], "model.resblock_dilation_sizes is 1; a list"),
        ("train", "segment_size", 20000, "no multiple of data.hop_length"),
        ("train", "lr_decay", 1.5, "train.lr_decay is 1.5"),
        ("model", "version", "v3", 'model.version is "v3"; models that can be trained here are v1, v2'),
        ("model", "use_spectral_norm", True, "only weight normalisation"),
        ("model", "upsample_rates", [10, 8, 2, 2, 4], "model.upsample_kernel_sizes must exceed"),
        ("model", "upsample_rates", [8, 8, 2, 2, 2], "must equal data.hop_length 640"),
        ("model", "n_heads", 5, "no multiple of model.n_heads 5"),
        ("model", "gin_channels", 256, "model.gin_channels 256 must equal model.mrte_channels 512"),
        ("model", "discriminator_channels", 100, "a multiple of 64"),
        ("data", "win_length", 4096, "must be at most data.win_length 4096"),
        ("data", "mel_fmin", 20000, "data.mel_fmin"),
    ],
)
def test_a_value_that_cannot_work_is_refused(section: str, key: str, value: Any, sentence: str) -> None:
    file = web_file("v2")
    file["model"]["gin_channels"] = 512
    file[section][key] = value
    with pytest.raises(SovitsError) as error:
        parse_config(file)
    assert sentence in str(error.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SovitsError, match="does not exist"):
        read_config(tmp_path / "absent.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SovitsError, match="is no JSON"):
        read_config(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SovitsError, match="sections"):
        read_config(tmp_path / "a.json")
