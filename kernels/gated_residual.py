"""Gated residual sum: x + y * gate[row].

Shapes and `rows` as in `adaln`: x, y [B, L, D]; gate [B, R, D]. Dtypes follow torch's promotion: a float32 gate
makes the sum float32 (the residual stream of Wan 2.2), a bf16 gate rounds product and sum (Wan 2.1 as a module).
"""

from torch import Tensor

from .adaln import expand_rows


def reference(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    return x + y * expand_rows(gate, x.shape[1], rows)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """`x + y * gate[row]`; see the module docstring."""
    return reference(x, y, gate, rows)


def cases() -> list[dict[str, int]]:
    return [
        {"batch": 1, "tokens": 3168, "rows": 3, "dim": 5120},
        {"batch": 1, "tokens": 32760, "rows": 1, "dim": 1536},
    ]
