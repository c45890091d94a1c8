"""The published key sets as the specifications state them, transcribed line by line: not made from our own tables.

A line is `names | shape`, or `names | shape of the weight | shape of the bias` for a layer that has both.
`{a,b}` stands for each word, `{0..39}` for each number.
"""

import json
import re
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "wan"
Shapes = dict[str, tuple[int, ...]]

# liveavatar.md 1.3
LIVEAVATAR = """
patch_embedding | 5120,16,1,2,2 | 5120
text_embedding.0 | 5120,4096 | 5120
text_embedding.2 | 5120,5120 | 5120
time_embedding.0 | 5120,256 | 5120
time_embedding.2 | 5120,5120 | 5120
time_projection.1 | 30720,5120 | 30720
blocks.{0..39}.modulation | 1,6,5120
blocks.{0..39}.self_attn.{q,k,v,o} | 5120,5120 | 5120
blocks.{0..39}.self_attn.norm_{q,k}.weight | 5120
blocks.{0..39}.norm3 | 5120 | 5120
blocks.{0..39}.cross_attn.{q,k,v,o} | 5120,5120 | 5120
blocks.{0..39}.cross_attn.norm_{q,k}.weight | 5120
blocks.{0..39}.ffn.0 | 13824,5120 | 13824
blocks.{0..39}.ffn.2 | 5120,13824 | 5120
head.modulation | 1,2,5120
head.head | 64,5120 | 64
cond_encoder | 5120,16,1,2,2 | 5120
casual_audio_encoder.weights | 1,25,1,1
casual_audio_encoder.encoder.padding_tokens | 1,1,1,5120
casual_audio_encoder.encoder.conv1_local.conv | 5120,1024,3 | 5120
casual_audio_encoder.encoder.conv1_global.conv | 1280,1024,3 | 1280
casual_audio_encoder.encoder.conv2.conv | 2560,1280,3 | 2560
casual_audio_encoder.encoder.conv3.conv | 5120,2560,3 | 5120
casual_audio_encoder.encoder.final_linear | 5120,5120 | 5120
audio_injector.injector.{0..11}.{q,k,v,o} | 5120,5120 | 5120
audio_injector.injector.{0..11}.norm_{q,k}.weight | 5120
audio_injector.injector_adain_layers.{0..11}.linear | 10240,5120 | 10240
trainable_cond_mask.weight | 3,5120
frame_packer.proj | 5120,16,1,2,2 | 5120
frame_packer.proj_2x | 5120,16,2,4,4 | 5120
frame_packer.proj_4x | 5120,16,4,8,8 | 5120
"""
# liveavatar.md 1.4
LIVEAVATAR_LORA = """
blocks.{0..39}.{self_attn,cross_attn}.{q,k,v,o}.lora_A.default.weight | 128,5120
blocks.{0..39}.{self_attn,cross_attn}.{q,k,v,o}.lora_B.default.weight | 5120,128
blocks.{0..39}.ffn.0.lora_A.default.weight | 128,5120
blocks.{0..39}.ffn.0.lora_B.default.weight | 13824,128
blocks.{0..39}.ffn.2.lora_A.default.weight | 128,13824
blocks.{0..39}.ffn.2.lora_B.default.weight | 5120,128
audio_injector.injector.{0..11}.{q,k,v,o}.lora_A.default.weight | 128,5120
audio_injector.injector.{0..11}.{q,k,v,o}.lora_B.default.weight | 5120,128
"""
# omniavatar.md 1.3
OMNIAVATAR = """
patch_embedding | 5120,33,1,2,2 | 5120
audio_proj.proj | 32,43008 | 32
audio_proj.norm_out | 32 | 32
audio_cond_projs.{0..18} | 5120,32 | 5120
blocks.{0..39}.{self_attn,cross_attn}.{q,k,v,o}.lora_A.default.weight | 128,5120
blocks.{0..39}.{self_attn,cross_attn}.{q,k,v,o}.lora_B.default.weight | 5120,128
blocks.{0..39}.ffn.0.lora_A.default.weight | 128,5120
blocks.{0..39}.ffn.0.lora_B.default.weight | 13824,128
blocks.{0..39}.ffn.2.lora_A.default.weight | 128,13824
blocks.{0..39}.ffn.2.lora_B.default.weight | 5120,128
"""
# stableavatar.md 1.2
STABLEAVATAR = """
patch_embedding | 1536,36,1,2,2 | 1536
text_embedding.0 | 1536,4096 | 1536
text_embedding.2 | 1536,1536 | 1536
time_embedding.0 | 1536,256 | 1536
time_embedding.2 | 1536,1536 | 1536
time_projection.1 | 9216,1536 | 9216
img_emb.proj.0 | 1280 | 1280
img_emb.proj.1 | 1280,1280 | 1280
img_emb.proj.3 | 1536,1280 | 1536
img_emb.proj.4 | 1536 | 1536
blocks.{0..29}.modulation | 1,6,1536
blocks.{0..29}.self_attn.{q,k,v,o} | 1536,1536 | 1536
blocks.{0..29}.self_attn.norm_{q,k}.weight | 1536
blocks.{0..29}.norm3 | 1536 | 1536
blocks.{0..29}.cross_attn.{q,k,v,o,k_img,v_img,k_vocal,v_vocal} | 1536,1536 | 1536
blocks.{0..29}.cross_attn.norm_{q,k,k_img}.weight | 1536
blocks.{0..29}.ffn.0 | 8960,1536 | 8960
blocks.{0..29}.ffn.2 | 1536,8960 | 1536
head.modulation | 1,2,1536
head.head | 64,1536 | 64
vocal_projector.proj_model.proj.weight | 1536,768
vocal_projector.proj_model.norm | 1536 | 1536
vocal_projector.blocks.{0..1}.modulation | 1,6,1536
vocal_projector.blocks.{0..1}.norm3 | 1536 | 1536
vocal_projector.blocks.{0..1}.cross_attn.{q,k,v,o} | 1536,1536 | 1536
vocal_projector.blocks.{0..1}.cross_attn.norm_{q,k}.weight | 1536
vocal_projector.blocks.{0..1}.ffn.0 | 3072,1536 | 3072
vocal_projector.blocks.{0..1}.ffn.2 | 1536,3072 | 1536
vocal_projector.final_head.modulation | 1,2,1536
vocal_projector.final_head.final_proj | 1536,1536 | 1536
"""
# skyreels_v3.md 1.3: the plain names with 36 channels, and these
SKYREELS_AVATAR_MORE = """
blocks.{0..39}.cross_attn.{k_img,v_img} | 5120,5120 | 5120
blocks.{0..39}.cross_attn.norm_k_img.weight | 5120
blocks.{0..39}.norm_x | 5120 | 5120
blocks.{0..39}.audio_cross_attn.q_linear | 5120,5120 | 5120
blocks.{0..39}.audio_cross_attn.proj | 5120,5120 | 5120
blocks.{0..39}.audio_cross_attn.kv_linear | 10240,768 | 10240
img_emb.proj.0 | 1280 | 1280
img_emb.proj.1 | 1280,1280 | 1280
img_emb.proj.3 | 5120,1280 | 5120
img_emb.proj.4 | 5120 | 5120
audio_proj.proj1 | 512,46080 | 512
audio_proj.proj1_vf | 512,73728 | 512
audio_proj.proj2 | 512,512 | 512
audio_proj.proj3 | 24576,512 | 24576
audio_proj.norm | 768 | 768
"""
# skyreels_v3.md 1.3, R2V in diffusers' names
SKYREELS_REFERENCE = """
patch_embedding | 5120,16,1,2,2 | 5120
condition_embedder.time_embedder.linear_1 | 5120,256 | 5120
condition_embedder.time_embedder.linear_2 | 5120,5120 | 5120
condition_embedder.time_proj | 30720,5120 | 30720
condition_embedder.text_embedder.linear_1 | 5120,4096 | 5120
condition_embedder.text_embedder.linear_2 | 5120,5120 | 5120
blocks.{0..39}.scale_shift_table | 1,6,5120
blocks.{0..39}.{attn1,attn2}.{to_q,to_k,to_v,to_out.0} | 5120,5120 | 5120
blocks.{0..39}.{attn1,attn2}.norm_{q,k}.weight | 5120
blocks.{0..39}.norm2 | 5120 | 5120
blocks.{0..39}.ffn.net.0.proj | 13824,5120 | 13824
blocks.{0..39}.ffn.net.2 | 5120,13824 | 5120
scale_shift_table | 1,2,5120
proj_out | 64,5120 | 64
"""


def braces(text: str) -> list[str]:
    """`a{b,c}{0..1}` -> ab0, ab1, ac0, ac1."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    inside = found[1]
    first, dots, last = inside.partition("..")
    words = [str(n) for n in range(int(first), int(last) + 1)] if dots else inside.split(",")
    return [whole for word in words for whole in braces(text[: found.start()] + word + text[found.end() :])]


def transcribed(table: str) -> Shapes:
    """Name -> shape of one of the tables above."""
    shapes: Shapes = {}
    for line in table.strip().splitlines():
        names, *sides = (part.strip() for part in line.split("|"))
        numbers = [tuple(int(side) for side in shape.split(",")) for shape in sides]
        for name in braces(names):
            if len(numbers) == 2:
                shapes[f"{name}.weight"], shapes[f"{name}.bias"] = numbers
            else:
                shapes[name] = numbers[0]
    return shapes


def listed(name: str) -> Shapes:
    """Name -> shape of one of the key lists in tests/golden/wan, which the original code printed."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"keys_{name}.json").read_text())["keys"]}


def skyreels_avatar() -> Shapes:
    """skyreels_v3.md 1.3: all names of the extension model, the patch embedding with 36 channels, and more."""
    plain = listed("wan21_t2v_14B") | {"patch_embedding.weight": (5120, 36, 1, 2, 2)}
    return plain | transcribed(SKYREELS_AVATAR_MORE)


def omniavatar_small() -> Shapes:
    """The 1.3B form of the same table: 1536 wide, 30 blocks, 14 projections (omniavatar.md 1.2)."""
    small = OMNIAVATAR.replace("{0..39}", "{0..29}").replace("{0..18}", "{0..13}")
    return transcribed(small.replace("5120", "1536").replace("13824", "8960"))
