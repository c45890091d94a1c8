"""The counters of library kernels in a CUDA graph, on a chain of nodes that is run here, and on a GPU for real."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinora.graphs import capture
from kinora.graphs.capture import Replay
from kinora.graphs.graph_nodes import CLEAR, KERNEL, Clear
from kinora.graphs.join_clears import COUNTING, LARGEST, PATTERN, PITCH, Counters, chain_of, find, join_clears

COUNTS = COUNTING[0] + "128x128"
COPY = 1  # the kind of a node that is neither
CPU = torch.device("cpu")


NOTHING = Clear(0, 0, 1, 0)


@dataclass
class Node:
    kind: int
    clear: Clear = NOTHING
    name: str = ""
    words: tuple[int, ...] = ()


def clear(address: int, size: int = 4, rows: int = 1, value: int = 0) -> Node:
    return Node(CLEAR, Clear(address, size, rows, value))


def kernel(*words: int, name: str = COUNTS) -> Node:
    return Node(KERNEL, name=name, words=(7, *words))


@dataclass
class FakeNodes:
    """A graph by what `Nodes` says of it; its nodes are numbers, and `edges` (first, second)."""

    nodes: dict[int, Node]
    edges: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def chain(cls, *nodes: Node) -> "FakeNodes":
        numbers = range(1, len(nodes) + 1)
        return cls(
            {i: replace(node) for i, node in zip(numbers, nodes, strict=True)},
            set(pairwise(numbers)),
        )

    def all(self) -> list[int]:
        return list(self.nodes)

    def before(self, node: int) -> list[int]:
        return [first for first, second in self.edges if second == node]

    def after(self, node: int) -> list[int]:
        return [second for first, second in self.edges if first == node]

    def kind(self, node: int) -> int:
        return self.nodes[node].kind

    def clear(self, node: int) -> Clear:
        return self.nodes[node].clear

    def name(self, node: int) -> str:
        return self.nodes[node].name

    def arguments(self, node: int) -> list[bytes]:
        words = self.nodes[node].words
        return [b"\x07", struct.pack(f"<{len(words)}Q", *words) + b"\x01\x02\x03"]

    def set_arguments(self, node: int, arguments: Sequence[bytes]) -> None:
        self.nodes[node].words = struct.unpack_from(f"<{len(arguments[1]) // 8}Q", arguments[1])

    def remove(self, node: int) -> None:
        before, after = self.before(node), self.after(node)
        del self.nodes[node]
        self.edges = {edge for edge in self.edges if node not in edge} | {(a, b) for a in before for b in after}

    def connect(self, first: int, second: int) -> None:
        self.edges.add((first, second))

    def add_clear(self, address: int, rows: int, width: int, pitch: int) -> int:
        number = max(self.nodes) + 1
        self.nodes[number] = Node(CLEAR, Clear(address, pitch * rows, 1, 0))
        return number


def joined(*nodes: Node) -> list[int]:
    """Which clears of a chain can be joined, by number."""
    graph = FakeNodes.chain(*nodes)
    return [found.clear for found in find(graph, chain_of(graph))]  # type: ignore[arg-type]


def seen(graph: FakeNodes, replays: int = 2) -> list[list[int]]:
    """What every kernel reads at the addresses it is given, in order; each then leaves a mark there."""
    memory: dict[int, int] = {}
    found = []
    for turn in range(replays):
        for number in chain_of(graph):  # type: ignore[arg-type]
            node = graph.nodes[number]
            if node.kind == CLEAR:
                memory = {
                    at: value for at, value in memory.items() if not 0 <= at - node.clear.address < node.clear.size
                }
            elif node.kind == KERNEL:
                found.append([memory.get(word, 0) for word in node.words[1:]])
                memory |= dict.fromkeys(node.words[1:], 1000 * turn + number)
    return found


def test_counters_are_joined() -> None:
    chain = clear(64), kernel(64, 500), kernel(500, name="norm"), clear(64), kernel(64, 500)
    graph = FakeNodes.chain(*chain)
    counters = join_clears(graph, CPU)  # type: ignore[arg-type]
    assert counters is not None and counters.memory.shape == (4, PITCH) and counters.kept()
    order = chain_of(graph)  # type: ignore[arg-type]
    assert [graph.kind(node) for node in order] == [CLEAR, KERNEL, KERNEL, KERNEL]
    own = [graph.nodes[node].words[1] - counters.memory.data_ptr() for node in (order[1], order[3])]
    assert own == [PITCH, 2 * PITCH] and graph.nodes[order[1]].words[2] == 500
    assert seen(graph) == seen(FakeNodes.chain(*chain))


@pytest.mark.parametrize(
    "nodes",
    [
        [clear(64, value=1), kernel(64)],
        [clear(64, size=400), kernel(64)],
        [clear(64, rows=2), kernel(64)],
        [clear(64), kernel(64, name="at::native::reduce_kernel")],
        [clear(64), kernel(64, 64)],
        [clear(64, size=16), kernel(64, 72)],
        [clear(64), kernel(8)],
        [clear(64, size=16), kernel(72)],
        [clear(64), kernel(64), kernel(64, name="reads a maximum")],
        [kernel(64, name="reads a maximum of the replay before"), clear(64), kernel(64)],
        [clear(64), kernel(64), Node(COPY)],
        [kernel(64), clear(64)],
    ],
    ids=lambda nodes: "",
)
def test_others_stay(nodes: list[Node]) -> None:
    assert joined(*nodes) == []
    graph = FakeNodes.chain(*nodes)
    assert join_clears(graph, CPU) is None and graph == FakeNodes.chain(*nodes)  # type: ignore[arg-type]


def test_a_later_clear_ends_what_can_be_read() -> None:
    reader = kernel(64, name="norm")
    assert joined(clear(64), kernel(64), clear(0, 128), reader) == [1]
    assert joined(clear(64), kernel(64), clear(65, 3), reader) == []


def test_a_graph_that_is_no_chain_stays() -> None:
    for fork in ((1, 4), (2, 4)):
        graph = FakeNodes.chain(clear(64), kernel(64), kernel(8))
        graph.nodes[4] = kernel(64, name="reads a maximum")
        graph.edges.add(fork)
        assert join_clears(graph, CPU) is None  # type: ignore[arg-type]
    assert join_clears(FakeNodes({}), CPU) is None  # type: ignore[arg-type]


ADDRESS = st.sampled_from([64, 72, 80, 88])
NODES = st.one_of(
    st.builds(clear, ADDRESS, st.sampled_from([4, 8, 16])),
    ADDRESS.flatmap(lambda at: st.builds(kernel, st.just(at), ADDRESS, name=st.sampled_from([COUNTS, "norm"]))),
    st.builds(kernel, ADDRESS, name=st.just(COUNTS)),
)


@given(st.lists(NODES, min_size=1, max_size=14))
def test_every_kernel_sees_what_it_saw(nodes: list[Node]) -> None:
    graph = FakeNodes.chain(*nodes)
    counters = join_clears(graph, CPU)  # type: ignore[arg-type]
    assert seen(graph) == seen(FakeNodes.chain(*nodes))
    assert counters is None or len(counters) == len(nodes) + 1 - len(graph.nodes)


def test_a_kernel_that_leaves_its_counter_is_noticed() -> None:
    graph = FakeNodes.chain(clear(64), kernel(64))
    counters = join_clears(graph, CPU)  # type: ignore[arg-type]
    assert isinstance(counters, Counters)
    counters.memory[1, :LARGEST] = 1
    assert len(counters) == 1 and counters.kept()
    for row, byte in ((0, PITCH - 1), (1, LARGEST), (1, PITCH - 1), (2, 0)):
        counters.memory[row, byte] = 0
        assert not counters.kept()
        counters.memory[row, byte] = PATTERN


class FakeGraph:
    """What a recording needs of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def raw_cuda_graph(self) -> int:
        return 0

    def instantiate(self) -> None:
        self.done.append("instantiate")

    def replay(self) -> None:
        self.done.append("replay")


def counters_of(kept: bool) -> Counters:
    memory = torch.full((3, PITCH), PATTERN, dtype=torch.uint8)
    memory[1, LARGEST] = PATTERN if kept else 0
    return Counters(memory)


def test_a_recording_is_tried_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, counters = FakeGraph(), counters_of(kept=True)
    monkeypatch.setattr(capture, "Nodes", lambda address: None)
    monkeypatch.setattr(capture, "join_clears", lambda nodes, device: counters)
    recording = capture._joined(graph, CPU)  # type: ignore[arg-type]
    assert recording is not None and recording.counters is counters and graph.done == ["instantiate", "replay"]


@pytest.mark.parametrize(
    "problem", [AttributeError("cuFuncGetName"), OSError("libcuda"), RuntimeError("refused"), None]
)
def test_what_cannot_be_joined_is_recorded_as_it_is(monkeypatch: pytest.MonkeyPatch, problem: Exception | None) -> None:
    """An older driver, none, one that refuses; and a kernel that writes beside its counter."""

    def join(nodes: object, device: torch.device) -> Counters:
        if problem is not None:
            raise problem
        return counters_of(kept=False)

    monkeypatch.setattr(capture, "Nodes", lambda address: None)
    monkeypatch.setattr(capture, "join_clears", join)
    with pytest.warns(UserWarning, match="one by one"):
        assert capture._joined(FakeGraph(), CPU) is None  # type: ignore[arg-type]


class Products:
    """Three products of a transformer of 14B in e4m3, each over the result of the one before."""

    def __init__(self) -> None:
        device = torch.device("cuda")
        generator = torch.Generator(device).manual_seed(0)
        weights = torch.randn(3, 5120, 5120, device=device, generator=generator) / 5120**0.5
        self.weights = weights.to(torch.float8_e4m3fn)
        self.x = torch.randn(3168, 5120, device=device, generator=generator).to(torch.float8_e4m3fn)
        self.rows, self.columns = torch.ones(3168, 1, device=device), torch.ones(1, 5120, device=device)
        self.out = torch.zeros(3, 3168, 5120, dtype=torch.bfloat16, device=device)
        self.rounded = torch.empty_like(self.x)

    def run(self) -> None:
        x = self.x
        for weight, out in zip(self.weights, self.out, strict=True):
            torch._scaled_mm(x, weight.t(), self.rows, self.columns, out_dtype=torch.bfloat16, out=out)
            x = self.rounded.copy_(out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_products_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for join in (True, False):
        monkeypatch.setattr(capture, "JOIN_CLEARS", join)
        products = Products()
        replay = Replay(products.run, products.x.device)
        for scale in (1, 2):
            products.rows.fill_(scale)
            products.out.zero_()
            replay()
            found.append(products.out.clone())
        assert replay.graph is not None
        if join and torch.cuda.get_device_capability()[0] == 9:
            assert replay.graph.counters is not None and len(replay.graph.counters) == 3
            assert replay.graph.counters.kept()
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert found[0].norm() > 0 and not torch.equal(found[0], found[1])
