"""Every benchmark runs at its smallest size and ends in the JSON line that it promises. No test reads a time."""

import pytest
from bench_scripts import BENCH, smoke

ELSEWHERE = {"prior", "draws", "decoder", "peer_quality"}  # test_bench_prior.py, _decoder.py, _peer_quality.py
MAIN = 'if __name__ == "__main__":'
SCRIPTS = (
    {path.stem for path in BENCH.glob("*.py") if MAIN in path.read_text()}
    - {"turns", "peer_worker", "decoder_worker", "quality_worker"}
    - ELSEWHERE
)
RATIOS = {
    "degrade": {"light_per_s", "full_per_s", "full_vs_bare"},
    "embed": {"embed_vs_bare", "embed_vs_bare_torch_threads"},
    "loader": {"rows_vs_take", "rows_per_s", "take_per_s", "reader_per_s"},
    "training_loop": {"loop_vs_bare", "two_ranks_vs_one", "checkpoint_stall_share", "checkpoint_write_share"},
    "loader_pictures": {"pictures_vs_decode_only", "unresized", "pictures_per_s"},
}


def test_what_every_benchmark_promises_is_known():
    assert set(RATIOS) == SCRIPTS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_smoke(name: str):
    _, said = smoke(name)
    ratios = {key for key, value in said.items() if key != "settings" and isinstance(value, dict)}
    assert (said["benchmark"], ratios) == (name, RATIOS[name])
    for ratio in ratios:
        assert 0 < said[ratio]["min"] <= said[ratio]["median"] <= said[ratio]["max"]
    assert said["settings"]
