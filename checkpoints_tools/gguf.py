"""A diffusion transformer as one GGUF file, bfloat16 or Q8_0, through the `gguf` package.

Tensors keep their published names. Matrices are BF16, or Q8_0: blocks of 32 values along a row, each with one float16
scale, max |x| / 127. Vectors (biases, norms) and modulation tables are F32; embeddings, convolutions, the layers named
in `keep` and rows that are no whole blocks are BF16. GGUF knows at most four axes, so a tensor with more is written as
a matrix [out, rest], and its shape as an INT32 array under "comfy.gguf.orig_shape.<name>", where ComfyUI-GGUF reads it.

Metadata: "general.architecture" (the keys of sizes begin with it), "general.name", "general.file_type",
"general.quantization_version", and the whole configuration as JSON under "kinora.config".
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.quantize import LIVEAVATAR_IGNORE, Fp8Linear

Type = Literal["bf16", "q8_0"]
TYPES: tuple[Type, ...] = ("bf16", "q8_0")
BLOCK = 32  # values of a row that share a scale in Q8_0
AXES = 4  # what the format's readers take
LONGEST_NAME = 63  # likewise


def storage(name: str, shape: torch.Size, kind: Type, keep: tuple[str, ...]) -> str:
    """How a tensor is stored: "F32", "BF16" or "Q8_0"."""
    module, _, parameter = name.rpartition(".")
    if len(shape) < 2 or parameter != "weight":
        return "F32"
    kept = "embedding" in module or any(module == word or module.startswith(f"{word}.") for word in keep)
    plain = len(shape) == 2 and shape[1] % BLOCK == 0 and not kept and "mask" not in module
    return "Q8_0" if kind == "q8_0" and plain else "BF16"


def write_gguf(
    state: Mapping[str, Tensor],
    path: Path,
    kind: Type,
    *,
    architecture: str,
    name: str,
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    keep: tuple[str, ...] = (),
) -> dict[str, int]:
    """Write a state dict tensor by tensor, so that no more than one is in memory twice; how many were stored how.

    `architecture` as other readers know it ("wan"); `sizes`: "block_count", "embedding_length", ...; `config`: what
    JSON holds; `keep`: layers that stay BF16 in Q8_0, with everything below them.
    Errors: ValueError for an unknown type or a name that is too long; ImportError without the package `gguf`.
    """
    import gguf

    if kind not in TYPES:
        raise ValueError(f"type {kind!r} is not known; use one of {', '.join(TYPES)}")
    unfinished = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(unfinished, architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, size in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", size)
    writer.add_string("kinora.config", json.dumps(dict(config)))
    types = {key: gguf.GGMLQuantizationType[storage(key, value.shape, kind, keep)] for key, value in state.items()}
    for key, value in state.items():
        if len(key) > LONGEST_NAME:
            raise ValueError(f"{key} has {len(key)} letters; GGUF holds names of at most {LONGEST_NAME}")
        shape = _at_most_four_axes(value).shape
        if shape != value.shape:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
        block, width = gguf.GGML_QUANT_SIZES[types[key]]
        # only the raw type tells what the values are: the dtype given beside it must be no integer of one byte
        writer.add_tensor_info(key, shape, np.dtype(np.float32), value.numel() // block * width, types[key])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, value in state.items():
            writer.write_tensor_data(_stored(value, types[key].name))
        writer.close()
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    found = [kind.name for kind in types.values()]
    return {word: found.count(word) for word in sorted(set(found))}


def write_transformer(dit: LiveAvatar, path: Path, kind: Type, name: str) -> dict[str, int]:
    """`write_gguf` of a LiveAvatar transformer, called `name` in the file."""
    if any(isinstance(module, Fp8Linear) for module in dit.modules()):
        raise ValueError("this transformer is in FP8, which GGUF does not hold; export it from its bfloat16 weights")
    config = dit.config
    sizes = {
        "block_count": config.num_layers,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
    }
    values = asdict(config) | {"rope_dtype": str(config.rope_dtype).removeprefix("torch.")}
    return write_gguf(
        dit.state_dict(), path, kind, architecture="wan", name=name, sizes=sizes, config=values, keep=LIVEAVATAR_IGNORE
    )


def _at_most_four_axes(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > AXES else value


def _stored(value: Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor in its storage type."""
    import gguf

    value = value.detach().cpu().contiguous()
    if kind == "F32":
        return value.float().numpy()
    if kind == "BF16":
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    return gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
