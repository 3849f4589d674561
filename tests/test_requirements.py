"""A test that lacks something is skipped, and fails in CI."""

import re
from pathlib import Path

import pytest
from tests_support import lacks

ROOT = Path(__file__).parents[1]


def test_what_is_required_fails_and_the_rest_is_skipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNCLIP_REQUIRE", "weed,tmpfs")
    with pytest.raises(pytest.fail.Exception, match="no root"):
        lacks("tmpfs", "no root")
    with pytest.raises(pytest.skip.Exception, match="no SLURM"):
        lacks("slurm", "no SLURM")
    monkeypatch.delenv("UNCLIP_REQUIRE")
    with pytest.raises(pytest.skip.Exception, match="no root"):
        lacks("tmpfs", "no root")


@pytest.mark.parametrize("page", [".ci/run", "CONTRIBUTING.md"])
def test_ci_requires_all_that_a_test_may_lack(page: str):
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    asked = {what for text in tests for what in re.findall(r'lacks\("(\w+)"', text)}
    given = [line for line in (ROOT / page).read_text().splitlines() if "UNCLIP_REQUIRE=weed" in line]
    assert len(given) == 1
    assert asked == set(re.findall(r"UNCLIP_REQUIRE=([\w,]+)", given[0])[0].split(","))
