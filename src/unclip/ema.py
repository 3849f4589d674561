"""Power-function averages of the weights, their snapshots, and an average of any width made of those after training.

The average of exponent gamma weighs the weights at time tau by tau^gamma. Its relative width sigma_rel, the standard deviation of
that profile over the training time, names it (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", sec. 3). Snapshots of two such averages over a run span many others: a least-squares fit of their profiles gives the
coefficients (sec. 3.2).
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unclip import artifact
from unclip.config import WIDEST_EMA
from unclip.errors import ArtifactError, ConfigError
from unclip.tensor_file import write_tensors

log = logging.getLogger(__name__)
FOLDER = "ema"  # in the run
BAD_FIT = 0.1  # of the wanted profile's norm


def relative_width(gamma: float) -> float:
    """sigma_rel of the profile (gamma + 1) tau^gamma on [0, 1]: its standard deviation."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def exponent(width: float) -> float:
    """gamma of the profile with relative width ``width``, by bisection: the width falls as gamma grows."""
    if not 0 < width < WIDEST_EMA:
        raise ConfigError(f"sigma_rel={width} must lie between 0 and {WIDEST_EMA}; usual ones are 0.01 to 0.2")
    low, high = 0.0, 1.0
    while relative_width(high) > width:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_width(middle) > width else (low, middle)
    return (low + high) / 2


def coefficients(gammas: Tensor, times: Tensor, gamma: float, time: float) -> tuple[Tensor, float]:
    """The weights (n,), of sum 1, with which profiles (``gammas``, ``times``), (n,) each, come nearest to (gamma, time).

    Also the distance that remains, relative to the wanted profile's norm. Float64 throughout. The paper does not constrain the
    sum; without that, a poor fit would scale the weights.
    """
    gammas, times = torch.cat([gammas, gammas.new_tensor([gamma])]), torch.cat([times, times.new_tensor([time])])
    products = _inner(gammas[:, None], times[:, None], gammas[None], times[None])
    scale = products.diagonal().sqrt()
    products = products / scale[:, None] / scale  # cosines: profiles near the start have huge norms
    known, wanted = products[:-1, :-1], products[:-1, -1]
    shares = scale[-1:] / scale[:-1]
    system = torch.cat([torch.cat([known, shares[:, None]], dim=1), torch.cat([shares, shares.new_zeros(1)])[None]])
    target = torch.cat([wanted, wanted.new_ones(1)])[:, None]
    found = torch.linalg.lstsq(system, target, driver="gelsd").solution[:-1, 0]  # with a Lagrange multiplier
    rest = 1 - 2 * found @ wanted + found @ known @ found
    return found * scale[-1] / scale[:-1], float(rest.clamp(min=0).sqrt())


def _inner(gamma_a: Tensor, time_a: Tensor, gamma_b: Tensor, time_b: Tensor) -> Tensor:
    """The integral over [0, min(time_a, time_b)] of the product of two profiles (gamma + 1) tau^gamma / time^(gamma + 1)."""
    until = torch.minimum(time_a, time_b)
    logs = gamma_a * (until / time_a).log() + gamma_b * (until / time_b).log() + (until / time_a / time_b).log()
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * logs.exp()


@dataclass(frozen=True)
class Snapshot:
    """One file of a run: the averages of ``widths`` at ``step``."""

    path: Path
    step: int
    widths: tuple[float, ...]


def save_snapshot(run: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> Path:
    """Write RUN/ema/STEP.safetensors with a tensor WIDTH:NAME for every weight; it appears whole or not at all."""
    path = run / FOLDER / f"{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    tensors = {f"{width}:{name}": value for width, weights in averages.items() for name, value in weights.items()}
    try:
        write_tensors(draft, tensors, {"step": str(step), "widths": json.dumps(list(averages))})
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path


def snapshots(run: Path) -> list[Snapshot]:
    """The run's snapshots by step. Raises ArtifactError for a damaged one."""
    found = []
    for path in sorted((run / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
            found.append(Snapshot(path, int(told["step"]), tuple(json.loads(told["widths"]))))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); remove it, the other snapshots may be enough") from error
    return found


def drop_after(run: Path, step: int) -> None:
    """Remove snapshots beyond the checkpoint that a run resumes from: it makes them again."""
    for path in (run / FOLDER).glob("*.safetensors"):
        if int(path.stem) > step:
            path.unlink(missing_ok=True)  # every rank calls this


def reconstruct(run: Path, out: Path, width: float, step: int | None = None) -> tuple[Path, float]:
    """Write to ``out`` the run's artifact with an average of relative width ``width`` at ``step`` (default: the last snapshot).

    Returns the artifact and the part of the profile's norm that the snapshots cannot express. Raises ArtifactError where the
    run has no snapshots or they are not of its model, ConfigError for a width or step that they do not reach.
    """
    artifact.refuse_run(out)
    if out.resolve() == run.resolve():
        raise ConfigError(
            f"--out {out} is the run itself, whose artifact it would replace; give another folder than the run's"
        )
    manifest = artifact.read_manifest(run)
    kept = snapshots(run)
    if not kept:
        raise ArtifactError(
            f"{run / FOLDER} holds no snapshots: train with optim.ema_profiles=[0.05,0.1] optim.ema_snapshot_every=N"
        )
    step = kept[-1].step if step is None else step
    kept = [snapshot for snapshot in kept if snapshot.step <= step]
    if not kept or kept[-1].step != step:
        raise ConfigError(f"{run / FOLDER} has no snapshot of step {step}; take one of those in its file names")
    terms = [(snapshot, index) for snapshot in kept for index in range(len(snapshot.widths))]
    gammas = torch.tensor([exponent(snapshot.widths[i]) for snapshot, i in terms], dtype=torch.float64)
    times = torch.tensor([float(snapshot.step) for snapshot, _ in terms], dtype=torch.float64)
    factors, rest = coefficients(gammas, times, exponent(width), float(step))
    if rest > BAD_FIT:
        log.warning(
            "%.0f %% of the profile is out of the snapshots' reach: take a wider one, or keep more snapshots",
            100 * rest,
        )
    weights = artifact.read_weights(run)
    for name, value in _mixed(kept, factors.tolist()):
        if name not in weights or weights[name].shape != value.shape:
            raise ArtifactError(
                f"{kept[0].path} holds {name}, which the artifact of {run} does not: two runs in one folder?"
            )
        weights[name] = value
    about = {"ema_sigma_rel": width, "ema_unreached": rest}
    told = replace(
        manifest,
        step=step,
        samples=manifest.samples * step // max(1, manifest.step),
        metrics=about,
        settings={**manifest.settings, "ema": about},
        statistics_sha256="",
    )
    return artifact.save(out, weights, told), rest


def _mixed(kept: list[Snapshot], factors: list[float]) -> Iterator[tuple[str, Tensor]]:
    """Each weight's sum over the snapshots, in float64, one weight in memory at a time."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, "pt")) for snapshot in kept]
        held = [{key.partition(":")[2] for key in file.keys()} for file in files]  # noqa: SIM118
        if odd := [snapshot.path for snapshot, names in zip(kept, held, strict=True) if names != held[0]]:
            raise ArtifactError(f"{odd[0]} holds other weights than {kept[0].path}: two runs in one folder?")
        columns = [(file, w) for file, snapshot in zip(files, kept, strict=True) for w in snapshot.widths]
        for name in sorted(held[0]):
            total = torch.zeros((), dtype=torch.float64)
            for (file, w), factor in zip(columns, factors, strict=True):
                total = total + factor * file.get_tensor(f"{w}:{name}").double()
            yield name, total.float()
