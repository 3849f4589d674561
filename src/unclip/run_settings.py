"""What defines a run, and whether a folder is that run's: ``identity.json`` and ``config.yaml``."""

import json
from pathlib import Path
from typing import Any

import yaml

from unclip.config import identity, to_plain
from unclip.drafts import write_atomic
from unclip.errors import ConfigError


def _defining(cfg: Any) -> dict[str, Any]:
    """The settings that a resumed run must share."""
    return {k: v for k, v in identity(cfg).items() if k not in ("run", "trainer.max_steps")}


def compare_settings(run: Path, cfg: Any) -> None:
    """ConfigError, with the difference, where the folder is another run's."""
    path = run / "identity.json"
    if not path.exists():
        if (run / "artifact").exists():
            raise ConfigError(f"{run} holds an artifact that was not trained there; choose another run=...")
        return
    mine, theirs = _defining(cfg), json.loads(path.read_text())
    changed = [
        f"  {k}: {theirs.get(k)!r} -> {mine.get(k)!r}" for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)
    ]
    if changed:
        raise ConfigError(
            f"{run} was started with other settings:\n" + "\n".join(changed) + "\n"
            "Use the same settings to resume it, or another run=... to start anew."
        )


def write_settings(run: Path, cfg: Any) -> None:
    """Keep what defines the run in ``identity.json``, and all settings, for people, in ``config.yaml``."""
    write_atomic(run / "identity.json", (json.dumps(_defining(cfg), indent=2, sort_keys=True) + "\n").encode())
    (run / "config.yaml").write_text(yaml.safe_dump(to_plain(cfg), sort_keys=False))
