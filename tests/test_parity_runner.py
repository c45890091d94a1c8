"""The parity runner itself: the tolerance rule of golden/README.md, and that nothing passes by being left out."""

import json
from pathlib import Path

import pytest
import torch
from kinora.bench.parity import registry
from kinora.bench.parity.__main__ import main
from kinora.bench.parity.case import find_cases, system_of
from kinora.bench.parity.runner import run_case
from kinora.bench.parity.tolerance import compare, limits_for
from safetensors.torch import save_file
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def judge(a: list[float], b: list[float], limits: dict, **tensors: Tensor) -> bool:
    return compare("out.y", torch.tensor(a), torch.tensor(b), limits, tensors).passed


@pytest.mark.parametrize(
    ("a", "b", "limits", "passes"),
    [
        ([1.0, 2.0], [1.0, 2.0], {"atol": 0, "rtol": 0}, True),
        ([1.0, 2.0000002], [1.0, 2.0], {"atol": 0, "rtol": 0}, False),
        ([1.0, 2.1], [1.0, 2.0], {"atol": 0.1001, "rtol": 0}, True),
        ([1.0, 11.0], [1.1, 11.0], {"atol": 0, "rtol": 0.01}, True),  # relative to the largest golden value
        ([float("nan"), 1.0], [0.0, 1.0], {"atol": 9, "rtol": 0}, False),
        ([1.0, 1.0], [1.1, 1.0], {"atol": 1, "rtol": 0, "mean_rtol": 0.01}, False),
        ([1.0, 1.0], [1.1, 1.0], {"atol": 1, "rtol": 0, "mean_rtol": 0.1}, True),
        ([0.0, 3.0], [0.0, 4.0], {"rms_rtol": 0.2}, False),
        ([0.0, 3.0], [0.0, 4.0], {"rms_rtol": 0.3}, True),
        ([0.0, 5.0, 0.0, 0.0], [0.0] * 4, {"atol": 0, "rtol": 0, "max_fraction_over": 0.25}, True),
        ([5.0, 5.0, 0.0, 0.0], [0.0] * 4, {"atol": 0, "rtol": 0, "max_fraction_over": 0.25}, False),
        ([1.0, 2.0], [1.0, 2.5], {"max_fraction": 0.5}, True),
        ([1.5, 2.0], [1.0, 2.5], {"max_fraction": 0.5}, False),
        ([1.0 + 2**-23], [1.0], {"max_ulp": 1, "ulp_dtype": "float32"}, True),
        ([1.0 + 2**-22], [1.0], {"max_ulp": 1, "ulp_dtype": "float32"}, False),
        ([1.0], [1.0], {"surprise": 1}, False),
        ([NAN, 1.0], [NAN, 1.0], {"atol": 0, "rtol": 0}, True),
        ([INF, -INF], [INF, -INF], {"atol": 0, "mean_rtol": 0, "rms_rtol": 0}, True),
        ([INF, 9.0], [INF, 1.0], {"rms_rtol": 0.1}, False),  # an infinity of the golden allows nothing beside it
        ([INF, 9.0], [INF, 1.0], {"mean_rtol": 0.1}, False),
        ([INF, 9.0], [INF, 1.0], {"rtol": 0.1}, False),
        ([INF, 1.0], [-INF, 1.0], {"rms_rtol": 0.1}, False),
        ([], [], {"atol": 0, "mean_atol": 0, "rms_rtol": 0, "max_fraction": 0, "max_ulp": 0}, True),
        ([1.0], [1.0, 1.0], {"atol": 0, "rtol": 0}, False),  # which would be broadcast
    ],
)
def test_rule(a: list[float], b: list[float], limits: dict, passes: bool) -> None:
    assert judge(a, b, limits) is passes


@pytest.mark.parametrize("least", [{"rel_min": 0.5}, {"abs_min": 5.0}])
@pytest.mark.parametrize(
    "limits", [{"atol": 0}, {"mean_rtol": 0.1}, {"rms_rtol": 0.1}, {"max_fraction": 0.3}, {"max_ulp": 1}]
)
def test_only_where_compares_only_large_entries(limits: dict, least: dict[str, float]) -> None:
    guide = torch.tensor([0.1, 10.0])
    limits = {**limits, "only_where": {"tensor": "mid.g", **least}}
    assert judge([7.0, 1.0], [1.0, 1.0], limits, **{"mid.g": guide})
    assert not judge([1.0, 7.0], [1.0, 1.0], limits, **{"mid.g": guide})


def test_only_where_counts_entries_from_its_own_least_on() -> None:
    guide, limits = {"mid.g": torch.tensor([1.0, 2.0, 4.0])}, {"atol": 0}
    assert judge([7.0, 1.0, 1.0], [1.0] * 3, limits | {"only_where": {"tensor": "mid.g", "abs_min": 2}}, **guide)
    assert not judge([1.0, 7.0, 1.0], [1.0] * 3, limits | {"only_where": {"tensor": "mid.g", "abs_min": 2}}, **guide)


def test_a_limit_in_units_of_the_gradients_norm() -> None:
    a, b, limits = torch.tensor([1.2]), torch.tensor([1.0]), {"atol_times_total_grad_norm": 0.1}
    assert compare("out.y", a, b, limits, {}, grad_norm=3.0).passed
    assert not compare("out.y", a, b, limits, {}, grad_norm=1.0).passed
    assert not compare("out.y", a, b, limits, {}).passed


def test_per_tensor_replaces_the_default_as_a_whole() -> None:
    tolerance = {"default": {"atol": 1.0, "mean_rtol": 0.1}, "per_tensor": {"out.y": {"rtol": 0.5}}}
    assert limits_for(tolerance, "out.y") == {"rtol": 0.5}
    assert limits_for(tolerance, "out.z") == {"atol": 1.0, "mean_rtol": 0.1}


@pytest.mark.parametrize(
    ("folder", "system"),
    [
        ("golden/wan", "wan"),
        ("golden_wan", "wan"),
        ("wan-heldout/seed2", "wan"),
        ("wan/golden_liveavatar", "liveavatar"),
        ("goldens/skyreels_v3_b", "skyreels_v3"),
        ("swan/other", "?"),
    ],
)
def test_the_nearest_folder_names_the_system(folder: str, system: str) -> None:
    assert system_of(Path(folder)) == system


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one case of system `wan` whose `out.y` doubles `in.x`."""
    monkeypatch.setattr(registry, "_HANDLERS", [])
    folder = tmp_path / "golden_wan"
    folder.mkdir()
    x = torch.arange(4.0)
    save_file({"in.x": x, "out.y": 2 * x, "mid.h": x + 1}, folder / "double.safetensors")
    (folder / "double.json").write_text(
        json.dumps({"case": "double", "tolerance": {"default": {"atol": 0, "rtol": 0}}})
    )
    return tmp_path


def test_outputs_that_are_not_computed_fail_the_case(golden: Path) -> None:
    registry.handles("wan", "dou*")(lambda case: {"out.y": 2 * case["in.x"]})
    (case,) = find_cases(golden)
    assert "mid.h" in run_case(case).problem


def test_a_mid_used_as_input_needs_no_counterpart(golden: Path) -> None:
    registry.handles("wan", "dou*")(lambda case: {"out.y": 2 * (case["mid.h"] - 1)})
    (case,) = find_cases(golden)
    assert run_case(case).passed


def test_what_the_golden_does_not_hold_fails_the_case(golden: Path) -> None:
    registry.handles("wan", "dou*")(lambda case: {"out.y": 2 * case["in.x"], "mid.h": case["in.x"] + 1, "out.z": 1})
    (case,) = find_cases(golden)
    assert run_case(case).problem == "computed out.z, which the golden does not hold"


@pytest.mark.parametrize(("told", "passes"), [("double", True), ("triple", False)])
def test_texts_are_compared(told: str, passes: bool, golden: Path) -> None:
    registry.handles("wan", "dou*")(lambda case: {"out.y": 2 * (case["mid.h"] - 1), "json.case": told})
    (case,) = find_cases(golden)
    assert run_case(case).passed is passes


def test_a_pattern_has_one_handler(golden: Path) -> None:
    registry.handles("wan", "dou*", "other")(lambda case: {})
    registry.handles("liveavatar", "dou*")(lambda case: {})
    with pytest.raises(ValueError, match=r"wan: dou\* has a handler already"):
        registry.handles("wan", "double", "dou*")(lambda case: {})


def test_exit_codes(golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinora.bench.parity.__main__.load_handlers", lambda: None)
    assert main([str(golden)]) == 1
    assert "not understood" in capsys.readouterr().out
    registry.handles("wan", "double")(lambda case: {"out.y": 2 * case["in.x"], "mid.h": case["in.x"] + 1})
    assert main([str(golden)]) == 0
    assert main([str(golden / "nowhere")]) == 2
