"""Where the tensors of a bundle's file lie, and in which order a model reads its weights.

A safetensors file must have no holes, so that space between tensors is a tensor too: `__pad.0`, `__pad.1`, ... of bytes
that are zero. The header is padded with spaces, which the format allows, until the data begin on a page.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .format import ALIGNMENT, BY_TORCH, PAGE, PAGED, BundleError

PAD = "__pad."
PART_KEY = "kinora_part"  # of a file's `__metadata__`
SCALE_ENDING = "_descale"  # `x.weight_descale` holds the scales of `x.weight`


@dataclass(frozen=True)
class Place:
    """A tensor of a file: its bytes begin at `offset` of the data."""

    key: str
    tensor: Tensor
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.tensor.nbytes


def place_tensors(tensors: Mapping[str, Tensor]) -> list[Place]:
    """Places in the order given. Raises BundleError for a dtype that a bundle does not know and for a reserved name."""
    places: list[Place] = []
    end = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in BY_TORCH:
            raise BundleError(f"{key} has dtype {tensor.dtype}, which a bundle cannot hold")
        if key.startswith("__") or not all(0x21 <= ord(c) <= 0x7E for c in key):
            raise BundleError(f"{key!r} cannot be a name in a bundle: printable ASCII that does not begin with __")
        step = PAGE if tensor.nbytes >= PAGED else ALIGNMENT
        places.append(Place(key, tensor, -(-end // step) * step))
        end = places[-1].end
    return places


def safetensors_header(places: Sequence[Place], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of the file: length, JSON, and spaces up to a whole page."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = pads = 0
    for place in places:
        if place.offset > end:
            gap = [end, place.offset]
            entries[f"{PAD}{pads}"] = {"dtype": "U8", "shape": [place.offset - end], "data_offsets": gap}
            pads += 1
        end = place.end
        dtype, shape = BY_TORCH[place.tensor.dtype].name, list(place.tensor.shape)
        entries[place.key] = {"dtype": dtype, "shape": shape, "data_offsets": [place.offset, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // PAGE) * PAGE - 8)
    return len(text).to_bytes(8, "little") + text


BLOCK = re.compile(r"blocks\.(\d+)\.")
INJECTOR = re.compile(r"audio_injector\.\w+\.(\d+)\.")
FRONT = ("text_embedding.", "time_", "trainable_cond_mask.", "frame_packer.", "casual_audio_encoder.")
INPUT = ("patch_embedding.", "cond_encoder.")


def execution_order(names: Iterable[str], inject_layers: Sequence[int]) -> list[str]:
    """Names of LiveAvatar's weights as a denoising step reads them.

    First what is read once per prompt, noise level, picture or piece of sound, then the patch embeddings, then each
    block with the audio injector behind it (`inject_layers`: after which block), then the head.
    """
    layers = sorted(inject_layers)

    def stage(name: str) -> tuple[int, int, int]:
        if name.startswith(FRONT):
            return 0, 0, 0
        if name.startswith(INPUT):
            return 1, 0, 0
        if found := BLOCK.match(name):
            return 2, int(found[1]), 0
        if found := INJECTOR.match(name):
            return 2, layers[int(found[1])], 1
        return 3, 0, 0

    return sorted(names, key=stage)  # stable: within a stage as the model lists them
