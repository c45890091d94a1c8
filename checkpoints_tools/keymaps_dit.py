"""Key table of the Wan DiT: published (`WanModel`) names <-> diffusers' `WanTransformer3DModel` (wan.md, 2.3.7).

`WAN_DIFFUSERS.rename(published_key)` gives the 1-tuple with the diffusers key, `.original(diffusers_key)` goes back,
`.apply(state)` and `.invert(state)` convert whole state dicts; our `graphs.models.wan.WanModel` has the published
names. One table serves text-to-video and image-to-video (`img_emb`, `k_img`, `v_img`, `norm_k_img`).
"""

from .keymaps import KeyMap, rules

EMBEDDER = "condition_embedder"
BLOCK = "blocks.{i}"

WAN_DIFFUSERS = KeyMap(
    "Wan DiT in diffusers",
    rules(
        ("patch_embedding.{w}", "patch_embedding.{w}"),
        ("text_embedding.0.{w}", f"{EMBEDDER}.text_embedder.linear_1.{{w}}"),
        ("text_embedding.2.{w}", f"{EMBEDDER}.text_embedder.linear_2.{{w}}"),
        ("time_embedding.0.{w}", f"{EMBEDDER}.time_embedder.linear_1.{{w}}"),
        ("time_embedding.2.{w}", f"{EMBEDDER}.time_embedder.linear_2.{{w}}"),
        ("time_projection.1.{w}", f"{EMBEDDER}.time_proj.{{w}}"),
        ("img_emb.proj.0.{w}", f"{EMBEDDER}.image_embedder.norm1.{{w}}"),
        ("img_emb.proj.1.{w}", f"{EMBEDDER}.image_embedder.ff.net.0.proj.{{w}}"),
        ("img_emb.proj.3.{w}", f"{EMBEDDER}.image_embedder.ff.net.2.{{w}}"),
        ("img_emb.proj.4.{w}", f"{EMBEDDER}.image_embedder.norm2.{{w}}"),
        (f"{BLOCK}.modulation", f"{BLOCK}.scale_shift_table"),
        *(
            (f"{BLOCK}.{ours}.{part}.{{w}}", f"{BLOCK}.{theirs}.{name}.{{w}}")
            for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for part, name in (
                ("q", "to_q"),
                ("k", "to_k"),
                ("v", "to_v"),
                ("o", "to_out.0"),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ),
        (f"{BLOCK}.cross_attn.k_img.{{w}}", f"{BLOCK}.attn2.add_k_proj.{{w}}"),
        (f"{BLOCK}.cross_attn.v_img.{{w}}", f"{BLOCK}.attn2.add_v_proj.{{w}}"),
        (f"{BLOCK}.cross_attn.norm_k_img.{{w}}", f"{BLOCK}.attn2.norm_added_k.{{w}}"),
        (f"{BLOCK}.norm3.{{w}}", f"{BLOCK}.norm2.{{w}}"),
        (f"{BLOCK}.ffn.0.{{w}}", f"{BLOCK}.ffn.net.0.proj.{{w}}"),
        (f"{BLOCK}.ffn.2.{{w}}", f"{BLOCK}.ffn.net.2.{{w}}"),
        ("head.head.{w}", "proj_out.{w}"),
        ("head.modulation", "scale_shift_table"),
    ),
)
