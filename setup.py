"""Maps the top-level folders of the repository to the import namespace `kinora`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

FLOORS = ("kernels", "graphs", "checkpoints_tools", "runtime", "train", "bench")
ROOT = Path(__file__).parent


def packages() -> dict[str, str]:
    """Import name -> folder, for every folder that holds an `__init__.py`."""
    found = {}
    for floor in FLOORS:
        for name in [floor, *(f"{floor}.{sub}" for sub in find_namespace_packages(str(ROOT / floor)))]:
            folder = name.replace(".", "/")
            if (ROOT / folder / "__init__.py").is_file():
                found[f"kinora.{name}"] = folder
    return found


setup(packages=list(packages()), package_dir=packages())
