"""One thin LightningModule per stage. The losses and the sampling live in :mod:`unclip.models`."""
