"""The Wan 2.1 / 2.2 diffusion transformer: text and image to video, bidirectional (wan.md, 2.3).

Legend of shapes: B samples, L tokens of the padded sequence, D width, H heads, d head size, T text rows, I image rows,
R modulation rows (1: one time per sample, Wan 2.1; L: one time per token, Wan 2.2). Attribute names are the published
keys. Precision is data: `set_precision` applies one of the flows of `wan_configs`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import ops
from .layers import LayerNorm, Linear, PatchConv, RmsNorm, mlp, rope_grid, set_compute_dtype, sinusoid, unpatchify
from .wan_configs import Precision, WanConfig

Grid = tuple[int, int, int]


class TokenSpan(NamedTuple):
    """Consecutive samples of a batch with the same token grid."""

    samples: slice
    tokens: int
    """Keys that take part in self-attention; the rest of the sequence is padding."""
    rope: Tensor
    """[n, d/2, 2] float32 for the leading n tokens that are held here; later tokens are padding, never rotated."""


class Context(NamedTuple):
    """What cross-attention reads: embedded text [B, T, D] and, in Wan 2.1 image-to-video, image [B, I, D]."""

    text: Tensor
    image: Tensor | None = None


class Embedded(NamedTuple):
    """Everything the blocks and the head start from; see `WanModel.embed`."""

    tokens: Tensor
    time: Tensor
    modulation: Tensor
    context: Context
    spans: list[TokenSpan]
    grids: list[Grid]


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[TokenSpan]], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[TokenSpan]) -> Tensor:
    """Self-attention [B, L, H, d] in which padded tokens are no keys; padded queries are computed and meaningless."""
    parts = [ops.rope_attention(q[s.samples], [k[s.samples]], [v[s.samples]], lengths=[s.tokens]) for s in spans]
    return torch.cat(parts)


class SelfAttention(nn.Module):
    """Full self-attention with full-width RMS norm of q and k and 3-D rotary embedding."""

    rope_dtype: torch.dtype | None = None

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RmsNorm(dim, eps)
        self.norm_k = RmsNorm(dim, eps)

    def project(self, x: Tensor, spans: Sequence[TokenSpan]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, D] -> q, k normed and rotated, v; each [B, L, H, d]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights, eps = (self.norm_q.weight, self.norm_k.weight), self.norm_q.eps
        pairs = [
            ops.qk_norm_rope(q[s.samples], k[s.samples], *weights, s.rope, self.num_heads, eps, self.rope_dtype)
            for s in spans
        ]
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, spans: Sequence[TokenSpan], attend: Attend = attend) -> Tensor:
        q, k, v = self.project(x, spans)
        return self.o(attend(q, k, v, spans).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text and, separately normalised and summed, to the image tokens; no rotation, no mask."""

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RmsNorm(dim, eps)
        self.norm_k = RmsNorm(dim, eps)
        if image:
            self.k_img = Linear(dim, dim)
            self.v_img = Linear(dim, dim)
            self.norm_k_img = RmsNorm(dim, eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(context.text)).unflatten(-1, heads)
        v = self.v(context.text).unflatten(-1, heads)
        y = ops.rope_attention(q, [k], [v])
        if context.image is not None:
            k = self.norm_k_img(self.k_img(context.image)).unflatten(-1, heads)
            v = self.v_img(context.image).unflatten(-1, heads)
            y = y + ops.rope_attention(q, [k], [v])
        return self.o(y.flatten(2))


class WanBlock(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward (wan.md, 2.3.1)."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, heads, eps, image=config.image_dim is not None)
        self.ffn = mlp(dim, config.ffn_dim, dim, nn.GELU("tanh"))

    def forward(
        self, x: Tensor, modulation: Tensor, context: Context, spans: Sequence[TokenSpan], attend: Attend = attend
    ) -> Tensor:
        """x [B, L, D], modulation [B, R, 6, D] -> [B, L, D]."""
        rows = self.modulation.unsqueeze(1) + modulation
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows.unbind(2)  # [B, R, D] each
        y = self.self_attn(ops.adaln(x, shift_attn, scale_attn, eps=self.eps), spans, attend)
        x = ops.gated_residual(x, y, gate_attn)
        x = x + self.cross_attn(self.norm3(x), context)
        y = self.ffn(ops.adaln(x, shift_ffn, scale_ffn, eps=self.eps))
        return ops.gated_residual(x, y, gate_ffn)


class Head(nn.Module):
    """Modulated norm and projection to patches; modulated by the time embedding itself (wan.md, 2.3.2)."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = Linear(config.dim, math.prod(config.patch_size) * config.out_dim, island=True)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B, R, D] -> [B, L, pt*ph*pw*C]."""
        shift, scale = (self.modulation.unsqueeze(1) + time.unsqueeze(2)).unbind(2)
        return self.head(ops.adaln(x, shift, scale, eps=self.eps))


class ImageEmbedding(nn.Module):
    """CLIP features [B, I, image_dim] -> context tokens [B, I, D]."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim), Linear(image_dim, image_dim), nn.GELU(), Linear(image_dim, dim), LayerNorm(dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class WanModel(nn.Module):
    """Predicts the flow v = noise - clean of latent videos. Trainable as it stands, in any precision flow.

    `gradient_checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embedding = PatchConv(config.in_dim, dim, config.patch_size)
        self.text_embedding = mlp(config.text_dim, dim, dim, nn.GELU("tanh"))
        self.time_embedding = mlp(config.freq_dim, dim, dim, nn.SiLU(), island=True)
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim, island=True))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialisation for training from scratch (wan.md, 2.3.6); modulations are drawn where they are made."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self,
        x: Sequence[Tensor] | Tensor,
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int | None = None,
        y: Sequence[Tensor] | Tensor | None = None,
        clip_features: Tensor | None = None,
    ) -> list[Tensor]:
        """Flow of every sample, [out_dim, F, h, w] each.

        x: latents [in_dim, F, h, w] (or [in_dim - c, F, h, w] with y); grids may differ between samples.
        t: time in 0 ... 1000 per sample [B], or per token [B, seq_len].
        context: text embeddings [n, text_dim] with n <= text_len; padded rows are embedded and attended to.
        seq_len: pad every sample to so many tokens (None: the longest). y: [c, F, h, w] appended to the channels.
        clip_features: [B, I, image_dim], required if and only if the model has image cross-attention.
        """
        start = self.embed(x, t, context, seq_len, y, clip_features)
        tokens = self.run_blocks(start.tokens, start.modulation, start.context, start.spans)
        return self.fold(self.head(tokens, start.time), start.grids)

    def embed(
        self,
        x: Sequence[Tensor] | Tensor,
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int | None = None,
        y: Sequence[Tensor] | Tensor | None = None,
        clip_features: Tensor | None = None,
    ) -> Embedded:
        """Patches, time, text and image of a batch, as `forward` takes them."""
        tokens, grids = self.embed_patches(x, y, seq_len)
        if not len(tokens) == len(t) == len(context):
            raise ValueError(f"{len(tokens)} latents, {len(t)} times and {len(context)} texts; one of each per sample")
        if t.ndim == 2 and t.shape[1] != tokens.shape[1]:
            raise ValueError(f"t has {t.shape[1]} columns for {tokens.shape[1]} tokens; pass one per token, or [B]")
        time, modulation = self.embed_time(t)
        spans = self.token_spans(grids, tokens.device)
        return Embedded(tokens, time, modulation, self.embed_context(context, clip_features), spans, grids)

    def embed_patches(
        self, x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor | None, seq_len: int | None
    ) -> tuple[Tensor, list[Grid]]:
        """Latents -> zero-padded tokens [B, seq_len, D] and the token grid (frames, rows, columns) of each sample."""
        samples = list(x) if y is None else [torch.cat(pair) for pair in zip(x, y, strict=True)]
        patch = self.config.patch_size
        for sample in samples:
            if sample.shape[0] != self.config.in_dim or any(
                n % p for n, p in zip(sample.shape[1:], patch, strict=True)
            ):
                raise ValueError(
                    f"latent of shape {tuple(sample.shape)}: {self.config.in_dim} channels (y included) and sizes "
                    f"divisible by the patch {patch} are needed"
                )
        patches = [self.patch_embedding(sample[None])[0] for sample in samples]  # [D, F, H, W]
        grids: list[Grid] = [(p.shape[1], p.shape[2], p.shape[3]) for p in patches]
        longest = max(math.prod(grid) for grid in grids)
        seq_len = longest if seq_len is None else seq_len
        if longest > seq_len:
            raise ValueError(f"a sample has {longest} tokens, more than seq_len = {seq_len}")
        rows = [p.flatten(1).T for p in patches]  # [F*H*W, D]
        return torch.stack([F.pad(r, (0, 0, 0, seq_len - len(r))) for r in rows]), grids

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] or [B, L] -> time embedding [B, R, D] and modulation of the blocks [B, R, 6, D]."""
        t = t[:, None] if t.ndim == 1 else t
        time = self.time_embedding(sinusoid(t, self.config.freq_dim))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def embed_context(self, context: Sequence[Tensor], clip_features: Tensor | None = None) -> Context:
        """Text rows, zero-padded to text_len *before* the MLP, and image tokens."""
        longest = max(len(rows) for rows in context)
        if longest > self.config.text_len:
            raise ValueError(f"a text has {longest} tokens, more than text_len = {self.config.text_len}; truncate it")
        if (clip_features is None) != (self.config.image_dim is None):
            needed = "needs" if clip_features is None else "has no image cross-attention and takes no"
            raise ValueError(f"this model {needed} clip_features")
        padded = torch.stack([F.pad(rows, (0, 0, 0, self.config.text_len - len(rows))) for rows in context])
        image = None if clip_features is None else self.img_emb(clip_features)
        return Context(self.text_embedding(padded), image)

    def token_spans(self, grids: Sequence[Grid], device: torch.device) -> list[TokenSpan]:
        """Neighbouring samples of equal grid share one rotary table and one attention call."""
        spans: list[TokenSpan] = []
        for index, grid in enumerate(grids):
            if index and grid == grids[index - 1]:
                spans[-1] = spans[-1]._replace(samples=slice(spans[-1].samples.start, index + 1))
                continue
            axes = [torch.arange(n, device=device) for n in grid]
            rope = rope_grid(axes[0], axes[1], axes[2], self.config.head_dim).float()
            spans.append(TokenSpan(slice(index, index + 1), math.prod(grid), rope))
        return spans

    def run_blocks(
        self,
        tokens: Tensor,
        modulation: Tensor,
        context: Context,
        spans: Sequence[TokenSpan],
        attend: Attend = attend,
    ) -> Tensor:
        """All blocks; `attend` is the self-attention of the placement (the default runs on one device)."""
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, modulation, context, spans, attend, use_reentrant=False)
            else:
                tokens = block(tokens, modulation, context, spans, attend)
        return tokens

    def fold(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Head output [B, L, pt*ph*pw*C] -> latents [out_dim, F, h, w]; padded tokens are dropped."""
        return [unpatchify(p[None], grid, self.config.patch_size)[0] for p, grid in zip(patches, grids, strict=True)]


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Cast the weights of a Wan model and choose where it multiplies and rounds (wan.md, 2.3.5)."""
    model.to(precision.weights)
    set_compute_dtype(model, precision.products, islands=precision.islands)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.rope_dtype = torch.float32 if precision.islands else None
