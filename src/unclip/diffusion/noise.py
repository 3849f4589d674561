"""Random numbers that depend on a sample, never on the batch, the rank or the device it happens to be drawn on."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"); GOLDEN: 2^64 / golden ratio.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(draw: F) -> F:
    """Not in a compiled graph: torch 2.14 makes one for the first lengths it sees, and its strides are wrong for others."""
    return cast(F, torch.compiler.disable(draw))


class Noise:
    """One independent source of numbers per sample, read through named streams.

    A number is a hash of (the sample's seed, the stream's name, the element's index): drawing is stateless, needs no
    generator and no host synchronisation, and a sample's numbers are the same in any batch and on any device (normals
    up to the rounding of log, sin and cos). The same stream read again gives the same numbers, so each draw wants its
    own name, and each stage of a pipeline its own branch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        """seeds: one integer per sample, any size (taken modulo 2^64)."""
        self.seeds = _int64(seeds, device)
        self.positions: Tensor | None = None
        self.run_seed = 0

    @classmethod
    @_uncompiled
    def at(cls, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> "Noise":
        """The noise of the samples at these global positions of a run's endless stream."""
        noise = cls([], device)
        noise.positions = _int64(positions, device)
        noise.run_seed = seed
        noise.seeds = _mix(noise.positions * _signed(GOLDEN) + _named(f"run {seed}"))
        return noise

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self.seeds.device

    @_uncompiled
    def branch(self, name: str) -> "Noise":
        """Other numbers for the same samples: two stages that both read "x_T" must not start from the same noise."""
        child = Noise([], self.device)
        child.seeds = _mix(self.seeds + _named(f"branch {name}"))
        child.positions, child.run_seed = self.positions, self.run_seed ^ _named(name)
        return child

    @_uncompiled
    def repeat(self, k: int) -> "Noise":
        """k samples for each one, row i * k + j being candidate j of sample i (as `repeat_interleave` orders them).

        Candidate 0 is the sample itself, and no candidate depends on k.
        """
        candidate = torch.arange(k, device=self.device)
        child = Noise([], self.device)
        other = _mix(_mix(self.seeds + _named("repeat"))[:, None] + candidate * _signed(GOLDEN))
        child.seeds = torch.where(candidate == 0, self.seeds[:, None], other).flatten()
        child.run_seed = self.run_seed
        if self.positions is not None:
            child.positions = (self.positions[:, None] * k + candidate).flatten()
        return child

    @_uncompiled
    def uniform(self, shape: tuple[int, ...], stream: str) -> Tensor:
        """(B, *shape) float32 in [0, 1), multiples of 2^-24."""
        bits = self._bits(math.prod(shape), stream)
        return _unit(bits).reshape(len(self), *shape)

    @_uncompiled
    def normal(self, shape: tuple[int, ...], stream: str) -> Tensor:
        """(B, *shape) float32 from N(0, 1), by the transform of Box & Muller (1958): two normals from 64 bits."""
        size = math.prod(shape)
        bits = self._bits((size + 1) // 2, stream)
        angle = (bits & 0xFFFFFFFF).float().mul_(math.tau * 2**-32)
        high = bits.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).add_(1)  # 1 ... 2^32: log stays finite
        radius = high.float().mul_(2**-32).log_().mul_(-2).sqrt_()
        pair = torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], dim=1)
        return pair[:, :size].reshape(len(self), *shape)

    @_uncompiled
    def low_discrepancy(self, shape: tuple[int, ...], stream: str) -> Tensor:
        """(B, *shape) float32 in [0, 1): the golden-ratio sequence at the samples' positions, with a random start.

        Any run of n neighbouring positions covers [0, 1) evenly (largest gap O(1/n)), so a batch of any size is
        stratified, however ranks share it; each single number still depends on the position alone.
        Raises ValueError for a noise made from seeds only.
        """
        if self.positions is None:
            raise ValueError("low-discrepancy numbers need positions: build the noise with Noise.at(seed, positions)")
        size = math.prod(shape)
        index = self.positions[:, None] * size + torch.arange(size, device=self.device)
        bits = index * _signed(GOLDEN) + _named(f"run {self.run_seed} {stream}")
        return _unit(bits).reshape(len(self), *shape)

    def _bits(self, count: int, stream: str) -> Tensor:
        """(B, count) int64 words, all 64 bits random: SplitMix64 in counter form."""
        key = _mix(self.seeds + _named(stream))
        index = torch.arange(1, count + 1, device=self.device).mul_(_signed(GOLDEN))
        return _mix(key[:, None] + index)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place, on int64 tensors (products wrap modulo 2^64; masks make the shifts logical)."""
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= _signed(MIX_1)
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= _signed(MIX_2)
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z


def _unit(bits: Tensor) -> Tensor:
    """int64 words to float32 in [0, 1): the top 24 bits, which float32 holds exactly."""
    return (bits >> 40).bitwise_and_(2**24 - 1).float().mul_(2**-24)


@cache
def _named(name: str) -> int:
    """A name's 64-bit hash, the same in every process."""
    return _signed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _int64(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64).to(device, non_blocking=True)
