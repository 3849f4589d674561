"""scripts/scaling.py: its formulas against known answers and its own simulation, and its tables in docs/scaling.md."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from unclip.cli.plan import measured, read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_unclip_plan_for_the_papers_recipe(scaling: Any):
    stage = scaling.STAGES[3]
    assert (stage.batch, stage.steps, stage.largest) == (1024, 1_000_000, 1024)
    settings, cfg, kind = read(["experiment=paper_upsampler_256", "gpus=256"])
    step = measured(settings, cfg, kind, rows=4)
    assert stage.step(256) == step
    assert stage.parameters == step.parameters == pytest.approx(730e6, rel=0.01)
    assert scaling.step_seconds(stage, 256)[0] == pytest.approx(step.flops / (989e12 * stage.mfu), rel=1e-6)
    assert scaling.memory_gb(stage, 256)[0] * 1e9 == step.peak + 4 * step.trainable
    assert {s.settings[0] for s in scaling.STAGES} == {
        f"experiment=paper_{name}" for name in ("clip", "diffusion_prior", "decoder", "upsampler_256", "upsampler_1024")
    }


def test_the_interval_is_young_s_for_a_small_stall_and_never_above_the_time_between_failures(scaling: Any):
    assert scaling.best_interval(1.0, 1e6) == pytest.approx(math.sqrt(2e6), rel=2e-3)
    assert scaling.best_interval(50.0, 10.0) == 10.0


def test_the_formula_for_what_is_lost_agrees_with_a_simulation(scaling: Any):
    day, stall, write = 86_400.0, 10.0, 60.0
    interval = scaling.best_interval(stall, day)
    expected = scaling.lost_share(interval, stall, write, day)
    shares = [scaling.simulate_failures(interval, stall, write, day, 100 * day, seed) for seed in range(10)]
    found = sum(share for share, _ in shares) / len(shares)
    assert sum(n for _, n in shares) / len(shares) == pytest.approx(100, rel=0.15)
    assert found == pytest.approx(expected, rel=0.15)
    for other in (interval / 6, interval * 6):
        worse = [scaling.simulate_failures(other, stall, write, day, 100 * day, seed)[0] for seed in range(10)]
        assert sum(worse) / len(worse) > found, "the best interval is better than others"


def test_a_run_without_failures_loses_its_stalls_only(scaling: Any):
    share, failures = scaling.simulate_failures(90.0, 10.0, 5.0, 1e18, 900.0)
    assert (share, failures) == (pytest.approx(0.1), 0)


def test_the_loader_waits_for_what_its_workers_cannot_make(scaling: Any):
    exact = {"spread": 1e-9, "slow": 0.0}
    assert scaling.simulate_loader(4, 8, 1.0, 1.0, **exact) == 0
    one = scaling.simulate_loader(4, 1, 2.0, 1.0, **exact)
    assert one == pytest.approx(0.5, abs=0.01), "one worker makes a batch in two steps' time"
    few, many = (scaling.simulate_loader(ranks, 1, 2.0, 1.0, spread=1e-9) for ranks in (4, 64))
    assert many > few > one, "a slow read of any rank holds up all"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_documented_tables_are_what_the_script_prints(scaling: Any):
    page = (ROOT / "docs" / "scaling.md").read_text()
    for lines in (scaling.days_table(), scaling.memory_table(), scaling.failure_table(), scaling.loader_table()):
        assert "\n".join(lines) in page
