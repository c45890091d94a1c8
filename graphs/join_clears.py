"""The counters of library kernels in a recorded CUDA graph: cleared all at once, not one before every kernel.

cuBLASLt's products and cuDNN's attention hand out their tiles through a counter of four bytes, which a memset before
each launch clears. In a graph every such memset is a node between two kernels: 4.2 us on an H200 where kernels follow
each other in 0.65, 357 times in a denoising step of LiveAvatar 14B (`bench/results/h200/gaps.txt`). `join_clears` gives
each of those kernels a counter of its own, and one node at the start of the graph clears them all.

A clear is joined where nothing else can depend on it: a few bytes, followed by one kernel of `COUNTING`, whose
parameters hold the address once and no address inside; and no kernel after it mentions the bytes before they are
cleared again. The others stay, and so do all of a graph that is no chain. Whether a kernel kept to its counter shows
afterwards (`Counters.kept`): the bytes around each hold a pattern.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph_nodes import CLEAR, KERNEL, Clear, Nodes

COUNTING = ("nvjet_", "cudnn_generated_fort_native_sdpa_")
"""How the names of kernels begin of which it is known that what is cleared before them is a counter of their own."""
PITCH = 256  # bytes from one counter to the next
LARGEST = 16  # bytes of a counter; the others hold PATTERN
PATTERN = 0xAB
WORD = 8
Words = list[tuple[int, ...]]
"""What a kernel is given, piece by piece, as words of eight bytes; addresses are aligned to them."""


@dataclass(frozen=True)
class Joined:
    """A clear that needs no node: its node, the kernel after it, and where that has the address: (piece, byte)."""

    clear: int
    kernel: int
    place: tuple[int, int]


@dataclass(frozen=True)
class Counters:
    """The memory of the counters, to be kept as long as the graph."""

    memory: Tensor  # uint8 [1 + n + 1, PITCH]; the first and the last row are no counters

    def __len__(self) -> int:
        return len(self.memory) - 2

    def address(self, number: int) -> int:
        return self.memory[1 + number].data_ptr()

    def kept(self) -> bool:
        """Whether no kernel that ran so far wrote beside its counter, up to the next ones."""
        untouched = self.memory == PATTERN
        return bool(untouched[1:-1, LARGEST:].all() and untouched[[0, -1]].all())


def join_clears(nodes: Nodes, device: torch.device) -> Counters | None:
    """Join what can be in a graph that is not instantiated yet; None, and the graph as it was, where nothing can."""
    chain = chain_of(nodes)
    joined = find(nodes, chain)
    if not joined:
        return None
    counters = Counters(torch.full((len(joined) + 2, PITCH), PATTERN, dtype=torch.uint8, device=device))
    for number, found in enumerate(joined):
        pieces, (piece, at) = nodes.arguments(found.kernel), found.place
        own = counters.address(number).to_bytes(WORD, "little")
        pieces[piece] = pieces[piece][:at] + own + pieces[piece][at + WORD :]
        nodes.set_arguments(found.kernel, pieces)
        nodes.remove(found.clear)
    removed = {found.clear for found in joined}
    first = next(node for node in chain if node not in removed)
    nodes.connect(nodes.add_clear(counters.address(0), len(joined), LARGEST, PITCH), first)
    return counters


def chain_of(nodes: Nodes) -> list[int]:
    """All nodes from the first to the last; nothing if they do not simply follow each other."""
    every = nodes.all()
    starts = [node for node in every if not nodes.before(node)]
    chain = starts[:1]
    while len(chain) <= len(every):
        after = nodes.after(chain[-1]) if chain else []
        if len(after) != 1:
            break
        chain += after
    return chain if len(chain) == len(every) else []


def find(nodes: Nodes, chain: Sequence[int]) -> list[Joined]:
    """The clears of a chain that can be joined."""
    kinds = [nodes.kind(node) for node in chain]
    clears = {i: nodes.clear(chain[i]) for i, kind in enumerate(kinds) if kind == CLEAR}
    words = {i: _words(nodes.arguments(chain[i])) for i, kind in enumerate(kinds) if kind == KERNEL}
    found = []
    for i, clear in clears.items():
        if clear.value or clear.rows > 1 or clear.size > LARGEST or i + 1 not in words:
            continue
        places = _mentions(words[i + 1], clear)
        if len(places) != 1 or places[0][2] != clear.address or not nodes.name(chain[i + 1]).startswith(COUNTING):
            continue
        if not _read_later(i + 1, clear, clears, words, len(chain)):
            found.append(Joined(chain[i], chain[i + 1], places[0][:2]))
    return found


def _words(pieces: Sequence[bytes]) -> Words:
    return [struct.unpack_from(f"<{len(piece) // WORD}Q", piece) for piece in pieces]


def _mentions(words: Words, clear: Clear) -> list[tuple[int, int, int]]:
    """Every word that is an address in what is cleared: (piece, byte, address)."""
    low, high = clear.address, clear.address + clear.size
    return [
        (piece, at * WORD, word) for piece, row in enumerate(words) for at, word in enumerate(row) if low <= word < high
    ]


def _read_later(
    kernel: int, clear: Clear, clears: Mapping[int, Clear], words: Mapping[int, Words], length: int
) -> bool:
    """Whether something after node number `kernel` may read what was cleared, before it is cleared again.

    The chain is replayed again and again, so what follows its end is its beginning.
    """
    for step in range(1, length):
        i = (kernel + step) % length
        if i in clears:
            if clears[i].address <= clear.address and clear.address + clear.size <= clears[i].address + clears[i].size:
                return False
        elif i not in words or _mentions(words[i], clear):  # a copy may read anything
            return True
    return False
