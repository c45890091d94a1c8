"""The wheel holds every package and asset, and what it holds can be imported from anywhere."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "graphs", "checkpoints_tools", "runtime", "train", "bench")
CHECK = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the working tree gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, source / floor, ignore=shutil.ignore_patterns("__pycache__"))
    probe = source / "runtime" / "assets" / "some" / "model" / "weights.bin"
    probe.parent.mkdir(parents=True)
    probe.write_bytes(b"weights")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    return next(out.glob("kinora-*.whl"))


def test_the_wheel_holds_packages_and_assets(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"kinora/{path.relative_to(ROOT)}" for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assets = {f"kinora/{path.relative_to(ROOT)}" for path in (ROOT / "runtime/assets").rglob("*") if path.is_file()}
    assets |= {"kinora/runtime/assets/some/model/weights.bin", "kinora/checkpoints_tools/c/kinora_bundle.h"}
    assert len(modules) > 50
    assert sorted((modules | assets) - held) == []
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"kinora"}
    entry_points = next(name for name in held if name.endswith(".dist-info/entry_points.txt"))
    assert "kinora = kinora.runtime.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_wheel_imports_from_anywhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = ["kinora.runtime", "kinora.runtime.cli", "kinora.runtime.avatar", "kinora.train", "kinora.bench.parity"]
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "site"), *names], check=True, cwd=tmp_path / "elsewhere"
    )
