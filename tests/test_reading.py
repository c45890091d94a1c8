"""Weight files: what is read from them, and that every damaged or foreign one is refused by name with the way out."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinora.checkpoints_tools.read import UnreadableFile, read_state
from kinora.checkpoints_tools.safetensors_header import DTYPES, read_header
from kinora.checkpoints_tools.sources import open_files, open_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def sample() -> dict[str, Tensor]:
    """One tensor of each dtype, an empty one, a scalar, and one of odd bytes before a wider dtype."""
    state = {f"of.{name}": torch.randn(3, 5).mul(9).to(dtype) for name, dtype in DTYPES.items()}
    return state | {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "a.odd": torch.zeros(3, dtype=torch.int8)}


def same(a: Tensor, b: Tensor) -> bool:
    bits = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits[0], bits[1])


def write_raw(path: Path, table: dict[str, object], data: bytes, length: int | None = None) -> Path:
    """A safetensors file with exactly this header and data, valid or not."""
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_every_dtype_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = sample()
    save_file(state, tmp_path / "all.safetensors", metadata={"format": "pt"})
    with open_weights(tmp_path / "all.safetensors") as weights, safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert weights.keys() == state.keys()
        for name in weights:
            assert same(weights.read(name), state[name]) and same(weights.map(name), file.get_tensor(name)), name
            assert weights[name].nbytes == state[name].nbytes
        assert {name: (t.dtype, t.shape, t.device.type) for name, t in weights.meta().items()} == {
            name: (t.dtype, t.shape, "meta") for name, t in state.items()
        }
        middle = torch.empty(20, dtype=torch.uint8)
        weights.read_into("of.F32", 8, middle)
        assert torch.equal(middle.view(torch.float32), state["of.F32"].view(-1)[2:7])


def test_a_tensor_at_an_odd_place_is_copied(tmp_path: Path) -> None:
    table = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "wide": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]},
    }
    path = write_raw(tmp_path / "odd.safetensors", table, b"\1\2\3" + struct.pack("<f", 1.5))
    with open_weights(path) as weights:
        assert weights.map("wide").data_ptr() % 4 == 0  # which kernels rely on
        assert weights.map("wide").tolist() == [1.5] and weights.map("odd").tolist() == [1, 2, 3]


def test_mapped_tensors_outlive_the_files_and_do_not_write_into_them(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    state = read_state(tmp_path / "a.safetensors")
    state["a"].zero_()
    assert read_state(tmp_path / "a.safetensors")["a"].sum() == 100


def test_names_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    for file, names in (("2", "ca"), ("1", "db")):
        table, at = {}, 0
        for name in names:
            table[name] = {"dtype": "U8", "shape": [2], "data_offsets": [at, at + 2]}
            at += 2
        write_raw(tmp_path / f"{file}.safetensors", dict(sorted(table.items())), bytes(range(at)))
    with open_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"]) as weights:
        assert weights.in_file_order() == ["d", "b", "c", "a"]
        assert weights.read("b").tolist() == [2, 3]


# -- damaged safetensors ----------------------------------------------------------------------------------------------

ROW = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DAMAGES: dict[str, tuple[dict[str, object], bytes, int | None, str]] = {
    "header longer than the file": (
        {"a": ROW},
        bytes(16),
        10**6,
        r"header is said to be 1,000,000 bytes long, the file has 8\d",
    ),
    "absurd header": ({"a": ROW}, bytes(16), 2**63, "header is said to be"),
    "header cut": ({"a": ROW}, bytes(16), 20, "header is no table of tensors"),
    "data cut": ({"a": ROW}, bytes(12), None, "4 bytes are missing at its end"),
    "data too long": ({"a": ROW}, bytes(17), None, "1 bytes belong to no tensor"),
    "shape of another size": ({"a": {**ROW, "shape": [2, 3]}}, bytes(16), None, r"F32 \[2, 3\] takes 24 bytes"),
    "negative side": ({"a": {**ROW, "shape": [-2, -2]}}, bytes(16), None, "a lies at"),
    "fraction as a side": ({"a": {**ROW, "shape": [2.5, 2]}}, bytes(16), None, "expected whole numbers"),
    "text as a shape": ({"a": {**ROW, "shape": "22"}}, bytes(16), None, "expected whole numbers"),
    "truth as a side": ({"a": {**ROW, "shape": [True, 4]}}, bytes(16), None, "expected whole numbers"),
    "infinite side": ({"a": {**ROW, "shape": [float("inf"), 2]}}, bytes(16), None, "expected whole numbers"),
    "fraction as a place": ({"a": {**ROW, "data_offsets": [0.0, 16.0]}}, bytes(16), None, "expected whole numbers"),
    "absurd side": ({"a": {**ROW, "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b"", None, "is absurd"),
    "unknown dtype": ({"a": {**ROW, "dtype": "F4"}}, bytes(16), None, "dtype F4; known are F64"),
    "overlap": ({"a": ROW, "b": {**ROW, "data_offsets": [8, 24]}}, bytes(24), None, "b begins at byte"),
    "hole": ({"a": ROW, "b": {**ROW, "data_offsets": [20, 36]}}, bytes(36), None, "was expected"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "no table of tensors"),
    "a list": ([1, 2], b"", None, "no table of tensors"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_file_is_named_with_what_was_expected(damage: str, tmp_path: Path) -> None:
    table, data, length, told = DAMAGES[damage]
    path = write_raw(tmp_path / "weights.safetensors", table, data, length)
    with pytest.raises(UnreadableFile, match=told) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_a_file_of_a_few_bytes_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(UnreadableFile, match="it has 3 bytes"):
        open_weights(tmp_path / "x.safetensors")


@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 7)), max_size=4))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_and_never_crashes(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "good.safetensors")
    raw = bytearray((tmp_path / "good.safetensors").read_bytes()[: cut or None])
    for place, bit in flips:
        if place < len(raw):
            raw[place] ^= 1 << bit
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    try:
        entries = read_header(path)
    except UnreadableFile as error:
        assert str(path) in str(error)
    else:  # a flip inside a name or a value: still whole, and every byte is in the file
        assert all(e.offset >= 0 and e.offset + e.nbytes <= len(raw) for e in entries.values() if e.offset is not None)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    with open_weights(tmp_path / "a.safetensors") as weights:
        os.truncate(tmp_path / "a.safetensors", 600)
        with pytest.raises(UnreadableFile, match="ended inside a"):
            weights.read("a")


# -- shards -----------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "index, told",
    [
        (
            {"weight_map": {"a": "one.safetensors", "b": "three.safetensors", "c": "four.safetensors"}},
            "3 shards, of which three.safetensors, four.safetensors are not there",
        ),
        ({"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}}, r"no shard holds where it says: a \(two"),
        ({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}, r"says: a \(two.*, b \(one"),
        ({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}, r": c \(one"),
        ({"weights": {}}, "no index of shards"),
        ({"weight_map": ["a"]}, "no index of shards"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "which is no weight file beside it"),
        ({"weight_map": {"a": "../one.safetensors"}}, "which is no weight file beside it"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards(index: dict, told: str, tmp_path: Path) -> None:
    path = shards(tmp_path)
    path.write_text(json.dumps(index))
    with pytest.raises(UnreadableFile, match=told):
        open_weights(path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "again.safetensors")
    with pytest.raises(UnreadableFile, match=r"b is in .*two\.safetensors and in .*again\.safetensors"):
        open_files([tmp_path / "two.safetensors", tmp_path / "again.safetensors"])


# -- pickles ----------------------------------------------------------------------------------------------------------


class Attack:
    """A pickle that would make a folder if it were executed."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_executed(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2), "hook": Attack(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UnreadableFile, match=r"\(posix\.mkdir\) beside.*never executed.*safetensors\.torch\.save_file"
    ) as caught:
        open_weights(path)
    assert str(path) in str(caught.value) and not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps({"w": Attack(target)}))
    with pytest.raises(UnreadableFile, match=r"weights\.bin"):
        open_weights(path)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_of_pickles_are_read(zipped: bool, tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "t": torch.randn(4, 3).t(), "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with open_weights(tmp_path / "w.pt") as weights:
        for name, value in state.items():
            assert same(weights.read(name), value) and same(weights.map(name), value)
        middle = torch.empty(12, dtype=torch.uint8)
        weights.read_into("t", 8, middle)
        assert torch.equal(middle.view(torch.float32), state["t"].reshape(-1)[2:5])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_pickle_is_named(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert len(whole) > 4300
    for kept in (0, 3, *range(20, 700, 5), 2000, 4200):
        path.write_bytes(whole[:kept])
        # cut inside the name of a class, it asks for a class of another name
        with pytest.raises(UnreadableFile, match=r"cut\.pth (is damaged.*download it again|holds Python objects)"):
            open_weights(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_flipped_bit_is_read_or_named(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pth"
    torch.save({"state_dict": {"w": torch.ones(2, 3), "b": torch.ones(2)}}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 2 % 8)]) + whole[place + 1 :])
        try:
            with open_weights(path) as weights:
                for name in weights:
                    weights.read(name)
        except UnreadableFile as error:
            assert str(path) in str(error)


@pytest.mark.filterwarnings("ignore")  # torch says that it will give some of these up
@pytest.mark.parametrize(
    "value, told",
    [
        (lambda: torch.eye(3).to_sparse(), "w is of the layout torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "w is of the layout torch.sparse_csr"),
        (lambda: torch.ones(3, device="meta"), "w is on the meta device"),
        (lambda: torch.ones(3, dtype=torch.complex64), "w is complex"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "w is quantised"),
    ],
)
def test_only_plain_tensors_are_read(value: Callable[[], Tensor], told: str, tmp_path: Path) -> None:
    torch.save({"w": value()}, tmp_path / "w.pth")
    with pytest.raises(UnreadableFile, match=rf"w\.pth: {told}.*; save it as a plain dense tensor"):
        open_weights(tmp_path / "w.pth")


def test_names_are_text(tmp_path: Path) -> None:
    torch.save({0: torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(UnreadableFile, match="names a tensor 0, which is no text"):
        open_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [{"w": 3}, [torch.ones(1)], torch.ones(2), {"state_dict": {"w": "x"}}])
def test_a_file_without_a_state_dict_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UnreadableFile, match="no plain state dict"):
        open_weights(tmp_path / "other.pt")
