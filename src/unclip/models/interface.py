"""What the stages agree on. Every model is built as ``Model(config, interface)``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interface:
    """Widths that the CLIP fixes for all later stages.

    ``embed_dim`` is the width of z_i and z_t, ``text_width`` that of the caption's token states, ``context_length`` the
    longest caption in tokens, ``vocab_size`` the number of token ids. ``clip`` is the hash of the CLIP artifact; it is
    empty for models that need no CLIP (upsamplers).
    """

    embed_dim: int = 0
    text_width: int = 0
    context_length: int = 0
    vocab_size: int = 0
    clip: str = ""


@dataclass
class ModelConfig:
    """Base of all model configurations; the subclass chosen in ``model=...`` decides which model is built."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that training reads."""
        raise NotImplementedError

    @property
    def trains(self) -> bool:
        """Whether the model has weights to train; others are complete when they are fitted."""
        return True

    @property
    def is_raw(self) -> bool:
        """Whether z_i and z_t are taken, and by a prior made, as CLIP's raw outputs; else their norms do not count."""
        return False

    @property
    def fitted(self) -> tuple[str, ...]:
        """The settings that only a fit reads, so that weights that came from another one cannot follow them."""
        return ()


@dataclass
class PriorConfig(ModelConfig):
    """Base of the priors' configurations: any of them may be ``model`` of ``train-prior``."""
