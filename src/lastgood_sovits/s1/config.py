"""The stage 1 configuration: GPT-SoVITS's own YAML file, read as it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from lastgood_sovits.errors import SovitsError

logger = logging.getLogger(__name__)

Precision = Literal["32", "16-mixed", "bf16-mixed"]


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise SovitsError(sentence)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section `train`."""

    seed: int = 1234
    """Seed of weights and dropout. The order of the data does not depend on it."""
    epochs: int = 20
    """Passes over the data, in all."""
    batch_size: int = 8
    """Clips per rank and micro-batch; halved by `if_dpo` and limited by the number of clips."""
    save_every_n_epoch: int = 1
    """Epochs from one export of weights to the next."""
    precision: Precision = "16-mixed"
    """"32", or automatic mixed precision where the device has it."""
    if_save_latest: bool = True
    """Keep only the newest checkpoint."""
    if_save_every_weights: bool = True
    """Export half-precision weights at every save."""
    if_dpo: bool = False
    """Add the preference loss, against randomly corrupted sequences."""
    half_weights_save_dir: str = "GPT_weights"
    """Directory of the exported weights."""
    exp_name: str = "experiment"
    """First part of the exported files' names."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every_n_epoch"):
            _check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        _check(
            self.precision in ("32", "16-mixed", "bf16-mixed"),
            f'train.precision is {self.precision!r}; use "32", "16-mixed" or "bf16-mixed".',
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section `data`."""

    max_sec: float = 54
    """Longest clip, in seconds; longer ones are dropped."""
    num_workers: int = 4
    """Processes that load clips, per rank."""
    pad_val: int = 1024
    """Code written into padding. Nothing reads it."""

    def __post_init__(self) -> None:
        _check(self.max_sec > 0, f"data.max_sec is {self.max_sec}; it must be positive, in seconds.")
        _check(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Section `model`: the sizes of the network."""

    vocab_size: int = 1025
    """Semantic codes and the end code."""
    phoneme_vocab_size: int = 732
    """Rows of the phone table: 732, or 512 for v1 (of which 322 are used)."""
    embedding_dim: int = 512
    """Width of the embeddings; must equal `hidden_dim`."""
    hidden_dim: int = 512
    """Width of the layers; the feed-forward is four times as wide."""
    head: int = 16
    """Attention heads; must divide `hidden_dim`."""
    n_layer: int = 24
    """Layers."""
    dropout: float = 0.0
    """Of the token embeddings only; positions and layers always use 0.1."""
    EOS: int = 1024
    """The end code: the last of `vocab_size`."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "phoneme_vocab_size", "hidden_dim", "head", "n_layer"):
            _check(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        _check(
            self.embedding_dim == self.hidden_dim,
            f"model.embedding_dim {self.embedding_dim} differs from model.hidden_dim {self.hidden_dim}; "
            "the network has no projection between them, so they must be equal.",
        )
        _check(
            self.hidden_dim % self.head == 0,
            f"model.hidden_dim {self.hidden_dim} is not divisible by model.head {self.head}.",
        )
        _check(self.hidden_dim % 2 == 0, f"model.hidden_dim {self.hidden_dim} is odd; sines and cosines come in pairs.")
        _check(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1).")
        _check(
            self.vocab_size - 1 == self.EOS,
            f"model.EOS is {self.EOS}; it must be the last of the {self.vocab_size} codes, {self.vocab_size - 1}.",
        )

    @property
    def eos(self) -> int:
        return self.EOS


@dataclass(frozen=True, kw_only=True)
class S1Config:
    """The whole file."""

    train: TrainConfig
    """Section `train`."""
    data: DataConfig
    """Section `data`."""
    model: ModelConfig
    """Section `model`."""
    train_semantic_path: Path
    """6-name2semantic.tsv of the experiment."""
    train_phoneme_path: Path
    """2-name2text.txt of the experiment; 3-bert is beside it."""
    output_dir: Path
    """Where the run and its logs go; upstream calls it logs_s1_<version>."""
    pretrained_s1: Path | None = None
    """Weights to start from, or None to start from scratch."""
    ignored: tuple[str, ...] = ()
    """Keys of the file that change nothing here, such as `optimizer.lr` (upstream locks the learning rate too)."""

    @property
    def version(self) -> str:
        """The version that `output_dir` names ("v1", "v2Pro", ...); else "v2" for 732 phones and "v1" for fewer."""
        named = re.fullmatch(r"logs_s1_(v\w+)", self.output_dir.name)
        return named.group(1) if named else "v2" if self.model.phoneme_vocab_size >= 732 else "v1"

    @property
    def symbols(self) -> Literal["v1", "v2"]:
        """Which phone table the clips are in; the v2 table serves every version but v1."""
        return "v1" if self.version == "v1" else "v2"

    @property
    def clip_batch_size(self) -> int:
        """`train.batch_size`, halved with the preference loss, whose every clip is two sequences."""
        return max(self.train.batch_size // 2, 1) if self.train.if_dpo else self.train.batch_size

    def as_plain_values(self) -> dict[str, Any]:
        """Plain nested values, as an exported weights file carries them."""

        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return str(value)
            if hasattr(value, "__dataclass_fields__"):
                return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name != "ignored"}
            return value

        values: dict[str, Any] = plain(self)
        return values


T = TypeVar("T")


def _section(kind: type[T], name: str, values: Any, ignored: list[str]) -> T:
    _check(isinstance(values, Mapping), f"Section {name!r} of the stage 1 configuration is missing or not a mapping.")
    hints = get_type_hints(kind)
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key in hints:
            taken[key] = _convert(hints[key], value, f"{name}.{key}")
        else:
            ignored.append(f"{name}.{key}")
    return kind(**taken)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`. YAML reads 1e-5 as text and a quoted number as text; both are meant as numbers."""
    if kind is bool:
        _check(isinstance(value, bool), f"{name} is {value!r}; it must be true or false.")
        return value
    if kind in (int, float):
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        same = number is not None and not isinstance(value, bool) and float(number) == float(value)
        _check(same, f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}.")
        return number
    return str(value)


def read_config(path: Path | str) -> S1Config:
    """Reads a stage 1 configuration as the GPT-SoVITS interface writes it (TEMP/tmp_s1.yaml).

    Keys that change nothing are tolerated, kept in `ignored`, and named in one log line. Raises SovitsError, with a
    sentence, when the file is missing, is no YAML mapping, lacks a path, or holds a value that cannot work.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SovitsError(f"The stage 1 configuration {path} cannot be read: {error}") from error
    _check(isinstance(content, Mapping), f"The stage 1 configuration {path} is not a YAML mapping.")
    ignored: list[str] = []
    try:
        config = _from_mapping(content, ignored)
    except SovitsError as error:
        raise SovitsError(f"{path}: {error}") from error.__cause__
    if ignored:
        logger.info("%s: without effect here: %s", path, ", ".join(ignored))
    return config


def _from_mapping(content: Mapping[str, Any], ignored: list[str]) -> S1Config:
    train = _section(TrainConfig, "train", content.get("train"), ignored)
    data = _section(DataConfig, "data", content.get("data"), ignored)
    model = _section(ModelConfig, "model", content.get("model"), ignored)
    paths = {}
    for name in ("train_semantic_path", "train_phoneme_path", "output_dir"):
        value = content.get(name)
        _check(isinstance(value, str) and value != "", f"{name} is missing; the GPT-SoVITS interface writes it.")
        paths[name] = Path(str(value))
    known = {"train", "data", "model", "pretrained_s1", *paths}
    for key, value in content.items():
        if key not in known:
            ignored.extend(f"{key}.{inner}" for inner in value) if isinstance(value, Mapping) else ignored.append(key)
    pretrained = content.get("pretrained_s1")
    return S1Config(
        train=train,
        data=data,
        model=model,
        pretrained_s1=Path(str(pretrained)) if pretrained else None,
        ignored=tuple(ignored),
        **paths,
    )
