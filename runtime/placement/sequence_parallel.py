"""Sequence parallelism of the Wan DiT: Ulysses head exchange times ring attention (wan.md, 5.1 and 5.2).

Every rank holds the whole model and an equal piece of the token sequence. Self-attention is the only exchange: inside
a Ulysses group the ranks trade tokens for heads (all-to-all), across ring groups key and value blocks travel and the
partial results are merged by log-sum-exp. Inference only. Run under `torchrun` (NCCL) or on CPU processes (gloo).

Legend: P ranks = U (Ulysses degree) x R (ring degree), S tokens of the sequence, H heads, d head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...graphs.models.wan import TokenSpan, WanModel
from ...kernels import ops


def choose_degrees(ranks: int, num_heads: int) -> tuple[int, int]:
    """(Ulysses, ring) degrees: as much Ulysses as the heads allow, the rest of the ranks as a ring."""
    ulysses = math.gcd(ranks, num_heads)
    return ulysses, ranks // ulysses


@dataclass(frozen=True)
class SequenceMesh:
    """Process groups of one replica. Rank r = ring position * U + Ulysses position holds piece r of the sequence."""

    sequence: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup

    @classmethod
    def create(cls, ulysses_degree: int, ring_degree: int) -> "SequenceMesh":
        """Split the world into replicas of U x R consecutive ranks. Collective: every rank must call it.

        Raises ValueError when the world is not a multiple of U x R.
        """
        world, size = dist.get_world_size(), ulysses_degree * ring_degree
        if world % size:
            raise ValueError(f"{world} ranks do not split into replicas of {ulysses_degree} x {ring_degree}")
        pieces = torch.arange(world).view(-1, ring_degree, ulysses_degree)  # [replica, ring, ulysses]
        return cls(
            sequence=_own_group(pieces.flatten(1)),
            ulysses=_own_group(pieces.flatten(0, 1)),
            ring=_own_group(pieces.transpose(1, 2).flatten(0, 1)),
        )

    @property
    def size(self) -> int:
        return dist.get_world_size(self.sequence)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.sequence)


def _own_group(members: Tensor) -> dist.ProcessGroup:
    """The group of this rank among the rows of `members` [groups, ranks]; all are created, as torch requires."""
    groups = [(row, dist.new_group(row)) for row in members.tolist()]
    return next(group for row, group in groups if dist.get_rank() in row)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all [B, S/U, H, d] -> [B, S, H/U, d]: rank r receives heads r*H/U ... of every rank's tokens."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    if x.shape[2] % size:
        raise ValueError(f"{x.shape[2]} heads do not split over {size} ranks; lower the Ulysses degree")
    parts = torch.stack(x.chunk(size, 2))  # [U, B, S/U, H/U, d] by receiver
    return torch.cat(_exchange(parts, group).unbind(), 1)


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all [B, S, H/U, d] -> [B, S/U, H, d], the inverse of `tokens_to_heads`."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = torch.stack(x.chunk(size, 1))  # [U, B, S/U, H/U, d] by receiver
    return torch.cat(_exchange(parts, group).unbind(), 2)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send parts[r] to rank r; returns what the ranks sent, by sender."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [B, S/P, ...] -> [B, S, ...] in the order of the ranks."""
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces, 1)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of [B, L, H, d] in float32 and the log-sum-exp of its scores [B, L, H].

    On CUDA in half precision the flash kernel computes both; its output is rounded once before it is widened.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, d]
    if q.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q.to(v.dtype), k.to(v.dtype), v)[:2]
    else:
        scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
        lse = scores.logsumexp(-1)
        out = torch.exp(scores - lse[..., None]) @ v.float()
    return out.transpose(1, 2).float(), lse.transpose(1, 2).float()


def merge_partial(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys from their results [B, L, H, d] and log-sum-exps [B, L, H]."""
    total = torch.logaddexp(lse, block_lse)
    weight, block_weight = (lse - total).exp()[..., None], (block_lse - total).exp()[..., None]
    return out * weight + block_out * block_weight, total


def ring_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Attention of the local queries to the keys of all ring ranks; q, k, v and the result [B, L, H, d] of one dtype.

    `lengths` counts the valid leading keys of the whole sequence per sample. While a block is used, the next travels.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    block = torch.stack((k, v))  # [2, B, L, H, d]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, device=q.device)
    for step in range(size):
        incoming, pending = block, []
        if step < size - 1:
            incoming = torch.empty_like(block)
            pending = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size),
                    dist.P2POp(dist.irecv, incoming, group=group, group_peer=(rank - 1) % size),
                ]
            )
        start = (rank - step) % size * k.shape[1]
        for sample, length in enumerate(lengths):
            valid = min(max(length - start, 0), k.shape[1])
            if not valid:
                continue
            rows = slice(sample, sample + 1)
            part = attention_with_lse(q[rows], block[0, rows, :valid], block[1, rows, :valid])
            out[rows], lse[rows] = merge_partial(out[rows], lse[rows], *part)
        for request in pending:
            request.wait()
        block = incoming
    return out.to(q.dtype)


def sequence_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mesh: SequenceMesh) -> Tensor:
    """Attention over the whole sequence from local pieces [B, S/P, H, d]; returns the local piece.

    `lengths` [B]: number of leading tokens of the global sequence that count as keys, per sample.
    """
    sent = (x.to(v.dtype) for x in (q, k, v))  # attention runs in the dtype of v, so nothing wider travels
    q_all, k_all, v_all = (tokens_to_heads(x, mesh.ulysses) for x in sent)  # [B, S/R, H/U, d]
    if dist.get_world_size(mesh.ring) > 1:
        out = ring_attention(q_all, k_all, v_all, lengths, mesh.ring)
    else:
        samples = zip(q_all.split(1), k_all.split(1), v_all.split(1), lengths, strict=True)
        out = torch.cat([ops.rope_attention(a, [b], [c], lengths=[n]) for a, b, c, n in samples])
    return heads_to_tokens(out, mesh.ulysses).to(q.dtype)


def local_spans(spans: Sequence[TokenSpan], rank: int, local: int) -> list[TokenSpan]:
    """Spans whose rotary tables are cut to the tokens rank * local ... of the global sequence."""
    start = rank * local
    return [span._replace(rope=span.rope[start : start + local]) for span in spans]


@torch.no_grad()
def forward(
    model: WanModel,
    mesh: SequenceMesh,
    x: Sequence[Tensor] | Tensor,
    t: Tensor,
    context: Sequence[Tensor],
    seq_len: int | None = None,
    y: Sequence[Tensor] | Tensor | None = None,
    clip_features: Tensor | None = None,
    mask_padding: bool = True,
) -> list[Tensor]:
    """`WanModel.forward` over all ranks of `mesh`, with the same arguments and result on each.

    The sequence is padded to a multiple of the ranks. `mask_padding` keeps padded tokens from acting as keys, which
    makes the result that of one device; False reproduces upstream's USP path, where they take part (wan.md, 5.2).
    """
    start = model.embed(x, t, context, seq_len, y, clip_features)
    padding = -start.tokens.shape[1] % mesh.size
    tokens = F.pad(start.tokens, (0, 0, 0, padding))
    total = tokens.shape[1]
    time, modulation = (cut_rows(rows, total, mesh) for rows in (start.time, start.modulation))
    lengths = [
        s.tokens if mask_padding else total for s in start.spans for _ in range(s.samples.stop - s.samples.start)
    ]
    spans = local_spans(start.spans, mesh.rank, total // mesh.size)

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Sequence[TokenSpan]) -> Tensor:
        return sequence_attention(q, k, v, lengths, mesh)

    piece = tokens.chunk(mesh.size, 1)[mesh.rank]  # [B, S/P, D]
    piece = model.run_blocks(piece, modulation, start.context, spans, attend)
    return model.fold(gather_sequence(model.head(piece, time), mesh.sequence), start.grids)


def cut_rows(rows: Tensor, total: int, mesh: SequenceMesh) -> Tensor:
    """This rank's share of per-token rows [B, S, ...]; one row per sample [B, 1, ...] is shared and stays."""
    if rows.shape[1] == 1:
        return rows
    padding = rows[:, -1:].expand(-1, total - rows.shape[1], *rows.shape[2:])
    return torch.cat((rows, padding), 1).chunk(mesh.size, 1)[mesh.rank]
