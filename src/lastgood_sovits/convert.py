"""From one weights file to another: plain values instead of pickled classes, safetensors, with or without a header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors.torch import save

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.weights import METADATA, Weights, read_weights
from lastgood_sovits.weights_write import ReplaceFile, mark_of, write_content

Header = Literal["upstream", "always", "never"]


def convert(
    source: str | Path, target: str | Path, *, header: Header = "upstream", replace_file: ReplaceFile
) -> Weights:
    """Writes the weights in `source` to `target`, with every tensor as it is, and gives back what was read.

    `target` ends in .safetensors (configuration and version go into its metadata) or in .pth or .ckpt. `header` is for
    .pth: "upstream" keeps PK wherever upstream tells the version right, "always" names it, "never" leaves PK, for
    tools that open the file with plain torch.load. Raises `SovitsError` for resume files and checkpoints, whose
    optimizer no weights file can hold, and for another ending.
    """
    weights = read_weights(source)
    if weights.kind not in ("s1", "s2", "s2D"):
        raise SovitsError(f"{source}: {weights.kind}: only weights can be converted, not the state of a training run")
    content: dict[str, Any] = {"config": weights.config, "info": weights.info}
    if weights.lora_rank is not None:
        content["lora_rank"] = weights.lora_rank
    target = Path(target)
    if target.suffix == ".safetensors":
        _write_safetensors(target, weights, content, replace_file)
    elif target.suffix in (".pth", ".ckpt"):
        mark = None
        if weights.kind == "s2" and header != "never":
            if weights.version is None:
                raise SovitsError(f"{source}: its version cannot be told from its content; convert with --header never")
            mark = mark_of(weights.version, any(".lora_A." in name for name in weights.tensors))
        write_content(target, weights.tensors, content, mark=mark, replace_file=replace_file, header=header)
    else:
        raise SovitsError(f"{target}: the ending says the format: .safetensors, .pth or .ckpt")
    return weights


def _write_safetensors(target: Path, weights: Weights, content: dict[str, Any], replace_file: ReplaceFile) -> None:
    try:
        metadata = {"format": "pt", METADATA: json.dumps(content, ensure_ascii=False)}
    except TypeError as error:
        raise SovitsError(f"its config cannot be written as JSON: {error}") from error
    # safetensors refuses tensors that share memory or have gaps.
    data = save({name: tensor.contiguous().clone() for name, tensor in weights.tensors.items()}, metadata)

    def write(file: BinaryIO) -> None:
        file.write(data)

    replace_file(target, write)
