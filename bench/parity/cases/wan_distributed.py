"""Parity of sequence parallelism: real gloo ranks against the recorded runs (wan.md, 5.1 and 5.2)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....runtime.placement import sequence_parallel as sp
from ....runtime.placement.local import run_ranks
from ..case import Case
from ..registry import handles
from .wan_dit import build_model, named_outputs, read_inputs


def attention_rank(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], ranks: int) -> Tensor:
    """One rank of Ulysses attention on its piece of the sequence."""
    mesh = sp.SequenceMesh.create(ranks, 1)
    pieces = [x.chunk(ranks, 1)[mesh.rank] for x in (q, k, v)]
    return sp.sequence_attention(pieces[0], pieces[1], pieces[2], lengths, mesh)


def model_rank(path: str, name: str, ranks: int) -> list[Tensor]:
    """One rank of a whole forward; the case is read from its file in every process."""
    case = Case("wan", Path(path))
    model, p = build_model(case.sibling(case.json["config"]).json, case.weights()), case.json["outputs"][name]
    mesh = sp.SequenceMesh.create(*sp.choose_degrees(ranks, model.config.num_heads))
    return sp.forward(model, mesh, **read_inputs(case.__getitem__, p), mask_padding=p.get("key_mask", True))


@handles("wan", "dist_*")
def distributed(case: Case) -> Mapping[str, Tensor]:
    """Attention per rank, and the model on several ranks or on one."""
    found: dict[str, Tensor] = {}
    for name, p in case.json["outputs"].items():
        if "q" in p:
            if p.get("rope"):
                raise NotImplementedError("a recorded attention with rotation: apply it before the exchange")
            ranks = case.json["ranks"]
            inputs = (case[p["q"]], case[p["k"]], case[p["v"]], case[p["key_lens"]].tolist(), ranks)
            found |= {f"{name}.{rank}": y for rank, y in enumerate(run_ranks(attention_rank, ranks, *inputs))}
            continue
        if p["ranks"] == 1:
            model = build_model(case.sibling(case.json["config"]).json, case.weights())
            with torch.no_grad():
                latents: list[Any] = model(**read_inputs(case.__getitem__, p))
        else:
            results = run_ranks(model_rank, p["ranks"], str(case.path), name, p["ranks"])
            if any(not torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True)):
                raise ArithmeticError(f"{name}: the ranks disagree on the gathered result")
            latents = results[0]
        found |= named_outputs(case, name, latents)
    return found
