"""LiveAvatar: the causal speech-to-video transformer, Wan 2.2-S2V rebuilt for endless streaming (liveavatar.md, 2).

Three passes share the weights: `prefill` (condition tokens among themselves, once per sink), `forward_block` (one block
of a stream at one noise level) and `forward_train` (a whole clip under a block mask). What a pass needs is prepared by
pure methods according to what it depends on: `embed_text` (prompt), `encode_audio` (a block's audio), `embed_time`
(noise level). Attribute names are the published keys.

Legend: B batch, A actors, N = B * A, L tokens, F latent frames, P = (h/2)(w/2) tokens a frame, C condition tokens,
D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, PatchConv, mlp, set_compute_dtype, sinusoid, unpatchify
from .liveavatar_audio import AUDIO_FRAMES_PER_LATENT, AudioInjector, AudioState, CausalAudioEncoder
from .liveavatar_block import Block, ClipRope, Head, block_mask
from .liveavatar_cache import ConditionCache, Context, KeyValue, LayerMemory, Memory, RollingCache, condition_table
from .liveavatar_config import LIVEAVATAR_14B, LiveAvatarConfig
from .liveavatar_motion import FramePacker
from .liveavatar_rope import frame_table, ref_shift, segment_table

__all__ = [
    "LIVEAVATAR_14B",
    "AudioState",
    "ConditionCache",
    "LiveAvatar",
    "LiveAvatarConfig",
    "RollingCache",
    "Text",
    "TextState",
    "TimeState",
    "ref_shift",
]

NOISY, REFERENCE, MOTION = range(3)  # rows of `trainable_cond_mask`


class StoreLayer(Protocol):
    """Takes one layer of a prefill: keys before rotation and values [B, C, H, d], their rotary table [C, d/2, 2]."""

    def __call__(self, layer: int, kept: KeyValue, /, rope: Tensor) -> None: ...


@dataclass(frozen=True)
class TimeState:
    """A noise level: `e` [B, R, D] for the head, `e0` [B, R, 6, D] for the blocks; R = frames, or 1 for all of them."""

    e: Tensor
    e0: Tensor


class Text(Protocol):
    """A prompt as the blocks attend it: the context of every block's cross attention."""

    @property
    def layers(self) -> Sequence[Context]: ...


@dataclass(frozen=True)
class TextState:
    """A prompt: cross attention keys and values [B, text_len, H, d] of every block."""

    layers: tuple[KeyValue, ...]


class LiveAvatar(nn.Module):
    """The model; see the module docstring for its passes.

    Latents are [B, 16, F, h, w] with even h and w. Half precision: `model.to(torch.bfloat16)` is the published flow
    (float32 islands keep multiplying in float32 on up-cast weights).
    """

    def __init__(self, config: LiveAvatarConfig):
        super().__init__()
        self.config = c = config
        self.patch_embedding = PatchConv(c.in_dim, c.dim, c.patch)
        self.cond_encoder = PatchConv(c.cond_dim, c.dim, c.patch)
        self.text_embedding = mlp(c.text_dim, c.dim, c.dim, nn.GELU(approximate="tanh"))
        self.time_embedding = mlp(c.freq_dim, c.dim, c.dim, nn.SiLU(), island=True)
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(c.dim, 6 * c.dim, island=True))
        self.blocks = nn.ModuleList(Block(c.dim, c.ffn_dim, c.num_heads, c.eps) for _ in range(c.num_layers))
        self.head = Head(c.dim, c.out_dim * c.patch[1] * c.patch[2], c.eps)
        self.trainable_cond_mask = nn.Embedding(3, c.dim)
        self.casual_audio_encoder = CausalAudioEncoder(c.audio_dim, c.audio_layers, c.dim, c.num_audio_token)
        self.audio_injector = AudioInjector(
            c.dim, c.num_heads, len(c.audio_inject_layers), c.eps, c.enable_adain, c.adain_mode
        )
        self.frame_packer = FramePacker(c.in_dim, c.dim, c.framepack_drop_mode, c.motion_buckets)
        self.injection_index = {layer: index for index, layer in enumerate(sorted(c.audio_inject_layers))}
        set_compute_dtype(self, None)

    @property
    def layers(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token stream between blocks."""
        return self.patch_embedding.compute_dtype or self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    # What depends only on the prompt, the noise level, the audio

    def text_tokens(self, context: Tensor) -> Tensor:
        """Prompt rows [B, n, text_dim] (or [n, text_dim]), n <= text_len -> tokens [B, text_len, D] (2.4)."""
        context = context if context.ndim == 3 else context[None]
        missing = self.config.text_len - context.shape[1]
        if missing < 0:
            raise ValueError(f"the prompt has {context.shape[1]} rows, this model takes {self.config.text_len}; cut it")
        return self.text_embedding(F.pad(context, (0, 0, 0, missing)))

    def embed_text(self, context: Tensor) -> TextState:
        """Prompt rows as in `text_tokens` -> keys and values of every block, valid as long as the prompt."""
        tokens = self.text_tokens(context)
        return TextState(tuple(block.cross_attn.context(tokens) for block in self.layers))

    def embed_time(self, t: Tensor) -> TimeState:
        """Times t [B, R] in 0..1000, one per latent frame, or R = 1 when all frames share it (2.3)."""
        e = self.time_embedding(sinusoid(t, self.config.freq_dim).float())  # [B, R, D]
        return TimeState(e, self.time_projection(e).unflatten(-1, (6, -1)))

    def encode_audio(self, features: Tensor, *, per_block: bool = False) -> AudioState:
        """Audio features [N, audio_layers, audio_dim, 4F] -> tokens and all that the injections need (2.8).

        N is B samples times A actors, sample-major. `per_block` encodes each block's window on its own, as a stream
        does; otherwise the window is encoded as one.
        """
        features = features.to(self.dtype)
        if not per_block:
            return self.audio_injector.prepare(*self.casual_audio_encoder(features))
        entries, window = features.shape[0], AUDIO_FRAMES_PER_LATENT * self.config.num_frames_per_block
        if features.shape[-1] % window:
            raise ValueError(f"{features.shape[-1]} audio frames are not whole blocks of {window}")
        windows = features.unflatten(-1, (-1, window)).movedim(-2, 1).flatten(0, 1)  # [N*blocks, layers, C, window]
        local, whole = self.casual_audio_encoder(windows)
        return self.audio_injector.prepare(
            local.unflatten(0, (entries, -1)).flatten(1, 2), whole.unflatten(0, (entries, -1)).flatten(1, 2)
        )

    # Tokens and their rotary tables

    def _grid(self, latents: Tensor, name: str) -> tuple[int, int]:
        """Rows and columns of patches of latents [B, C, F, h, w]."""
        if latents.ndim != 5:
            raise ValueError(f"{name} has shape {tuple(latents.shape)}; [B, channels, frames, height, width] is needed")
        height, width = latents.shape[-2:]
        if height % 2 or width % 2 or not height or not width:
            raise ValueError(f"{name} is {height} x {width}; latent sides must be even (pixel sides multiples of 16)")
        return height // 2, width // 2

    def _mask_row(self, row: int, dtype: torch.dtype) -> Tensor:
        return self.trainable_cond_mask.weight[row].to(dtype)

    def embed_noisy(self, x: Tensor, cond_states: Tensor | None = None) -> Tensor:
        """Noisy latents and pose latents of the same frames (None: no pose) -> tokens [B, F*P, D] (2.2)."""
        self._grid(x, "x")
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if cond_states is None:  # a pose of zeros leaves the bias
            pose = self.cond_encoder.bias.to(tokens.dtype)  # type: ignore[union-attr]
        else:
            if cond_states.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"cond_states {tuple(cond_states.shape)} and x {tuple(x.shape)} differ in frames or size"
                )
            pose = self.cond_encoder(cond_states).flatten(2).transpose(1, 2)
        return tokens + pose + self._mask_row(NOISY, tokens.dtype)

    def embed_condition(
        self, ref_latents: Tensor, motion_latents: Tensor, add_last_motion: int = 2
    ) -> tuple[Tensor, Tensor]:
        """Reference [B, 16, 1, h, w] and motion latents [B, 16, T, h, w] -> reference tokens [B, P, D] and packed
        motion tokens [B, M, D] before their mask row (2.7)."""
        self._grid(ref_latents, "ref_latents")
        if ref_latents.shape[2] != 1:
            raise ValueError(f"ref_latents has {ref_latents.shape[2]} frames; pass the one latent frame of the picture")
        if motion_latents.shape[-2:] != ref_latents.shape[-2:]:
            raise ValueError(
                f"motion_latents {tuple(motion_latents.shape)} and ref_latents {tuple(ref_latents.shape)} differ"
            )
        reference = self.patch_embedding(ref_latents).flatten(2).transpose(1, 2)
        reference = reference + self._mask_row(REFERENCE, reference.dtype)
        return reference, self.frame_packer(motion_latents, add_last_motion)

    def join_condition(self, reference: Tensor, motion: Tensor) -> Tensor:
        """The tokens of `embed_condition` as the blocks read them [B, C, D]."""
        return torch.cat((reference, motion + self._mask_row(MOTION, motion.dtype)), 1)

    def motion_rope(self, grid: tuple[int, int], add_last_motion: int = 2) -> Tensor:
        """Rotary table of the packed motion tokens [M, d/2, 2] for a grid of (rows, columns) patches."""
        segments = self.frame_packer.segments(2 * grid[0], 2 * grid[1], add_last_motion)
        return segment_table(segments, self.config.head_dim, self.config.rope_dtype, self.device)

    def noisy_rope(self, start_frame: int | Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """Rotary table of `frames` latent frames from absolute frame `start_frame`; [F*P, d/2, 2], or [B, ...]."""
        return frame_table(start_frame, frames, grid, self.config.head_dim, self.config.rope_dtype, self.device)

    def inject_audio(self, layer: int, x: Tensor, audio: AudioState, mask: Tensor | None) -> Tensor:
        """The audio step after block `layer`, where there is one; `mask` [A, L]."""
        index = self.injection_index.get(layer)
        if index is None:
            return x
        return self.audio_injector(index, x, audio.layers[index], audio.local.shape[1], mask)

    def token_mask(
        self, audio: AudioState, actor_mask: Tensor | None, frames: int, grid: tuple[int, int]
    ) -> Tensor | None:
        """Actor mask [A, >=F, h/2, w/2, 1] -> one value a noisy token [A, F*P]: its first F frames (2.8)."""
        if audio.local.shape[1] != frames:
            raise ValueError(
                f"the audio covers {audio.local.shape[1]} latent frames and x has {frames}; "
                f"pass {AUDIO_FRAMES_PER_LATENT} audio frames per latent frame"
            )
        if actor_mask is None:
            return None
        if tuple(actor_mask.shape[2:4]) != grid or actor_mask.shape[1] < frames:
            needed = f"[actors, >= {frames}, {grid[0]}, {grid[1]}, 1]"
            raise ValueError(f"actor_mask has shape {tuple(actor_mask.shape)}; {needed} is needed")
        return actor_mask[:, :frames].flatten(1)

    def project_out(self, tokens: Tensor, e: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, F*P, D] -> flow [B, 16, F, h, w] (2.9)."""
        return unpatchify(self.head(tokens, e), (frames, *grid), self.config.patch)

    # The three passes

    def prefill(
        self,
        ref_latents: Tensor,
        motion_latents: Tensor,
        text: Text,
        *,
        drop_motion_frames: bool = False,
        add_last_motion: int = 2,
    ) -> ConditionCache:
        """Run the condition tokens through all blocks and keep their keys and values; shared by all step caches.

        ref_latents [B, 16, 1, h, w], motion_latents [B, 16, T, h, w] (the last 19 count). `drop_motion_frames` hides
        the motion frames: their tokens and their rotation are zero here, their mask row stays (2.7).
        """
        kept: list[KeyValue] = []
        motion_rope = self.prefill_layers(
            ref_latents,
            motion_latents,
            text,
            lambda _, layer, rope: kept.append(layer),
            drop_motion_frames=drop_motion_frames,
            add_last_motion=add_last_motion,
        )
        return ConditionCache(tuple(kept), self._grid(ref_latents, "ref_latents"), motion_rope, self.config.rope_dtype)

    def prefill_layers(
        self,
        ref_latents: Tensor,
        motion_latents: Tensor,
        text: Text,
        store: StoreLayer,
        *,
        drop_motion_frames: bool = False,
        add_last_motion: int = 2,
    ) -> Tensor:
        """`prefill` that hands over each layer as it is made, so that no second copy of all layers is held.

        Returns the motion tokens' rows of the rotary table, unhidden.
        """
        reference, motion = self.embed_condition(ref_latents, motion_latents, add_last_motion)
        grid = self._grid(ref_latents, "ref_latents")
        motion_rope = self.motion_rope(grid, add_last_motion)
        rope = condition_table(motion_rope, 0, grid, self.config.rope_dtype)
        if drop_motion_frames:
            motion = torch.zeros_like(motion)
            rope = torch.cat((rope[: -motion_rope.shape[0]], torch.zeros_like(motion_rope)))
        x, still = self.join_condition(reference, motion), self.embed_time(torch.zeros(1, 1, device=motion.device))
        self.prefill_tokens(x, still, text, rope, store)
        return motion_rope

    def prefill_tokens(self, x: Tensor, still: TimeState, text: Text, rope: Tensor, store: StoreLayer) -> None:
        """`prefill_layers` with everything given that does not depend on the condition: the time 0, the rotary table
        [C, d/2, 2] of the condition tokens x [B, C, D]."""
        for i, (block, context) in enumerate(zip(self.layers, text.layers, strict=True)):
            keep = partial(store, i, rope=rope)
            x = block(x, still.e0, context, partial(block.self_attn.prefill, rope=rope, store=keep))

    def condition_tokens(self, grid: tuple[int, int]) -> int:
        """C: reference and packed motion tokens of a prefill for a grid of (rows, columns) patches."""
        segments = self.frame_packer.segments(2 * grid[0], 2 * grid[1])
        return grid[0] * grid[1] + sum(segment.tokens for segment in segments)

    def forward_block(
        self,
        x: Tensor,
        time: TimeState,
        text: Text,
        audio: AudioState,
        condition: ConditionCache,
        cache: RollingCache,
        start_frame: int,
        ref_shift: int,
        *,
        cond_states: Tensor | None = None,
        actor_mask: Tensor | None = None,
    ) -> Tensor:
        """Flow [B, 16, 3, h, w] (noise - data) of one block; writes the block's keys and values into `cache`.

        x: noisy latents [B, 16, 3, h, w] whose first frame is the stream's latent frame `start_frame`, a multiple of
        the block. `cache` belongs to this noise level. `ref_shift`: see `liveavatar_rope.ref_shift`. `cond_states`:
        pose latents like x. `actor_mask` [A, >= 3, h/2, w/2, 1] when several actors speak.
        """
        grid, frames = self._grid(x, "x"), x.shape[2]
        if frames != self.config.num_frames_per_block:
            raise ValueError(f"x has {frames} frames; a block has {self.config.num_frames_per_block}")
        if grid != condition.grid or grid[0] * grid[1] != cache.tokens_per_frame:
            raise ValueError(
                f"x has {grid} patches a frame, the condition {condition.grid}, the cache {cache.tokens_per_frame} "
                "tokens; prefill and allocate for the size of x"
            )
        slot = cache.slot(start_frame, frames, self.config.local_attn_size)
        rope, condition_rope = self.noisy_rope(start_frame, frames, grid), condition.rope(ref_shift)
        mask = self.token_mask(audio, actor_mask, frames, grid)
        memories = [
            LayerMemory(KeyValue(cache.k[i], cache.v[i]), slot, condition.layers[i], condition_rope)
            for i in range(len(self.layers))
        ]
        return self.stream_block(x, time, text, audio, memories, rope, cond_states=cond_states, mask=mask)

    def stream_block(
        self,
        x: Tensor,
        time: TimeState,
        text: Text,
        audio: AudioState,
        memories: Sequence[Memory],
        rope: Tensor,
        *,
        cond_states: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`forward_block` with everything that depends on the place in the stream given: each layer's memory, the
        rotary table of the block [L, d/2, 2], the actor mask per token [A, L]."""
        grid, frames = self._grid(x, "x"), x.shape[2]
        tokens = self.embed_noisy(x, cond_states)
        for i, (block, memory) in enumerate(zip(self.layers, memories, strict=True)):
            attend = partial(block.self_attn.stream, rope=rope, memory=memory)
            tokens = block(tokens, time.e0, text.layers[i], attend)
            tokens = self.inject_audio(i, tokens, audio, mask)
        return self.project_out(tokens, time.e, frames, grid)

    def forward_train(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        audio: Tensor,
        ref_latents: Tensor,
        motion_latents: Tensor,
        *,
        cond_states: Tensor | None = None,
        actor_mask: Tensor | None = None,
        add_last_motion: int = 2,
        history_blocks: int | None = None,
        frame_offset: int | Tensor = 0,
        ref_shift: int | Tensor = 0,
        audio_per_block: bool = False,
    ) -> Tensor:
        """Flow [B, 16, F, h, w] of a whole clip of noisy latents x under the block mask (2.11).

        t [B, F] (or [1, F]) one time per frame; context [B, n, text_dim], or [1, n, text_dim] for all; audio features
        [N, layers, audio_dim, 4F]; ref and motion latents as in `prefill`. `history_blocks`: how many earlier blocks
        one may see (3 is what the published rolling cache gives, None: all). `frame_offset`: absolute latent frame of
        the clip's first frame, and `ref_shift` of the reference, each an int or one per sample [B]; they only move
        rotary positions, as a stream does. `audio_per_block`: encode the audio block by block, as a stream does.
        """
        grid, frames = self._grid(x, "x"), x.shape[2]
        if frames % self.config.num_frames_per_block:
            raise ValueError(f"x has {frames} frames; train on whole blocks of {self.config.num_frames_per_block}")
        if t.ndim != 2 or t.shape[1] != frames or t.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"t has shape {tuple(t.shape)}; one time per frame is needed: {(x.shape[0], frames)}")
        text, sound = self.embed_text(context), self.encode_audio(audio, per_block=audio_per_block)
        token_mask = self.token_mask(sound, actor_mask, frames, grid)
        motion_rope = self.motion_rope(grid, add_last_motion)
        noisy = self.embed_noisy(x, cond_states)
        still = self.join_condition(*self.embed_condition(ref_latents, motion_latents, add_last_motion))
        tokens, length = torch.cat((noisy, still), 1), noisy.shape[1]  # [B, N + C, D]

        rope = ClipRope(
            self.noisy_rope(frame_offset, frames, grid),
            condition_table(motion_rope, ref_shift, grid, self.config.rope_dtype),
            condition_table(motion_rope, 0, grid, self.config.rope_dtype),
        )
        per_frame = grid[0] * grid[1]
        blocks = frames // self.config.num_frames_per_block
        mask = block_mask(blocks, length // blocks, tokens.shape[1] - length, history_blocks, x.device)[:length]
        time = self.embed_time(torch.cat((t.float(), t.new_zeros(t.shape[0], 1)), 1))  # the last row is for C
        rows = (torch.arange(tokens.shape[1], device=x.device) // per_frame).clamp(max=frames)
        for i, block in enumerate(self.layers):
            attend = partial(block.self_attn, rope=rope, mask=mask)
            tokens = block(tokens, time.e0, text.layers[i], attend, rows)
            if i in self.injection_index:
                voiced = self.inject_audio(i, tokens[:, :length], sound, token_mask)
                tokens = torch.cat((voiced, tokens[:, length:]), 1)
        return self.project_out(tokens[:, :length], time.e[:, :frames], frames, grid)
