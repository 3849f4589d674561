"""A second net beside a trained one, which takes over from it in sampling: of decoders and of upsamplers."""

from typing import Any

from unclip.errors import ConfigError


def take_first(model: Any, kind: str) -> None:
    """Give ``model.net`` the weights of the run ``model.cfg.first``, a decoder or an upsampler alike but for the second net.

    ConfigError where no run is given, or where it is of another CLIP or differs in what the two nets share.
    """
    from unclip import artifact

    cfg = model.cfg
    if cfg.first is None:
        raise ConfigError(
            f"these settings add a second net to a trained {kind}: give its run with model.first=RUN; to train that one first, "
            "leave out the second net"
        )
    first: Any = artifact.load(cfg.first, kind=kind)[0]
    if first.interface.clip != model.interface.clip:
        raise ConfigError(f"the {kind} of model.first={cfg.first} is of another CLIP than the data's embeddings")
    if cfg.kind_of_net() != first.cfg.kind_of_net():
        raise ConfigError(
            f"the {kind} of model.first={cfg.first} differs from this run in sizes, net, condition, diffusion or split: give the "
            "settings that it was trained with, and those of the second net beside them"
        )
    model.net.load_state_dict(first.net.state_dict())
