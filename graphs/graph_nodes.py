"""The nodes of a recorded CUDA graph, read and changed through the CUDA driver before the graph is instantiated.

Source: "Graph Management" and "Execution Control" in NVIDIA's CUDA Driver API reference; structures as of CUDA 12.4,
the first whose driver tells which bytes a kernel was given.
Errors: RuntimeError for what the driver refuses, AttributeError from an older driver.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

KERNEL, CLEAR = 0, 2  # of CUgraphNodeType; a memset of another value than zero is also of kind 2
INVALID_VALUE = 1  # of CUresult
BUFFER, BUFFER_SIZE, END = 1, 2, 0  # how a launch names a buffer with all of its parameters


class _Memset(ctypes.Structure):
    _fields_ = [
        ("dst", c_uint64),
        ("pitch", c_size_t),
        ("value", c_uint),
        ("element", c_uint),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("function", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("parameters", POINTER(c_void_p)),
        ("extra", POINTER(c_uint64)),
        ("kernel", c_void_p),
        ("context", c_void_p),
    ]


@dataclass(frozen=True)
class Clear:
    """What a memset node does: `size` bytes (of each of `rows`) at `address` become `value`."""

    address: int
    size: int
    rows: int
    value: int


class Nodes:
    """A `cudaGraph_t` by its address, `torch.cuda.CUDAGraph.raw_cuda_graph`; nodes are addresses too."""

    def __init__(self, graph: int):
        self.graph = c_void_p(graph)
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.layouts: dict[int, list[int]] = {}  # kernel -> bytes of each of its parameters

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def _listed(self, call: Callable[..., None]) -> list[int]:
        """What a call of the kind "array or null, and how many" gives."""
        count = c_size_t()
        call(None, byref(count))
        if not count.value:
            return []
        found = (c_void_p * count.value)()
        call(found, byref(count))
        return [node for node in found if node is not None]

    def _neighbours(self, name: str, node: int) -> list[int]:
        def call(found: Any, count: Any) -> None:
            edges = None if found is None else (c_uint64 * len(found))()
            self._call(name, c_void_p(node), found, edges, count)

        return self._listed(call)

    def all(self) -> list[int]:
        return self._listed(lambda found, count: self._call("cuGraphGetNodes", self.graph, found, count))

    def before(self, node: int) -> list[int]:
        return self._neighbours("cuGraphNodeGetDependencies_v2", node)

    def after(self, node: int) -> list[int]:
        return self._neighbours("cuGraphNodeGetDependentNodes_v2", node)

    def kind(self, node: int) -> int:
        kind = c_int()
        self._call("cuGraphNodeGetType", c_void_p(node), byref(kind))
        return kind.value

    def clear(self, node: int) -> Clear:
        """Of a node of kind CLEAR."""
        found = _Memset()
        self._call("cuGraphMemsetNodeGetParams", c_void_p(node), byref(found))
        return Clear(found.dst, found.width * found.element, max(found.height, 1), found.value)

    def name(self, node: int) -> str:
        """Of the kernel of a node of kind KERNEL."""
        kernel, found = self._kernel(node), c_char_p()
        if kernel.function:
            self._call("cuFuncGetName", byref(found), c_void_p(kernel.function))
        else:
            self._call("cuKernelGetName", byref(found), c_void_p(kernel.kernel))
        return (found.value or b"").decode()

    def arguments(self, node: int) -> list[bytes]:
        """The bytes that the kernel of a node is given: one item for each parameter, or one for all of them."""
        return [ctypes.string_at(*place) for place in self._places(self._kernel(node))]

    def set_arguments(self, node: int, arguments: Sequence[bytes]) -> None:
        """Give it others, of the same sizes."""
        kernel = self._kernel(node)
        copies = [ctypes.create_string_buffer(data, len(data)) for data in arguments]
        addresses = [ctypes.addressof(copy) for copy in copies]
        if kernel.parameters:
            kernel.parameters = ctypes.cast((c_void_p * len(copies))(*addresses), POINTER(c_void_p))
        else:
            size = c_size_t(len(copies[0]))
            named = (c_uint64 * 5)(BUFFER, addresses[0], BUFFER_SIZE, ctypes.addressof(size), END)
            kernel.extra = ctypes.cast(named, POINTER(c_uint64))
        self._call("cuGraphKernelNodeSetParams_v2", c_void_p(node), byref(kernel))  # copies them

    def remove(self, node: int) -> None:
        """Take a node out, and put those after it behind those before it."""
        before, after = self.before(node), self.after(node)
        self._call("cuGraphDestroyNode", c_void_p(node))
        for second in after:
            there = self.before(second)
            for first in before:
                if first not in there:
                    self.connect(first, second)

    def connect(self, first: int, second: int) -> None:
        self._call("cuGraphAddDependencies", self.graph, byref(c_void_p(first)), byref(c_void_p(second)), c_size_t(1))

    def add_clear(self, address: int, rows: int, width: int, pitch: int) -> int:
        """A node that clears `width` bytes of each of `rows`, `pitch` bytes apart; in no order with the others yet."""
        context, node = c_void_p(), c_void_p()
        self._call("cuCtxGetCurrent", byref(context))
        wanted = _Memset(address, pitch, 0, 1, width, rows)
        self._call("cuGraphAddMemsetNode", byref(node), self.graph, None, c_size_t(0), byref(wanted), context)
        assert node.value is not None
        return node.value

    def _kernel(self, node: int) -> _Kernel:
        found = _Kernel()
        self._call("cuGraphKernelNodeGetParams_v2", c_void_p(node), byref(found))
        return found

    def _places(self, kernel: _Kernel) -> list[tuple[int, int]]:
        """Address and size of each piece of a kernel's parameters."""
        if kernel.parameters:
            return [(kernel.parameters[i] or 0, size) for i, size in enumerate(self._layout(kernel))]
        if not kernel.extra:
            return []
        words = kernel.extra
        named = {words[0]: words[1], words[2]: words[3]}
        return [(named[BUFFER], c_size_t.from_address(named[BUFFER_SIZE]).value)]

    def _layout(self, kernel: _Kernel) -> list[int]:
        function = kernel.function or kernel.kernel or 0
        if function not in self.layouts:
            describe = self.driver.cuFuncGetParamInfo if kernel.function else self.driver.cuKernelGetParamInfo
            offset, size, sizes = c_size_t(), c_size_t(), list[int]()
            while not (code := describe(c_void_p(function), c_size_t(len(sizes)), byref(offset), byref(size))):
                sizes.append(size.value)
            if code != INVALID_VALUE:  # which says that there are no more
                raise RuntimeError(f"the parameters of a kernel are not told: CUDA error {code}")
            self.layouts[function] = sizes
        return self.layouts[function]
