"""The paper's recipe on 64, 256 and 1,024 H100s: the tables of docs/scaling.md. usage: python scripts/scaling.py

Parameters, FLOPs and memory are those that `unclip plan` finds for the shipped experiments; the rest is computed from the
constants below, and simulated where a formula would be a guess. Nothing here was run on such a machine.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from unclip.cli.plan import measured, read
from unclip.config import Precision
from unclip.plan import Step, on_devices, seconds_of

GPUS = (64, 256, 1024)
TFLOPS = 989.0  # of an H100 SXM in bfloat16, dense
HBM = 80.0  # GB
NODE = 8
NIC = 50e9  # bytes/s a GPU has between nodes: 400 Gbit/s
RING = 0.7  # share of it that an all-reduce reaches
GATHER = 5e9  # bytes/s at which rank 0 gathers the state into main memory
WRITE = 1e9  # bytes/s at which one thread writes a checkpoint
HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419  # GPU-hours: Llama 3 405B, 419 unexpected interruptions in 54 days
RESTART = 600.0  # seconds from a failure to the next step: requeue, imports, reading the checkpoint
DAY = 86_400.0
PAPERS_CLIP = ("embed_dim=1024", "text_width=1024", "context_length=256")


planned = cache(read)


@cache
def step_of(settings: tuple[str, ...], rows: int) -> Step:
    """What `unclip plan` finds of a step of so many samples."""
    return measured(*planned(settings), rows)


@dataclass
class Stage:
    """``settings`` are those of `unclip plan`; ``mfu`` is the share of the peak that its FLOPs reach, of which those are a
    part that gradient checkpointing computes again. ``bytes`` a sample as stored, ``decode`` in core-seconds a sample."""

    name: str
    settings: tuple[str, ...]
    mfu: float
    bytes: float
    decode: float

    @property
    def batch(self) -> int:
        return planned(self.settings)[1].trainer.batch_size

    @property
    def steps(self) -> int:
        return planned(self.settings)[1].trainer.max_steps

    @property
    def parameters(self) -> int:
        return self.step(self.largest).parameters

    @property
    def flops(self) -> float:
        """Of the whole recipe."""
        return self.step(self.largest).flops * self.largest * self.steps

    def step(self, gpus: int) -> Step:
        """One GPU's part of a step."""
        return step_of(self.settings, self.batch // gpus)

    @property
    def largest(self) -> int:
        """GPUs at most: below one sample each there is nothing to share out."""
        return min(max(GPUS), self.batch)


STAGES = (
    Stage("CLIP ViT-H/16", ("experiment=paper_clip", "data.others=[]"), 0.45, 40e3, 2.5e-3),
    Stage("diffusion prior", ("experiment=paper_diffusion_prior", *PAPERS_CLIP), 0.45, 5.2e3, 0.0),
    Stage("decoder, 64 px", ("experiment=paper_decoder", *PAPERS_CLIP), 0.40, 40e3, 2.5e-3),
    Stage("64 to 256 px", ("experiment=paper_upsampler_256",), 0.33, 40e3, 2.5e-3),
    Stage("256 to 1024 px", ("experiment=paper_upsampler_1024",), 0.33, 500e3, 20e-3),
)

SHARES = {
    "diffusion prior": 1 / 4,
    "decoder, 64 px": 1 / 2,
    "64 to 256 px": 1 / 8,
    "256 to 1024 px": 1 / 8,
}  # of a cluster


def step_seconds(stage: Stage, gpus: int) -> tuple[float, float]:
    """Seconds of computing, and of moving gradients between nodes (ring all-reduce in float32, each node's share of it)."""
    computing = seconds_of(stage.step(stage.largest), TFLOPS, stage.mfu) * stage.largest / gpus
    nodes = max(1, gpus // NODE)
    volume = 2 * (nodes - 1) / nodes * 4 * stage.parameters / NODE  # NVLink reduces within a node first
    return computing, volume / (NIC * RING)


def days(stage: Stage, gpus: int) -> float:
    """Of pure training, on as many of ``gpus`` as the batch can use; gradients move during the backward pass."""
    return max(step_seconds(stage, min(gpus, stage.largest))) * stage.steps / DAY


def state_gb(stage: Stage) -> float:
    """Weights, two moments and their average: what a checkpoint holds."""
    kinds = stage.step(stage.largest).bytes
    return (kinds["parameters"] + kinds["optimiser"]) / 1e9


def memory_gb(stage: Stage, gpus: int) -> tuple[float, float]:
    """Per GPU, with ddp and with fsdp2."""
    found = on_devices(stage.step(gpus), gpus, Precision.bf16)
    return sum(found["ddp"].values()) / 1e9, sum(found["fsdp2"].values()) / 1e9


def mean_time_between_failures(gpus: int) -> float:
    """Seconds."""
    return HOURS_PER_FAILURE / gpus * 3600


def best_interval(stall: float, mtbf: float) -> float:
    """Seconds of training between two checkpoints that cost ``stall`` each (Young 1974; Daly 2006, eq. 37)."""
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def lost_share(interval: float, stall: float, write: float, mtbf: float) -> float:
    """Of the time: stalls, what is computed again (half an interval and the write that was under way), restarts."""
    return stall / (interval + stall) + (interval / 2 + write + RESTART) / mtbf


def simulate_failures(
    interval: float, stall: float, write: float, mtbf: float, work: float, seed: int = 0
) -> tuple[float, int]:
    """Share of the time lost, and the failures, in a run of ``work`` seconds of pure training.

    A checkpoint stands ``write`` seconds after its copy; a failure goes back to the last one that stood. Failures come at
    random, also while the run is restarting.
    """
    rng = np.random.default_rng(seed)
    clock, done, failures = 0.0, 0.0, 0
    stood, pending = 0.0, (math.inf, 0.0)  # work that is safe; when the newer checkpoint stands, and how much it holds
    failure = rng.exponential(mtbf)
    while done < work:
        part = min(interval, work - done)
        end = clock + part + stall
        if failure < end:
            if pending[0] <= failure:
                stood = pending[1]
            clock, done, pending, failures = failure + RESTART, stood, (math.inf, 0.0), failures + 1
            failure += rng.exponential(mtbf)
            while failure < clock:
                clock, failures = failure + RESTART, failures + 1
                failure += rng.exponential(mtbf)
            continue
        if pending[0] <= end:
            stood = pending[1]
        clock, done = end, done + part
        pending = (clock + write, done)
    return 1 - work / clock, failures


def simulate_loader(
    ranks: int, workers: int, batch_seconds: float, step: float, spread: float = 0.2, slow: float = 0.005, seed: int = 0
) -> float:
    """Share of the time that the ranks together wait for batches, each made by one of ``workers`` in ``batch_seconds`` of a core.

    Times are log-normal with deviation ``spread``; a share ``slow`` of them is five times as long (a slow read). Each worker is at
    most two batches ahead. The ranks take every step together, so that the slowest one's batch sets the time.
    """
    steps, rng = 300, np.random.default_rng(seed)
    free = np.zeros((ranks, workers))  # when each worker can begin its next batch
    taken: list[float] = []  # when each step began
    clock = 0.0
    for number in range(steps):
        worker = number % workers
        ahead = number - 2 * workers  # the batch whose being taken made room for this one
        begin = np.maximum(free[:, worker], taken[ahead] if ahead >= 0 else 0.0)
        spent = batch_seconds * rng.lognormal(-(spread**2) / 2, spread, ranks)
        spent[rng.random(ranks) < slow] *= 5
        free[:, worker] = begin + spent
        clock = max(clock, float(free[:, worker].max()))
        taken.append(clock)
        clock += step
    first = steps // 3  # until then the queues fill
    return max(0.0, 1 - (steps - first) * step / (clock - taken[first]))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def days_table() -> list[str]:
    rows = []
    for stage in STAGES:
        row = [stage.name, f"{stage.parameters / 1e9:.2f} B", f"{stage.flops:.1e}"]
        for gpus in GPUS:
            used = min(gpus, stage.largest)
            computing, moving = step_seconds(stage, used)
            note = f" (on {used})" if used < gpus else ""
            row.append(f"{days(stage, gpus):.1f}{note}; {max(computing, moving):.2f} s, {moving / computing:.0%}")
        rows.append(row)
    in_turn = [sum(days(stage, gpus) for stage in STAGES) for gpus in GPUS]
    shared = [days(STAGES[0], gpus) + max(days(s, int(gpus * SHARES[s.name])) for s in STAGES[1:]) for gpus in GPUS]
    for name, values in (("all in turn", in_turn), ("CLIP, then the others side by side", shared)):
        rows.append([name, "", "", *(f"{value:.1f}" for value in values)])
    return table(["stage", "parameters", "FLOP", *(f"{g} GPUs: days; step, network" for g in GPUS)], rows)


def memory_table() -> list[str]:
    rows = []
    for stage in STAGES:
        row = [stage.name, f"{state_gb(stage):.0f} GB"]
        for gpus in GPUS:
            used = min(gpus, stage.largest)
            whole, shared = memory_gb(stage, used)
            choice = "ddp" if whole < 0.9 * HBM else "fsdp2"
            row.append(f"{stage.batch / used:g}; {whole:.0f} / {shared:.0f} GB: {choice}")
        rows.append(row)
    return table(["stage", "state", *(f"{g} GPUs: samples a GPU; ddp / fsdp2" for g in GPUS)], rows)


def failure_table() -> list[str]:
    stage = STAGES[2]  # the largest state
    stall, write = state_gb(stage) * 1e9 / GATHER, state_gb(stage) * 1e9 / WRITE
    rows = []
    for gpus in GPUS:
        mtbf = mean_time_between_failures(gpus)
        interval = best_interval(stall, mtbf)
        step = max(step_seconds(stage, gpus))
        work = step * stage.steps
        runs = [simulate_failures(interval, stall, write, mtbf, work, seed) for seed in range(20)]
        rows.append(
            [
                f"{gpus}", f"{mtbf / DAY:.1f} days", f"{work / mtbf:.1f}",
                f"{interval / 60:.0f} min = {interval / step:,.0f} steps",
                f"{lost_share(interval, stall, write, mtbf):.2%}",
                f"{np.mean([share for share, _ in runs]):.2%} ({np.mean([n for _, n in runs]):.1f} failures)",
                f"{lost_share(1000 * step, stall, write, mtbf):.2%}",
            ]
        )  # fmt: skip
    head = [
        "GPUs",
        "time between failures",
        "failures in the decoder's run",
        "best interval",
        "lost (formula)",
        "lost (simulated)",
    ]
    return table([*head, "lost at every 1,000 steps"], rows)


def loader_table() -> list[str]:
    rows = []
    for stage in STAGES:
        if not stage.decode:
            continue
        for gpus in GPUS:
            used = min(gpus, stage.largest)
            step, samples = max(step_seconds(stage, used)), stage.batch // used
            cores = samples * stage.decode / step
            waits = [f"{simulate_loader(used, w, samples * stage.decode, step):.1%}" for w in (1, 2, 4, 8)]
            rate = stage.bytes * stage.batch / step / 1e9
            rows.append([stage.name, f"{used}", f"{cores:.2f}", *waits, f"{rate:.2f} GB/s"])
    return table(["stage", "GPUs", "cores a GPU", *(f"wait, {w} workers" for w in (1, 2, 4, 8)), "read in all"], rows)


def main() -> None:
    for title, lines in (
        ("days", days_table()), ("memory", memory_table()), ("failures", failure_table()), ("loader", loader_table())
    ):  # fmt: skip
        print(f"<!-- {title} -->", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
