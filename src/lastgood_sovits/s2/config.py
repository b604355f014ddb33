"""The configuration of stage 2: upstream's `tmp_s2.json`, read as it is.

Keys that are not known here, among them those that upstream itself never reads, are tolerated and named in one log
line. The fields that upstream fixes in its code (marked "not in upstream's file") may be added to the "model" section,
for small models.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.text import SYMBOL_COUNTS

logger = logging.getLogger(__name__)

VERSIONS = ("v1", "v2", "v2Pro", "v2ProPlus")
PRO_VERSIONS = ("v2Pro", "v2ProPlus")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise SovitsError(sentence)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section "data": the sound format. Lengths are in samples, frequencies in Hz."""

    sampling_rate: int = 32000
    """Rate of the clips in 5-wav32k."""
    filter_length: int = 2048
    """Window of the Fourier transform; the spectrogram has filter_length // 2 + 1 bins."""
    hop_length: int = 640
    """Samples per frame: 50 frames per second."""
    win_length: int = 2048
    """Length of the Hann window."""
    n_mel_channels: int = 128
    """Mel bands of the reconstruction loss."""
    mel_fmin: float = 0.0
    """Lowest mel frequency."""
    mel_fmax: float | None = None
    """Highest mel frequency; null means half the sampling rate."""
    exp_dir: str | None = None
    """The prepared experiment folder, with 2-name2text.txt, 4-cnhubert, 5-wav32k and, for the Pro versions, 7-sv_cn."""
    n_speakers: int = 300
    """Written into weights files; nothing depends on it."""
    max_wav_value: float = 32768.0
    """Written into weights files; nothing depends on it."""

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "filter_length", "hop_length", "win_length", "n_mel_channels"):
            _require(getattr(self, name) > 0, f"data.{name} is {getattr(self, name)}; it must be above 0")
        _require(
            self.hop_length <= self.win_length <= self.filter_length,
            f"data.hop_length {self.hop_length} must be at most data.win_length {self.win_length}, and that at most "
            f"data.filter_length {self.filter_length}",
        )
        top = self.sampling_rate / 2 if self.mel_fmax is None else self.mel_fmax
        _require(0 <= self.mel_fmin < top, f"data.mel_fmin {self.mel_fmin} must be at least 0 and below {top}")

    @property
    def spec_channels(self) -> int:
        """Bins of the linear spectrogram."""
        return self.filter_length // 2 + 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Section "model": the widths and depths of generator and discriminator."""

    version: str = "v2"
    """v1, v2, v2Pro or v2ProPlus."""
    inter_channels: int = 192
    """Width of the latent, even."""
    hidden_channels: int = 192
    """Width of the encoders and of the flow."""
    filter_channels: int = 768
    """Width inside the feed-forward layers."""
    n_heads: int = 2
    """Attention heads of the encoders; a divisor of hidden_channels."""
    n_layers: int = 6
    """Layers of the text encoder; the two content encoders have half as many."""
    kernel_size: int = 3
    """Kernel of the feed-forward convolutions."""
    p_dropout: float = 0.1
    """Dropout in the encoders."""
    resblock: str = "1"
    """Kind of residual block in the vocoder, "1" or "2"."""
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    """One residual block per upsampling stage for each of these odd kernels."""
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    """The dilations in each of these blocks."""
    upsample_rates: tuple[int, ...] = (10, 8, 2, 2, 2)
    """Factors of the upsampling stages; their product is data.hop_length."""
    upsample_initial_channel: int = 512
    """Width before the first stage; halved by each."""
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 8, 2, 2)
    """Kernels of the stages: each exceeds its rate by an even number."""
    gin_channels: int = 512
    """Width of the voice vector."""
    semantic_frame_rate: str = "25hz"
    """"25hz" (one code for two frames) or "50hz"."""
    freeze_quantizer: bool = True
    """Whether ssl_proj and the codebook stay as they were loaded."""
    use_spectral_norm: bool = False
    """Only false is supported."""
    ssl_channels: int = 768
    """Width of the HuBERT features (not in upstream's file)."""
    codebook_size: int = 1024
    """Number of semantic codes (not in upstream's file)."""
    mrte_channels: int = 512
    """Width at which content, text and voice are joined (not in upstream's file)."""
    style_channels: int = 128
    """Width inside the voice encoder, even (not in upstream's file)."""
    style_bins: int = 704
    """Lowest spectrogram bins that the voice encoder reads; v1 reads all (not in upstream's file)."""
    posterior_layers: int = 16
    """Depth of the posterior encoder (not in upstream's file)."""
    flow_couplings: int = 4
    """Couplings in the flow (not in upstream's file)."""
    flow_layers: int = 4
    """Depth of each coupling (not in upstream's file)."""
    sv_channels: int = 20480
    """Width of the speaker vectors in 7-sv_cn (not in upstream's file)."""
    discriminator_channels: int = 1024
    """Width of the widest discriminator layers, a multiple of 64 (not in upstream's file)."""
    discriminator_periods: tuple[int, ...] | None = None
    """Periods of the discriminators; null means those of the version (not in upstream's file)."""

    def __post_init__(self) -> None:
        _require(
            self.version in VERSIONS,
            f'model.version is "{self.version}"; models that can be trained here are {", ".join(VERSIONS)}',
        )
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool):
                _require(value > 0, f"model.{f.name} is {value}; it must be above 0")
        _require(not self.use_spectral_norm, "model.use_spectral_norm is true; only weight normalisation is supported")
        _require(self.inter_channels % 2 == 0, f"model.inter_channels is {self.inter_channels}; the flow halves it")
        _require(self.style_channels % 2 == 0, f"model.style_channels is {self.style_channels}; it has two heads")
        _require(
            self.hidden_channels % self.n_heads == 0,
            f"model.hidden_channels {self.hidden_channels} is no multiple of model.n_heads {self.n_heads}",
        )
        _require(self.mrte_channels % 4 == 0, f"model.mrte_channels is {self.mrte_channels}; it has four heads")
        _require(self.resblock in ("1", "2"), f'model.resblock is "{self.resblock}"; it must be "1" or "2"')
        _require(
            len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes) > 0,
            "model.resblock_kernel_sizes and model.resblock_dilation_sizes must have the same number of entries",
        )
        _require(all(k % 2 for k in self.resblock_kernel_sizes), "model.resblock_kernel_sizes must be odd")
        _require(
            len(self.upsample_rates) == len(self.upsample_kernel_sizes) > 0,
            "model.upsample_rates and model.upsample_kernel_sizes must have the same number of entries",
        )
        _require(
            all(
                k >= r and (k - r) % 2 == 0
                for r, k in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True)
            ),
            "each of model.upsample_kernel_sizes must exceed its rate in model.upsample_rates by 0, 2, 4, ...",
        )
        stages = len(self.upsample_rates)
        _require(
            self.upsample_initial_channel % 2**stages == 0,
            f"model.upsample_initial_channel {self.upsample_initial_channel} cannot be halved {stages} times",
        )
        _require(
            self.semantic_frame_rate in ("25hz", "50hz"),
            f'model.semantic_frame_rate is "{self.semantic_frame_rate}"; it must be "25hz" or "50hz"',
        )
        _require(0 <= self.p_dropout < 1, f"model.p_dropout is {self.p_dropout}; it must be at least 0 and below 1")
        _require(
            self.discriminator_channels % 64 == 0,
            f"model.discriminator_channels is {self.discriminator_channels}; it must be a multiple of 64",
        )
        _require(
            self.is_pro or self.gin_channels == self.mrte_channels,
            f"model.gin_channels {self.gin_channels} must equal model.mrte_channels {self.mrte_channels} in "
            f"{self.version}: the voice is added there as it is",
        )

    @property
    def is_pro(self) -> bool:
        """Whether the model reads speaker vectors."""
        return self.version in PRO_VERSIONS

    @property
    def n_symbols(self) -> int:
        """Rows of the text embedding."""
        return SYMBOL_COUNTS["v1" if self.version == "v1" else "v2"]

    @property
    def periods(self) -> tuple[int, ...]:
        """Periods of the discriminators."""
        if self.discriminator_periods is not None:
            return self.discriminator_periods
        return (2, 3, 5, 7, 11, 17, 23) if self.is_pro else (2, 3, 5, 7, 11)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section "train": how long, how fast, and what is kept."""

    epochs: int = 100
    """Epochs to train in total."""
    batch_size: int = 32
    """Clips per rank and step."""
    learning_rate: float = 1e-4
    """Before the first decay."""
    betas: tuple[float, float] = (0.8, 0.99)
    """Of AdamW."""
    eps: float = 1e-9
    """Of AdamW."""
    lr_decay: float = 0.999875
    """Factor of the learning rate per epoch; epoch 1 already has it once."""
    text_low_lr_rate: float = 0.4
    """Factor of the learning rate of text embedding, text encoder and text-content mixer."""
    segment_size: int = 20480
    """Samples that are generated and judged per clip; a multiple of data.hop_length."""
    c_mel: float = 45.0
    """Weight of the mel loss."""
    c_kl: float = 1.0
    """Weight of the Kullback-Leibler loss."""
    fp16_run: bool = True
    """Mixed precision, on CUDA only."""
    seed: int = 1234
    """Of the random numbers."""
    log_interval: int = 100
    """Steps between two log lines."""
    save_every_epoch: int = 4
    """Epochs between two exports of weights."""
    if_save_latest: bool = True
    """Upstream's wish to keep only the newest checkpoint."""
    if_save_every_weights: bool = True
    """Whether weights are exported at all."""
    pretrained_s2G: str = ""
    """Generator weights to start from; empty for none."""
    pretrained_s2D: str = ""
    """Discriminator weights to start from; empty for none."""
    gpu_numbers: str = "0"
    """Devices, in upstream's form "0-1"."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "segment_size", "log_interval", "save_every_epoch"):
            _require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be above 0")
        _require(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}; it must be above 0")
        _require(0 < self.lr_decay <= 1, f"train.lr_decay is {self.lr_decay}; it must be above 0 and at most 1")
        _require(
            self.text_low_lr_rate >= 0, f"train.text_low_lr_rate is {self.text_low_lr_rate}; it must not be negative"
        )
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"train.betas is {self.betas}; two numbers, each at least 0 and below 1, are needed",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole file."""

    data: DataConfig = field(default_factory=DataConfig)
    """Sound format and experiment folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Widths and depths."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""
    name: str = ""
    """Name of the experiment, from which exported weights are named."""
    s2_ckpt_dir: str | None = None
    """Folder of the checkpoints; upstream's page sets it to the experiment folder."""
    save_weight_dir: str | None = None
    """Folder of the exported weights."""

    def __post_init__(self) -> None:
        product = 1
        for rate in self.model.upsample_rates:
            product *= rate
        _require(
            product == self.data.hop_length,
            f"the product of model.upsample_rates is {product}; it must equal data.hop_length {self.data.hop_length}",
        )
        _require(
            self.train.segment_size % self.data.hop_length == 0,
            f"train.segment_size {self.train.segment_size} is no multiple of data.hop_length {self.data.hop_length}",
        )

    @property
    def segment_frames(self) -> int:
        """Frames that are generated and judged per clip."""
        return self.train.segment_size // self.data.hop_length


T = TypeVar("T", DataConfig, ModelConfig, TrainConfig, Config)


def _converted(where: str, value: Any, default: Any) -> Any:
    """Gives a JSON value the type of the field's default, where that loses nothing."""
    kind: type
    if isinstance(value, list) and (isinstance(default, tuple) or default is None):
        item_default = default[0] if default else None
        return tuple(_converted(where, item, item_default) for item in value)
    if default is None or default is MISSING or value is None:
        return value
    if isinstance(default, tuple) or isinstance(value, list | dict):
        good, kind = False, tuple
    elif isinstance(default, bool) or isinstance(value, bool):
        good = isinstance(default, bool) and (isinstance(value, bool) or value in (0, 1))
        kind = bool
    elif isinstance(default, str):
        good, kind = isinstance(value, str | int), str
    elif isinstance(default, float):
        good, kind = isinstance(value, int | float), float
    else:
        # The web page writes numbers that a slider returned as 4.0.
        good, kind = isinstance(value, int | float) and float(value).is_integer(), int
    _require(good, f"{where} is {value!r}; {_article(type(default).__name__)} is needed")
    return kind(value)


def _article(name: str) -> str:
    return {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}.get(
        name, "a list of the right kind"
    )


def _section(kind: type[T], values: Mapping[str, Any], prefix: str, ignored: list[str]) -> T:
    known = {f.name: f for f in fields(kind)}
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            ignored.append(f"{prefix}{key}")
        elif not (value is None and known[key].default not in (None, MISSING)):  # null means the default
            taken[key] = _converted(f"{prefix}{key}", value, known[key].default)
    return kind(**taken)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Builds the configuration from the content of upstream's file.

    Args:
        values: the sections "train", "data" and "model", and the names at the top, as parsed from JSON.

    Returns:
        The configuration; what the file does not say has upstream's default.

    Raises:
        SovitsError: if a value cannot be used; the message names the key.
    """
    ignored: list[str] = []
    sections: dict[str, Any] = {}
    for name, kind in (("data", DataConfig), ("model", ModelConfig), ("train", TrainConfig)):
        section = values.get(name, {})
        _require(isinstance(section, Mapping), f'section "{name}" must hold keys and values')
        sections[name] = _section(kind, section, f"{name}.", ignored)  # type: ignore[type-var]
    rest = {key: value for key, value in values.items() if key not in sections}
    top = _section(Config, rest, "", ignored)
    if ignored:
        logger.info("configuration keys without effect: %s", ", ".join(sorted(ignored)))
    return Config(**sections, name=top.name, s2_ckpt_dir=top.s2_ckpt_dir, save_weight_dir=top.save_weight_dir)


def read_config(path: Path) -> Config:
    """Reads upstream's JSON file (see `parse_config`).

    Raises:
        SovitsError: if the file is missing or is no JSON, or a value cannot be used.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SovitsError(f"{path} does not exist: give the configuration file of stage 2 (tmp_s2.json)") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SovitsError(f"{path} is no JSON file ({error})") from error
    _require(isinstance(values, dict), f'{path} must hold the sections "train", "data" and "model"')
    return parse_config(values)
