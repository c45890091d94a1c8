"""Attention by libraries: which implementation serves a call, cuDNN's frontend, FP8 caches in one buffer."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from kinora.kernels import attention_cudnn, attention_joined, attention_table, rope_attention
from kinora.kernels.cases import Case
from torch import Tensor

plain = rope_attention.reference


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("case", [c for c in attention_joined.cases() if c.small], ids=lambda c: c.name)
def test_a_joined_fp8_cache(case: Case, kernel_device: torch.device) -> None:
    """Near the attention over what the e4m3 numbers stand for; on a GPU cuDNN's is near the reference too."""
    if not attention_joined.available(kernel_device):
        pytest.skip("needs nvidia-cudnn-frontend on a Hopper GPU")
    inputs = case.inputs(kernel_device, torch.Generator().manual_seed(0))
    found = attention_joined.attention_joined(**inputs)
    assert relative(found, attention_joined.reference(**inputs)) <= case.tolerance
    q8, k8, v8, length, scales = inputs.values()
    q, k, v = (x.float() * scales[i] for i, x in enumerate((q8, k8, v8)))
    assert relative(found, plain(q, [k], [v], [None], [int(length)])) < 6e-2
    out8, descale = attention_joined.attention_joined_fp8(**inputs)
    torch.testing.assert_close((out8.float() * descale[..., None]).to(found.dtype), found, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be e4m3"):
        attention_joined.attention_joined(q, k8, v8, length, scales)
    assert descale.shape == (*q8.shape[:2], 1) and descale.untyped_storage()._cdata == scales.untyped_storage()._cdata
    assert descale.storage_offset() * descale.itemsize % 16 == 0, "products want their scales aligned"
    with pytest.raises(ValueError, match="do not fit"):
        attention_joined.attention_joined(q8, k8[:, :, :1], v8, length, scales)
    with pytest.raises(ValueError, match=f"at least {q8.shape[0] * q8.shape[1]} rows"):
        attention_joined.attention_joined(q8, k8, v8, length, scales[:-1])


# The table


def test_the_table_prefers_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, half = (9, 0), torch.bfloat16
    entry = attention_table.shape_class(torch.empty(1, 3168, 40, 128), torch.empty(1, 512, 40, 128), half)
    assert entry == "bfloat16 d128 h32 q2048 k512"
    assert attention_table.choose("A", hopper, entry, half, 2**30) == "sdpa-cudnn"
    assert attention_table.choose("A", hopper, entry, half, 2**10) == "triton"
    assert attention_table.choose("A", hopper, entry, torch.float32, 2**30) == "triton"
    monkeypatch.setitem(attention_table.MEASURED, "A", {entry: "sdpa-flash"})
    assert attention_table.choose("A", hopper, entry, half, 2**30) == "sdpa-flash"
    monkeypatch.setitem(attention_table.MEASURED, "A", {entry: "a library that is not installed"})
    assert attention_table.choose("A", hopper, entry, half, 2**30) == "sdpa-cudnn"


def test_a_length_on_the_device_is_for_the_library_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, half = torch.empty(1, 3168, 40, 128), torch.empty(1, 15312, 40, 128), torch.bfloat16
    entry = attention_table.shape_class(q, k, half, counted=True)
    assert entry in attention_table.MEASURED["NVIDIA H200"]
    monkeypatch.setattr(attention_table, "available", lambda: ("triton", "sdpa-cudnn", "cudnn-frontend"))
    assert attention_table.choose("A", (9, 0), entry, half, 2**30) == "triton"
    monkeypatch.setitem(attention_table.MEASURED, "A", {entry: "cudnn-frontend"})
    assert attention_table.choose("A", (9, 0), entry, half, 2**30) == "cudnn-frontend"
    monkeypatch.setattr(attention_table, "available", lambda: ("triton", "sdpa-cudnn", "sdpa-flash"))
    assert attention_table.choose("A", (9, 0), entry, half, 2**30) == "triton"


def test_measured_entries_are_shape_classes_and_implementations() -> None:
    half = torch.bfloat16
    for heads, queries, keys in ((40, 3168, 512), (3 * 40, 1056, 5), (40, 3168, 15312)):  # text, audio, self
        q, k = torch.empty(1, queries, heads, 128), torch.empty(1, keys, heads, 128)
        assert attention_table.shape_class(q, k, half) in attention_table.MEASURED["NVIDIA H200"]
    for entries in attention_table.MEASURED.values():
        assert set(entries.values()) <= {"triton", *attention_table.LIBRARIES, attention_table.COUNTING}


def test_measuring_leaves_out_what_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("not on this machine")

    q = torch.randn(1, 4, 2, 16)
    monkeypatch.setattr(attention_table, "available", lambda: ("triton", "sdpa-cudnn", "sdpa-flash"))
    monkeypatch.setitem(attention_table.LIBRARIES, "sdpa-cudnn", refuses)
    monkeypatch.setitem(attention_table.LIBRARIES, "sdpa-flash", lambda q, k, v: (q, q))
    readings = iter([2.0, 1.0])

    def timer(run: object) -> float:
        return next(readings)

    assert attention_table.measure(q, q, q, lambda q, k, v: (q, q), timer) == (
        "sdpa-flash",
        {"triton": 2.0, "sdpa-flash": 1.0},
    )


def test_cudnn_s_result_is_like_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        def run(self, *bound: Tensor) -> None:
            bound[3].copy_(bound[0])

    monkeypatch.setattr(attention_cudnn, "_plan_for", lambda *given: (Plan(), list(given[:4])))
    q, k = torch.ones(1, 4, 2, 16), torch.ones(1, 6, 2, 16, dtype=torch.bfloat16)
    out, lse = attention_cudnn.attend(q, k, k)
    assert torch.equal(out, q) and out.dtype == q.dtype and lse.shape == (1, 2, 4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or attention_table.COUNTING not in attention_table.available(),
    reason="needs a GPU and nvidia-cudnn-frontend",
)
def test_cudnn_reads_the_length_on_the_device() -> None:
    q, k, v = (torch.randn(2, n, 3, 64, device="cuda", dtype=torch.bfloat16) for n in (70, 200, 200))
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    for rows in (200, 129, 1):
        length.fill_(rows)
        out, lse = attention_cudnn.attend(q, k, v, length)
        wanted = rope_attention.log_sum_exp(q, [k], [None], [length], None, torch.float32)
        assert relative(out, plain(q, [k], [v], [None], [rows])) < 1e-2
        assert relative(lse, wanted) < 1e-2


@pytest.mark.parametrize(("installed", "wanted"), [("1.32.0", True), ("2.0.1", True), ("1.9.0", False), (None, False)])
def test_an_older_frontend_does_not_attend_in_fp8(
    installed: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(attention_cudnn, "version", version)
    assert attention_cudnn.has_fp8.__wrapped__() is wanted
