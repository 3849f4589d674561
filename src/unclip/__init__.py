"""unclip: train every stage of an unCLIP / DALL-E 2 system and turn captions into pictures."""

__version__ = "0.1.0"
