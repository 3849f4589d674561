"""What ``data.path`` may name: a data set's folder, here or behind an URL, or shards by braces or as a list."""

from collections.abc import Sequence

from braceexpand import braceexpand

from unclip.data.remote import PIPE, is_url
from unclip.errors import ConfigError


def place_of(path: str | Sequence[str], split: str) -> str | list[str]:
    """The folder of split ``split`` of the data set ``path``; or the shards, if ``path`` names shards.

    Shards end in .tar or begin with ``pipe:``, and braces stand for several: ``{00000..00099}.tar``.
    """
    given = [path] if isinstance(path, str) else list(path)
    shards = [item for item in given if item.startswith(PIPE) or item.endswith(".tar")]
    if not shards and len(given) == 1:
        return f"{given[0].rstrip('/')}/{split}"
    if len(shards) < len(given) or not shards:
        other = next((item for item in given if item not in shards), "")
        raise ConfigError(
            f"data.path lists {other!r}, which is no shard (*.tar or pipe:COMMAND); further data sets go to data.others"
        )
    try:
        return [location for item in shards for location in braceexpand(item)]
    except ValueError as error:  # unbalanced braces
        raise ConfigError(f"data.path={path}: {error}") from error


def is_stream_only(place: str | list[str]) -> bool:
    """Whether no index can stand beside these shards, since they are printed by commands."""
    return not isinstance(place, str) and any(location.startswith(PIPE) for location in place)


def is_remote(place: str | list[str]) -> bool:
    return all(map(is_url, [place] if isinstance(place, str) else place))
