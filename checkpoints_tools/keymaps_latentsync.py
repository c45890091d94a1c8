"""Key tables of what LatentSync takes from others: OpenAI's Whisper and the Stable Diffusion VAE.

Sources: latentsync.md 2.2 (VAE, its old names) and 2.3 (Whisper).
The U-Net, StableSyncNet and SyncNet v2 have the names of their files.
"""

from .keymaps import KeyMap, Rule, rules

LAYER, OURS = "encoder.blocks.{i}", "layers.{i}"

WHISPER = KeyMap(
    "Whisper encoder",
    rules(
        ("encoder.conv1.{w}", "conv1.{w}"),
        ("encoder.conv2.{w}", "conv2.{w}"),
        ("encoder.positional_embedding", "embed_positions.weight"),
        ("encoder.ln_post.{w}", "layer_norm.{w}"),
        (f"{LAYER}.attn_ln.{{w}}", f"{OURS}.self_attn_layer_norm.{{w}}"),
        (f"{LAYER}.attn.query.{{w}}", f"{OURS}.self_attn.q_proj.{{w}}"),
        (f"{LAYER}.attn.key.{{w}}", f"{OURS}.self_attn.k_proj.{{w}}"),
        (f"{LAYER}.attn.value.{{w}}", f"{OURS}.self_attn.v_proj.{{w}}"),
        (f"{LAYER}.attn.out.{{w}}", f"{OURS}.self_attn.out_proj.{{w}}"),
        (f"{LAYER}.mlp_ln.{{w}}", f"{OURS}.final_layer_norm.{{w}}"),
        (f"{LAYER}.mlp.0.{{w}}", f"{OURS}.fc1.{{w}}"),
        (f"{LAYER}.mlp.2.{{w}}", f"{OURS}.fc2.{{w}}"),
    ),
    unused=("decoder.",),
)
"""`tiny.pt` -> the encoder of transformers' `WhisperModel`."""


def sd_vae_keymap(old: bool) -> KeyMap:
    """Table of diffusers' `AutoencoderKL`: the names of today, or the `old` ones of its middle attention (2022)."""
    attention, found = "{side}.mid_block.attentions.0", []
    if old:
        for before, now in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            found.append((f"{attention}.{before}.{{w}}", f"{attention}.{now}.{{w}}"))
    same = (
        "quant_conv.{w}",
        "post_quant_conv.{w}",
        "{side}.{layer}.{w}",
        "{side}.{blocks}.{i}.{kind}.{j}.{layer}.{w}",
        "{side}.mid_block.{kind}.{j}.{layer}.{w}",
        f"{attention}.to_out.0.{{w}}",
    )
    return KeyMap("Stable Diffusion VAE", (*rules(*found), *(Rule(name, (name,)) for name in same)))
