"""Upstream's stage 1 file is read as it is, and what cannot work is refused with a sentence."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1 import read_config
from lastgood_sovits.s1.config import ModelConfig


def content() -> dict[str, Any]:
    """What the interface writes for a v2 experiment."""
    return {
        "train": {
            "seed": 1234,
            "epochs": 15,
            "batch_size": 6,
            "save_every_n_epoch": 5,
            "precision": "16-mixed",
            "gradient_clip": 1.0,
            "if_save_every_weights": True,
            "if_save_latest": False,
            "if_dpo": True,
            "half_weights_save_dir": "GPT_weights_v2",
            "exp_name": "voice",
        },
        "optimizer": {"lr": 0.01, "lr_init": 1e-05, "lr_end": 0.0001, "warmup_steps": 2000, "decay_steps": 40000},
        "data": {"max_eval_sample": 8, "max_sec": 54, "num_workers": 4, "pad_val": 1024},
        "model": {
            "vocab_size": 1025,
            "phoneme_vocab_size": 732,
            "embedding_dim": 512,
            "hidden_dim": 512,
            "head": 16,
            "linear_units": 2048,
            "n_layer": 24,
            "dropout": 0,
            "EOS": 1024,
            "random_bert": 0,
        },
        "inference": {"top_k": 15},
        "pretrained_s1": "pretrained/s1v2.ckpt",
        "train_semantic_path": "logs/voice/6-name2semantic.tsv",
        "train_phoneme_path": "logs/voice/2-name2text.txt",
        "output_dir": "logs/voice/logs_s1_v2",
    }


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.dump(values, default_flow_style=False), encoding="utf-8")
    return path


def test_reads_every_value_that_has_an_effect(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "tmp_s1.yaml", content()))
    assert config.train.epochs == 15 and config.train.if_dpo and not config.train.if_save_latest
    assert config.train.half_weights_save_dir == "GPT_weights_v2" and config.train.exp_name == "voice"
    assert config.clip_batch_size == 3
    assert config.data.max_sec == 54 and config.model == ModelConfig()
    assert config.pretrained_s1 == Path("pretrained/s1v2.ckpt") and config.output_dir == Path("logs/voice/logs_s1_v2")
    assert config.version == "v2" and config.symbols == "v2"
    plain = config.as_plain_values()
    assert plain["model"]["n_layer"] == 24 and plain["output_dir"] == str(Path("logs/voice/logs_s1_v2"))


def test_names_the_keys_without_effect_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = content() | {"new_key": 1}
    with caplog.at_level(logging.INFO):
        config = read_config(write(tmp_path / "c.yaml", values))
    assert set(config.ignored) == {
        "train.gradient_clip", "data.max_eval_sample", "model.linear_units", "model.random_bert", "inference.top_k",
        "optimizer.lr", "optimizer.lr_init", "optimizer.lr_end", "optimizer.warmup_steps", "optimizer.decay_steps",
        "new_key",
    }  # fmt: skip
    assert len(caplog.records) == 1 and all(key in caplog.text for key in config.ignored)


@pytest.mark.parametrize(
    ("output_dir", "phones", "version", "symbols"),
    [
        ("logs/x/logs_s1_v1", 512, "v1", "v1"),
        ("logs/x/logs_s1_v2Pro", 732, "v2Pro", "v2"),
        ("logs/x/logs_s1_v4", 732, "v4", "v2"),
        ("elsewhere", 512, "v1", "v1"),
        ("elsewhere", 732, "v2", "v2"),
    ],
)
def test_knows_the_version(tmp_path: Path, output_dir: str, phones: int, version: str, symbols: str) -> None:
    values = content()
    values["output_dir"] = output_dir
    values["model"]["phoneme_vocab_size"] = phones
    config = read_config(write(tmp_path / "c.yaml", values))
    assert (config.version, config.symbols) == (version, symbols)


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("model", "EOS", 1000, "must be the last of the 1025 codes, 1024"),
        ("model", "embedding_dim", 256, "they must be equal"),
        ("model", "head", 7, "not divisible"),
        ("model", "dropout", 1.5, r"must be in \[0, 1\)"),
        ("model", "n_layer", "many", "model.n_layer is 'many'; it must be a whole number"),
        ("model", "n_layer", 2.5, "must be a whole number"),
        ("train", "epochs", 0, "train.epochs is 0; it must be at least 1"),
        ("train", "precision", "8-bit", 'use "32", "16-mixed"'),
        ("train", "if_dpo", "yes please", "must be true or false"),
        ("data", "max_sec", -1, "must be positive, in seconds"),
        ("data", "num_workers", -1, "must be 0 or more"),
    ],
)
def test_refuses_what_cannot_work_with_a_sentence(
    tmp_path: Path, section: str, key: str, value: Any, sentence: str
) -> None:
    values = content()
    values[section][key] = value
    path = write(tmp_path / "c.yaml", values)
    with pytest.raises(SovitsError, match=sentence) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_refuses_files_that_are_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(SovitsError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")
    with pytest.raises(SovitsError, match="not a YAML mapping"):
        read_config(write(tmp_path / "list.yaml", [1, 2]))
    with pytest.raises(SovitsError, match="Section 'train'"):
        read_config(write(tmp_path / "empty.yaml", {"model": {}}))
    with pytest.raises(SovitsError, match="output_dir is missing"):
        read_config(write(tmp_path / "no_dir.yaml", {k: v for k, v in content().items() if k != "output_dir"}))
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text(f"train: !!python/object/apply:os.mkdir [{str(tmp_path / 'trace')!r}]")
    with pytest.raises(SovitsError, match="cannot be read"):
        read_config(hostile)
    assert not (tmp_path / "trace").exists()


def test_numbers_written_as_text_are_numbers(tmp_path: Path) -> None:
    values = content()
    values["data"]["max_sec"] = "5.4e1"
    values["train"]["batch_size"] = "4"
    config = read_config(write(tmp_path / "c.yaml", values))
    assert config.data.max_sec == 54 and config.train.batch_size == 4


def test_cannot_be_changed_and_takes_keywords_only() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelConfig().head = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(1025)  # type: ignore[misc]
    assert all(f.kw_only for f in fields(ModelConfig))
