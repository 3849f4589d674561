"""unclip: train every stage of an unCLIP / DALL-E 2 system and turn captions into pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

__version__ = "0.1.0"
__all__ = ["UnCLIP", "__version__"]


def __getattr__(name: str) -> Any:
    """``unclip.UnCLIP``, loaded when it is asked for: torch takes seconds to import."""
    if name != "UnCLIP":
        raise AttributeError(f"module 'unclip' has no attribute {name!r}")
    from unclip.pipeline import UnCLIP

    return UnCLIP
