"""Deterministic weights and inputs for the golden tests. Needs numpy and torch only.

Every value comes from the raw 64-bit stream of PCG64(crc32(name)) and + - * / sqrt in float64, then one
rounding to float32: equal bits on every platform (sin in "wave" and pow in inv_freq: equal up to libm)."""

import zlib

import numpy as np
import torch

GAIN = (
    ("ar_predict_layer.weight", 3.0),
    ("in_proj_weight", 2.0),
    ("out_proj.weight", 0.1),
    ("linear2.weight", 0.2),
    ("enc_p.proj.weight", 0.2),
    ("enc_q.proj.weight", 0.2),
    ("dec.conv_post.weight", 0.15),
)  # moderate outputs


def raw53(name, n):
    return np.random.PCG64(zlib.crc32(name.encode("utf-8"))).random_raw(int(n)) >> np.uint64(11)


def unit(name, n):  # uniform in (-sqrt 3, sqrt 3): mean 0, variance 1
    return (raw53(name, n).astype(np.float64) * 2.0**-52 - 1.0) * np.sqrt(3.0)


def fill_array(name, shape):
    n, last = int(np.prod(shape)), name.rsplit(".", 1)[-1]
    if last in ("inited", "cluster_size"):
        v = np.ones(n)
    elif last == "embed_avg":  # the running average equals the codebook
        return fill_array(name[: -len("_avg")], shape)
    elif last == "inv_freq":  # rotary table: theta_i = 10000^(-i/n), i = 0..n-1
        v = 10000.0 ** (-np.arange(n, dtype=np.float64) / n)
    elif name.endswith("prelu.weight"):
        v = 0.25 + 0.05 * unit(name, n)
    elif last == "weight_g":  # row lengths; weight_v below has rows of length about 1
        v = (2.0 if ".ups." in name else 1.0) * (1.0 + 0.1 * unit(name, n))
    elif last in ("alpha", "gamma") or (last == "weight" and len(shape) == 1):  # norm-like gains
        v = 1.0 + 0.1 * unit(name, n)
    elif last.endswith(("bias", "beta")):
        v = 0.1 * unit(name, n)
    elif last == "embed" or "embedding" in name:
        v = unit(name, n)
    else:  # linear and convolution kernels, weight_v, relative position tables
        v = unit(name, n) * (next((g for s, g in GAIN if name.endswith(s)), 1.0) / np.sqrt(float(n // shape[0])))
    return v.astype(np.float32).reshape(shape)


def fill_state_dict(shapes, dtypes=None):
    kind = {k: getattr(torch, d) if isinstance(d, str) else d for k, d in (dtypes or {}).items()}
    return {k: torch.from_numpy(fill_array(k, s)).to(kind.get(k, torch.float32)) for k, s in shapes.items()}


def fixed_input(name, shape, kind="unit"):
    """kind: unit (mean 0, variance 1), pos (uniform 0..1), int:N (0..N-1, int64), wave:SR (shape (..., n))."""
    n = int(np.prod(shape))
    if kind.startswith("int:"):
        return torch.from_numpy((raw53(name, n) % np.uint64(int(kind[4:]))).astype(np.int64).reshape(shape))
    if kind.startswith("wave:"):  # two sines, a chirp 100..8000 Hz over 1 s, and 1 % noise
        t = np.arange(shape[-1], dtype=np.float64) / float(kind[5:])
        w = 0.25 * np.sin(2 * np.pi * 220.0 * t) + 0.15 * np.sin(2 * np.pi * 1234.5 * t + 0.5)
        w = np.broadcast_to(w + 0.2 * np.sin(2 * np.pi * (100.0 * t + 3950.0 * t * t)), shape)
        return torch.from_numpy((w + 0.01 * unit(name, n).reshape(shape)).astype(np.float32))
    v = raw53(name, n).astype(np.float64) * 2.0**-53 if kind == "pos" else unit(name, n)
    return torch.from_numpy(v.astype(np.float32).reshape(shape))
