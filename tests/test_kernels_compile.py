"""Triton compiles the kernels for a Hopper GPU, PTX in them included, also where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(["residual_norm_fp8", "gelu_quantize_rows", "store_values_fp8", "audio_residual"], id="rows"),
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_hopper(ops: list[str], tmp_path: Path) -> None:
    surroundings = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, str(SCRIPT), *ops]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
