"""Foreign weight files: tensor by tensor, one file in memory at a time, and never any code of a pickle."""

import collections
import json
import pickle
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from unclip.errors import ArtifactError
from unclip.tensor_file import BROKEN

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers and transformers
ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")  # the first that is there is taken
TENSORS = {  # what a file of tensors is made of; all else that a pickle names becomes an Unknown
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    **{
        ("builtins", kind.__name__): kind
        for kind in (dict, list, tuple, set, frozenset, int, float, bool, complex, str)
    },
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}


@dataclass(frozen=True)
class Source:
    """Where a tensor stands: in ``file`` under ``name``; ``change`` makes of it what is wanted, which has ``shape``."""

    file: Path
    name: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] | None = None


class OneFile:
    """Reads tensors as float32 and keeps the last file open only: what is not asked for takes no memory of its own."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._get: Any = None

    def read(self, source: Source) -> Tensor:
        if self._path != source.file:
            self._path, self._get = None, None  # before the next one is opened
            self._get = _getter(source.file)
            self._path = source.file
        value = self._get(source.name).float()
        return value if source.change is None else source.change(value)


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; ``extra`` are at hand."""

    def __init__(self, sources: Mapping[str, Source], extra: Mapping[str, Tensor] | None = None) -> None:
        self.sources, self.extra, self._files = dict(sources), dict(extra or {}), OneFile()

    def __getitem__(self, name: str) -> Tensor:
        return self.extra[name] if name in self.extra else self._files.read(self.sources[name])

    def __iter__(self) -> Iterator[str]:
        yield from self.sources
        yield from self.extra

    def __len__(self) -> int:
        return len(self.sources) + len(self.extra)


def component_files(folder: Path) -> list[Path]:
    """The weights of a component's folder, .safetensors before .bin and float32 before float16; several if they are sharded."""
    for ending in ENDINGS:
        for stem in STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
            index = folder / f"{stem}{ending}.index.json"
            if index.is_file():
                try:
                    return [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
                except (ValueError, KeyError, AttributeError) as error:
                    raise ArtifactError(f"{index} is damaged ({error}); fetch the folder again") from error
    raise ArtifactError(f"{folder} holds no weights: neither {STEMS[0]}.safetensors nor .bin; fetch the folder again")


def component(folder: Path) -> dict[str, Source]:
    """Where each tensor of a component stands. Raises ArtifactError for damaged files, and for pickles with more than tensors."""
    return {name: source for file in component_files(folder) for name, source in described(file).items()}


def described(file: Path) -> dict[str, Source]:
    """The tensors of one .safetensors or .bin file."""
    if file.suffix != ".safetensors":
        return {name: Source(file, name, tuple(value.shape)) for name, value in _load(file).items()}
    with _told(file), safe_open(file, "pt") as found:
        return {name: Source(file, name, tuple(found.get_slice(name).get_shape())) for name in found.keys()}  # noqa: SIM118


def _getter(file: Path) -> Any:
    if file.suffix == ".safetensors":
        with _told(file):
            return safe_open(file, "pt").get_tensor
    return _load(file).__getitem__


def _load(file: Path) -> dict[str, Tensor]:
    """A .bin file's tensors; those of another checkpoint, of whatever nesting, by dotted names. Mapped into memory."""
    zipped = zipfile.is_zipfile(file)
    if file.suffix != ".bin" and zipped:
        return flat(read_pickle(file))
    with _told(file):
        found = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
        return flat(found) if file.suffix != ".bin" else {n: v for n, v in found.items() if isinstance(v, Tensor)}


def flat(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts and lists by dotted names."""
    if isinstance(value, Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found: dict[str, Tensor] = {}
    for name, inner in pairs:
        found |= flat(inner, f"{path}.{name}" if path else str(name))
    return found


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Around reading a file: what goes wrong, in words."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{file} holds more than weights; it was not loaded, and no code of it was run. Get it as .safetensors, or from "
            "someone whom you trust"
        ) from error
    except BROKEN as error:
        raise ArtifactError(f"{file} cannot be read ({error}): it is cut short or damaged; fetch it again") from error


class Unknown:
    """Stands for whatever a pickle names that is no tensor: it takes what the pickle gives it, and does nothing."""

    module, name = "", ""
    args: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Unknown":
        self = super().__new__(cls)
        self.args, self.state = list(args), None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.args.append((key, value))

    def append(self, value: Any) -> None:
        self.args.append(value)

    def extend(self, values: Any) -> None:
        self.args.extend(values)

    def __call__(self, *args: Any, **kwargs: Any) -> "Unknown":
        return self

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers; every other name becomes an :class:`Unknown`, so nothing foreign ever runs."""

    def find_class(self, module: str, name: str) -> Any:
        known = TENSORS.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        return type("Unknown", (Unknown,), {"module": module, "name": name})


def _restricted(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE: Any = types.SimpleNamespace(Unpickler=_Unpickler, load=_restricted, __name__="tensors only")


def read_pickle(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain containers as they are, all else as :class:`Unknown`; no code is run.

    Tensors are mapped into memory. Raises ArtifactError for anything else than such a file.
    """
    if not zipfile.is_zipfile(file):
        raise ArtifactError(f"{file} is not a checkpoint of torch (since 1.6), or it is cut short; fetch it again")
    with zipfile.ZipFile(file) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names or "data.pkl" not in names:
        raise ArtifactError(
            f"{file} is a TorchScript archive or another zip file, not a checkpoint: it holds a program"
        )
    with _told(file):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE)
