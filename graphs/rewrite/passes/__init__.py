"""The passes: each takes a `Program`, changes its graph, and returns a `Report` of what it matched.

None changes a float32 result beyond rounding, except `quantise`, whose point it is to round.
"""

from .clean import clean
from .concatenate import concatenate
from .emit import emit, share
from .fold import fold
from .fuse import fuse
from .lift import lift
from .quantise import quantise

__all__ = ["clean", "concatenate", "emit", "fold", "fuse", "lift", "quantise", "share"]
