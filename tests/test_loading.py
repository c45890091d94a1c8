"""Loading tensor by tensor: the same bits as loading whole, nothing read for a wrong file, and little memory."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kinora.checkpoints_tools.assign import KeyMismatch
from kinora.checkpoints_tools.keymaps import SameNames, wav2vec2_keymap
from kinora.checkpoints_tools.keymaps_dit import WAN_DIFFUSERS
from kinora.checkpoints_tools.liveavatar import LORA_ALPHA, LoraMismatch, load_liveavatar
from kinora.checkpoints_tools.load import Fp8, load_module
from kinora.checkpoints_tools.lora import is_target, merge_lora, read_lora
from kinora.checkpoints_tools.sources import Weights, open_weights
from kinora.checkpoints_tools.stream import stream_tensors
from kinora.graphs.models.layers import Linear
from kinora.graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from kinora.graphs.quantize import Fp8Linear, quantize_linears
from safetensors.torch import save_file
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = LiveAvatarConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=8, audio_dim=8, audio_layers=3,
    audio_inject_layers=(0, 1), in_dim=16, out_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small LiveAvatar in two shards and its LoRA."""
    folder = tmp_path_factory.mktemp("liveavatar")
    torch.manual_seed(0)
    weights = {key: (0.2 * torch.randn_like(v)).bfloat16() for key, v in LiveAvatar(CONFIG).state_dict().items()}
    keys, index = sorted(weights), {}
    for part in range(2):
        save_file({key: weights[key] for key in keys[part::2]}, folder / f"{part}.safetensors")
        index |= dict.fromkeys(keys[part::2], f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    lora = {}
    for module in (key.removesuffix(".weight") for key in weights if key.endswith(".weight")):
        if is_target(module):
            rows, columns = weights[f"{module}.weight"].shape
            lora[f"{module}.lora_A.default.weight"] = torch.randn(4, columns).bfloat16()
            lora[f"{module}.lora_B.default.weight"] = 0.1 * torch.randn(rows, 4).bfloat16()
    save_file(lora, folder / "lora.safetensors")
    return folder / "model.safetensors.index.json", folder / "lora.safetensors"


def whole(files: tuple[Path, Path], dtype: torch.dtype) -> LiveAvatar:
    """The slow way: everything at once."""
    with open_weights(files[0]) as base, open_weights(files[1]) as lora:
        state = {name: base.read(name).to(DEVICE) for name in base}
        merge_lora(state, {name: lora.read(name) for name in lora}, LORA_ALPHA)
    model = LiveAvatar(CONFIG).to(DEVICE)
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return model


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == value.dtype and torch.equal(one[key].view(torch.uint8), value.view(torch.uint8))
        for key, value in other.items()
    )


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_on_the_way_equals_merged_whole(files: tuple[Path, Path], dtype: torch.dtype) -> None:
    model = load_liveavatar(*files, CONFIG, dtype=dtype, device=DEVICE)
    assert same_bits(model, whole(files, dtype))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.device.type == DEVICE.type


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_quantised_on_the_way_equals_quantised_whole(files: tuple[Path, Path], granularity) -> None:
    model = load_liveavatar(*files, CONFIG, dtype=torch.bfloat16, device=DEVICE, fp8=Fp8(granularity))
    other = whole(files, torch.bfloat16)
    replaced = quantize_linears(other, granularity=granularity)
    assert same_bits(model, other)
    layer = model.get_submodule(replaced[0])
    assert isinstance(layer, Fp8Linear) and layer.weight.dtype == torch.float8_e4m3fn and layer.dtype == torch.bfloat16
    assert isinstance(model.head.head, Linear)


def test_nothing_but_names_is_read_of_a_wrong_file(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Weights, "read", fail)
    monkeypatch.setattr(Weights, "read_into", fail)
    with torch.device("meta"):
        toy = nn.Sequential(nn.Linear(3, 3))
    with open_weights(files[0]) as weights, pytest.raises(KeyMismatch, match=r"2 missing: 0\.weight, 0\.bias"):
        load_module(toy, weights, SameNames("toy"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({key: value.to(dtype) for key, value in Toy().state_dict().items()}, tmp_path / "toy.safetensors")
    with torch.device("meta"):
        toy = Toy()
    with open_weights(tmp_path / "toy.safetensors") as weights, pytest.raises(KeyMismatch) as caught:
        load_module(toy, weights, SameNames("toy"))
    assert f"a.weight {dtype} [16, 6], expected torch.float32 [16, 6]" in caught.value.misshaped
    assert "of another shape or type: " in str(caught.value)


def test_a_lora_of_other_shapes_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with open_weights(files[1]) as lora:
        state = {name: lora.read(name) for name in lora}
    name = "blocks.0.ffn.0.lora_A.default.weight"
    save_file(state | {name: torch.zeros(4, 31)}, tmp_path / "lora.safetensors")
    with pytest.raises(LoraMismatch, match=r"blocks\.0\.ffn\.0: lora_B \(48, 4\) @ lora_A \(4, 31\)"):
        load_liveavatar(files[0], tmp_path / "lora.safetensors", CONFIG, dtype=torch.bfloat16, device=DEVICE)


# -- tables, buffers, what stays mapped -------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two layers and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = Linear(6, 16), nn.BatchNorm1d(16), Linear(16, 32)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_buffers_are_loaded_and_whole_numbers_keep_their_dtype(tmp_path: Path) -> None:
    source = Toy()
    source.norm.num_batches_tracked += 5
    save_file(source.state_dict(), tmp_path / "toy.safetensors")
    with torch.device("meta"):
        toy = Toy()
    with open_weights(tmp_path / "toy.safetensors") as weights:
        load_module(toy, weights, SameNames("toy"), dtype=torch.float16, device=DEVICE)
    assert toy.norm.num_batches_tracked.tolist() == 5 and toy.norm.running_var.dtype == torch.float16
    assert torch.equal(toy.a.weight.cpu(), source.a.weight.half())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="only the CPU can use the file's own pages")
def test_on_the_cpu_what_nothing_changes_stays_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Toy()
    save_file(source.state_dict(), tmp_path / "toy.safetensors")
    read: list[str] = []
    plain = Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, name: read.append(name) or plain(self, name))
    lora = {"a.lora_A.weight": torch.randn(2, 6), "a.lora_B.weight": torch.randn(16, 2)}
    with torch.device("meta"):
        toy = Toy()
    with open_weights(tmp_path / "toy.safetensors") as weights:
        load_module(toy, weights, SameNames("toy"), lora=read_lora(lora, weights), fp8=Fp8(ignore=("a",)))
    assert sorted(read) == ["a.weight", "b.weight"]
    assert isinstance(toy.b, Fp8Linear) and toy.b.dtype == torch.float32
    merged = source.a.weight + lora["a.lora_B.weight"] @ lora["a.lora_A.weight"]
    assert torch.allclose(toy.a.weight, merged) and torch.equal(toy.b.bias, source.b.bias)


def test_diffusers_names_load_into_our_graph(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from kinora.graphs.models.wan import WanModel
    from kinora.graphs.models.wan_configs import WanConfig

    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=8, ffn_dim=20, num_layers=2
    )
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        ours = WanModel(WanConfig(dim=24, ffn_dim=20, num_heads=2, num_layers=2, text_dim=16, freq_dim=8))
    with open_weights(tmp_path / "w.safetensors") as weights:
        load_module(ours, weights, WAN_DIFFUSERS.inverse(), device=DEVICE)
    state = {name: value.cpu() for name, value in ours.state_dict().items()}
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in WAN_DIFFUSERS.apply(state)[0].items())
    with torch.device("meta"):
        deeper = WanModel(WanConfig(24, 20, 2, 3, text_dim=16, freq_dim=8))
    with open_weights(tmp_path / "w.safetensors") as weights, pytest.raises(KeyMismatch) as caught:
        load_module(deeper, weights, SameNames("Wan"))
    assert "blocks.2.modulation" in caught.value.missing
    assert "condition_embedder.time_proj.weight" in caught.value.unexpected


def test_an_optional_tensor_becomes_zeros(tmp_path: Path) -> None:
    from kinora.runtime.encoders.wav2vec import Wav2Vec2Encoder, Wav2Vec2Size

    convolutions = {"conv_channels": (8,) * 7, "conv_bias": True, "conv_norm": "layer"}
    size = Wav2Vec2Size(16, 2, 1, 24, stable=True, **convolutions, position_kernel=8, position_groups=2)
    source = Wav2Vec2Encoder(size)
    state = {k: v.contiguous() for k, v in source.model.state_dict().items() if k != "masked_spec_embed"}
    save_file(state, tmp_path / "w.safetensors")
    with torch.device("meta"):
        target = Wav2Vec2Encoder(size)
    with open_weights(tmp_path / "w.safetensors") as weights:
        load_module(target.model, weights, wav2vec2_keymap(weights), device=DEVICE)
    assert target.model.masked_spec_embed.tolist() == [0.0] * 16
    wave = torch.randn(1, 4000)
    assert torch.allclose(target(wave.to(DEVICE))[-1].cpu(), source(wave)[-1], atol=1e-4)


# -- streaming --------------------------------------------------------------------------------------------------------


def test_tensors_of_every_size_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end inside, at and behind the end of a tensor; more tensors than buffers."""
    monkeypatch.setattr("kinora.checkpoints_tools.stream.PIECE", 1000)
    sizes = [0, 1, 499, 500, 501, 1000, 1001, 2600, *([7] * 60)]
    state = {f"t{i:02d}": torch.randint(-99, 99, (size,), dtype=torch.int16) for i, size in enumerate(sizes)}
    save_file(state, tmp_path / "t.safetensors")
    with open_weights(tmp_path / "t.safetensors") as weights:
        found = {name: value.clone() for name, value in stream_tensors(weights, list(state), DEVICE, 3)}
        assert list(found) == list(state)
        assert all(torch.equal(found[name].cpu(), value) for name, value in state.items())
        first = next(stream_tensors(weights, list(state)[1:], DEVICE, 3))  # and a caller may stop early
        assert torch.equal(first[1].cpu(), state["t01"])


# -- FP8 --------------------------------------------------------------------------------------------------------------


def test_quantised_weights_are_within_half_a_step(tmp_path: Path) -> None:
    """e4m3 has 3 bits behind the point: half a step is 1/16 of the value, or 2^-10 of the scale near zero."""
    weight = torch.randn(64, 512) * torch.logspace(-6, 3, 64)[:, None]
    weight[5], weight[6, 0] = 0.0, 1e6
    save_file({"0.weight": weight.double(), "0.bias": torch.zeros(64).double()}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(Linear(512, 64))
    with open_weights(tmp_path / "w.safetensors") as weights:
        load_module(model, weights, SameNames("one layer"), device=DEVICE, fp8=Fp8())
    layer = model[0]
    assert isinstance(layer, Fp8Linear) and layer.dtype == torch.float64  # as stored
    descale = layer.weight_descale.cpu()
    back = layer.weight.cpu().float() * descale
    error = (back - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, descale * 2**-10) * (1 + 1e-5)).all())
    assert not back[5].any() and bool(descale.isfinite().all())
    largest = weight.abs().amax(1, keepdim=True)
    assert torch.allclose(back.abs().amax(1, keepdim=True), largest, rtol=1e-6)  # the largest of a row is exact
    rows = [row for row in range(64) if row not in (5, 6)]
    noise = (error[rows] ** 2).sum(1) / (weight[rows] ** 2).sum(1)
    assert bool((10 * torch.log10(1 / noise) > 29).all())  # dB, in every row whatever its size


MIB = 2**20

# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from kinora.bench.loading import memory_of_process, peak_memory
from kinora.checkpoints_tools.keymaps import SameNames
from kinora.checkpoints_tools.load import Fp8, load_module
from kinora.checkpoints_tools.lora import read_lora
from kinora.checkpoints_tools.sources import open_weights
from kinora.checkpoints_tools.stream import stream_tensors
from kinora.graphs.models.layers import Linear
from kinora.graphs.quantize import quantize_linears
way, path, layers, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
with torch.device("meta"):
    model = torch.nn.Sequential(*(Linear(side, side, bias=False) for _ in range(layers)))
(torch.ones(64, 64) @ torch.ones(64, 64)).to("meta")  # what torch loads when it is first used
with open_weights(path) as weights, peak_memory(0.001) as peak:
    if way == "read":
        for _, value in stream_tensors(weights, list(weights), torch.device("meta")):
            pass
    elif way == "whole":
        model = model.to_empty(device="cpu").to(torch.bfloat16)
        model.load_state_dict({name: weights.read(name) for name in weights}, assign=True)
        quantize_linears(model)
    else:
        shapes = {"A": (2, side), "B": (side, 2)}
        lora = {f"{i}.lora_{s}.weight": torch.ones(shapes[s]) for i in range(layers) for s in "AB"}
        load_module(model, weights, SameNames("toy"), lora=read_lora(lora, weights), fp8=Fp8(), dtype=torch.bfloat16)
print(max(peak.get("RssAnon", 0), 1))
"""


def growth(way: str, path: Path, layers: int, side: int) -> int:
    """Bytes by which a fresh process's own memory grows."""
    command = [sys.executable, "-c", MEASURE, way, str(path), str(layers), str(side)]
    # every tensor in pages of its own, so that what is freed is given back: the loader is measured, not the allocator
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=surroundings).stdout)


def sparse(path: Path, layers: int, side: int) -> Path:
    """Bfloat16 zeros that take no disk: a header, and a file of the right length."""
    size = 2 * side * side
    places = {f"{i}.weight": [i * size, (i + 1) * size] for i in range(layers)}
    table = {k: {"dtype": "BF16", "shape": [side, side], "data_offsets": v} for k, v in places.items()}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + layers * size)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_host_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    layers, side = 64, 2048  # 8 MiB each, 512 MiB in all
    path = sparse(tmp_path / "big.safetensors", layers, side)
    assert growth("read", path, layers, side) < 40 * MIB  # one tensor, and what Python needs
    ceiling = layers * side * side + 160 * MIB  # the FP8 model, and the float32 work on one tensor of 8 MiB
    assert growth("stream", path, layers, side) < ceiling
    assert growth("whole", path, layers, side) > ceiling  # or the measure would show nothing


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
