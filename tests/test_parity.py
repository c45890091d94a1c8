"""Every golden case that travels with the repository is recomputed and must stay within its stated tolerance."""

from pathlib import Path

import pytest
from kinora.bench.parity.case import Case, find_cases
from kinora.bench.parity.registry import load_handlers
from kinora.bench.parity.runner import run_case

load_handlers()
CASES = find_cases(Path(__file__).parent / "golden")


def test_the_cases_are_all_here() -> None:
    assert len(CASES) == 84


@pytest.mark.parametrize("case", CASES, ids=[f"{c.system}/{c.name}" for c in CASES])
def test_golden(case: Case) -> None:
    result = run_case(case)
    failed = [f"{v.name}: {v.error:.2e} against {v.limit}" for v in result.verdicts if not v.passed]
    assert result.passed, result.trace or result.problem or "\n".join(failed)
