"""Damaged bundles for some seconds; `fuzz_bundles.py` has the generator, and runs longer on demand."""

import shutil
from pathlib import Path

import pytest
from fuzz_bundles import ACTS, build_driver, python_says, run, write_sample

COMPILERS = [name for name in ("gcc", "clang", "cc") if shutil.which(name)][:2]
SEEDS = 600


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not COMPILERS:
        pytest.skip("there is no C compiler: install gcc or clang")
    return build_driver(COMPILERS[0], tmp_path_factory.mktemp("fuzz") / "fuzz_bundle")


def test_the_sample_is_sound(driver: Path, tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample")
    assert python_says(sample.folder) == ("sound", "")


def test_no_damage_is_fatal(driver: Path, tmp_path: Path) -> None:
    """Readers agree on every damaged bundle; most are refused, for many different reasons."""
    sample = write_sample(tmp_path / "sample")
    verdicts: list[str] = []
    for start in range(0, SEEDS, 200):
        verdicts += run(driver, sample, start, 200, tmp_path)
    refused = [message for message in verdicts if message]
    assert len(refused) > 0.8 * SEEDS and len(set(refused)) > 5 * len(ACTS)
