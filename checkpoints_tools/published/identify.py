"""Which published checkpoint a file is, told from the names and shapes of its tensors alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..keymaps_dit import WAN_DIFFUSERS
from ..lora_names import FACTORS, Names, split_ending, without_prefix
from .catalogue import CATALOGUE, TIED, Published
from .rows import Shape

ENOUGH = 0.5  # share of the names that must agree


@dataclass(frozen=True)
class Match:
    """The likest checkpoint and how a file differs from it, in the file's names where it has them."""

    published: Published
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)


@dataclass(frozen=True)
class Adapters:
    """A LoRA that is none of the catalogue: layers, largest rank, and the transformers whose layers it fits."""

    layers: int
    rank: int
    fits: tuple[str, ...]


def identify(shapes: Mapping[str, Shape]) -> Match | Adapters | None:
    """The likest checkpoint of `CATALOGUE`; `Adapters` for another LoRA; None when nothing is like it."""
    best, score = None, 0.0
    for published in CATALOGUE:
        named = {c: shape for name, shape in shapes.items() if (c := published.canonical(name)) is not None}
        both = named.keys() & published.shapes.keys()
        union = len(named.keys() | published.shapes.keys())
        equal = sum(named[name] == published.shapes[name] for name in both)
        # shapes decide; names alone when no shape agrees, for a model of another size
        if union and len(both) / union >= ENOUGH and (equal + 0.1 * len(both)) / union > score:
            best, score = published, (equal + 0.1 * len(both)) / union
    return compare(best, shapes) if best else _adapters(shapes)


def compare(published: Published, shapes: Mapping[str, Shape]) -> Match:
    """How a file differs from a checkpoint."""
    named: dict[str, str] = {}
    twice = []
    for name in shapes:
        canonical = published.canonical(name)
        if canonical in named and published.aliases is not TIED:
            twice.append(name)
        elif canonical is not None:
            named.setdefault(canonical, name)
    wanted = published.shapes
    missing = tuple(name for name in wanted if name not in named and name not in published.optional)
    unexpected = (*(name for canonical, name in named.items() if canonical not in wanted), *twice)
    misshaped = tuple(
        f"{name} {list(shapes[name])}, expected {list(wanted[canonical])}"
        for canonical, name in named.items()
        if canonical in wanted and shapes[name] != wanted[canonical]
    )
    return Match(published, missing, unexpected, misshaped)


def _adapters(shapes: Mapping[str, Shape]) -> Adapters | None:
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and (found := split_ending(without_prefix(name), FACTORS)):
            layers.setdefault(found[0], {})[found[1]] = shape
    if not layers or len(layers) < ENOUGH * len(shapes) / 3:  # two factors and a scale a layer
        return None
    pairs = {layer: (sides["B"][0], sides["A"][1]) for layer, sides in layers.items() if len(sides) == 2}
    fits = []
    for published in CATALOGUE:
        if published.part != "transformer" or published.name.endswith("in diffusers"):
            continue
        names = Names(published.shapes, WAN_DIFFUSERS)
        found_names = {layer: names.find(f"{layer}.weight") for layer in pairs}
        if pairs and all(ours and published.shapes[ours][:2] == pairs[layer] for layer, ours in found_names.items()):
            fits.append(published.name)
    rank = max((sides["A"][0] for sides in layers.values() if "A" in sides), default=0)
    return Adapters(len(layers), rank, tuple(fits))
