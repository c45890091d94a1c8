"""Things that are expensive to make and can be used again, one user at a time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class IdlePool(Generic[K, T]):
    """Hands out objects by key, building one when none of that key is idle; those given back wait for the next user.

    At most `bound` objects wait, in all: when more are given back, the one that waited longest is dropped, and before
    one is built the pool makes room for it in the same way, so that what is idle does not add to a peak in memory.
    What is handed out is not counted and not held. Not safe for threads by itself.
    """

    def __init__(self, build: Callable[[K], T], bound: int):
        self.build = build
        self.bound = bound
        self._idle: OrderedDict[int, tuple[K, T]] = OrderedDict()  # the longest waiting first
        self._count = 0

    def __len__(self) -> int:
        """How many are idle."""
        return len(self._idle)

    def take(self, key: K) -> T:
        """The idle object of `key` that was used last, or a new one."""
        for number in reversed(self._idle):
            if self._idle[number][0] == key:
                return self._idle.pop(number)[1]
        self._shrink(self.bound - 1)
        return self.build(key)

    def give(self, key: K, item: T) -> None:
        """Take back what `take(key)` gave."""
        self._shrink(self.bound - 1)
        if self.bound:
            self._idle[self._count] = key, item
            self._count += 1

    def clear(self) -> None:
        """Drop everything that is idle."""
        self._idle.clear()

    def _shrink(self, count: int) -> None:
        while len(self._idle) > max(count, 0):
            self._idle.popitem(last=False)
