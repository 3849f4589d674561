"""The decoder's training and sampling steps against dalle2-pytorch, and against what the machine's matrix product reaches.

Every side is a worker process (decoder_worker.py) and works while the others wait. dalle2-pytorch runs in .venv-peer, which
``make bench`` makes; without it those ratios are left out, unless UNCLIP_REQUIRE names "peer".
"""

import contextlib
import sys
from typing import Any

import torch
from prior import PEER_PYTHON, TOLERANCE, Side, has_peer
from turns import ROUNDS, ratio, report, size_from_command_line, take_turns

SIZES: dict[str, dict[str, Any]] = {
    "stated": {
        "width": 64,
        "multiples": [1, 2, 3, 4],
        "head_dim": 64,
        "size": 64,
        "batch": 16,
        "repeats": 2,
        "steps": 4,
    },
    "smoke": {"width": 32, "multiples": [1, 1, 1, 1], "head_dim": 32, "size": 16, "batch": 2, "repeats": 1, "steps": 2},
}

DIFFERENCES = {
    "all": "same pictures, z_i and caption states of 77 tokens, stored; learned variance; bf16 autocast; clipping, fused AdamW and "
    "EMA by the same code; sampling by DDIM with guidance",
    "unclip": "ADM U-Net: attention over [context; picture] behind each block of 32, 16 and 8 px; guidance in one forward, the "
    "context's keys and values once a run",
    "dalle2_pytorch": "its width, then its context's, set for equal parameters; one self-attention a level at 32, 16 and 8 px "
    "and cross-attention in each block, where the caption is seen in the middle only; guidance in two forwards",
}


def main() -> None:
    size = size_from_command_line(str(__doc__))
    numbers, rounds = SIZES["smoke" if size == "smoke" else "stated"], ROUNDS[size]
    with contextlib.ExitStack() as stack:
        sides = start(stack)
        built = build(sides, numbers)
        ratios, found = measure(sides, built, numbers, rounds)
    settings = {
        **numbers,
        "rounds": rounds,
        "built": built,
        "seconds": {name: min(values) for name, values in found.items()},
        "sides": {name: said for name, said in DIFFERENCES.items() if name == "all" or name in sides},
    }
    report("decoder", ratios, settings)


def start(stack: contextlib.ExitStack) -> dict[str, Side]:
    """The sides' processes, not built yet; they end with ``stack``."""
    pythons = {"unclip": sys.executable, **({"dalle2_pytorch": str(PEER_PYTHON)} if has_peer() else {})}
    sides = {name: Side(name, python, "decoder_worker.py") for name, python in pythons.items()}
    for side in sides.values():
        stack.callback(side.close)
    return sides


def build(sides: dict[str, Side], numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters and GFLOP a picture. Raises SystemExit if the parameters differ by more than 3 %."""
    shape = {**numbers, "threads": torch.get_num_threads()}
    built: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        built[name] = side.ask("build", shape=shape)
        shape.setdefault("parameters", built[name]["parameters"])  # the peer's are made to match
        print(f"{name}: {built[name]['parameters'] / 1e6:.2f} M parameters, {built[name]['gflop']:.2f} GFLOP/picture",
              file=sys.stderr)  # fmt: skip
    ours = built["unclip"]["parameters"]
    if any(abs(facts["parameters"] - ours) > TOLERANCE * ours for facts in built.values()):
        raise SystemExit(f"not comparable, parameters differ by more than {TOLERANCE:.0%}: {built}; change SIZES")
    return built


def measure(
    sides: dict[str, Side], built: dict[str, dict[str, Any]], numbers: dict[str, Any], rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Seconds of each side's steps and FLOP/s of the matrix product, in turns; the ratios of them."""
    turns = {"gemm, flop/s": lambda: sides["unclip"].ask("gemm")["flops"]}
    for name, side in sides.items():
        side.ask("train_step", steps=1)  # warm up
        side.ask("sampling_step", steps=1)
        turns[f"training, {name}"] = lambda side=side: side.ask("train_step", steps=numbers["repeats"])["seconds"]
        turns[f"sampling, {name}"] = lambda side=side: side.ask("sampling_step", steps=numbers["steps"])["seconds"]
    found = take_turns(turns, rounds)
    done = 1e9 * built["unclip"]["model_gflop"] * numbers["batch"]
    reached = [done / seconds for seconds in found["training, unclip"]]
    ratios = {"gemm_peak_share": ratio(reached, found["gemm, flop/s"])}
    if "dalle2_pytorch" in sides:
        for kind, name in (("training", "train_step"), ("sampling", "sampling_step")):
            theirs, ours = found[f"{kind}, dalle2_pytorch"], found[f"{kind}, unclip"]
            ratios[f"{name}_vs_dalle2_pytorch"] = ratio(theirs, ours)
    return ratios, found


if __name__ == "__main__":
    main()
