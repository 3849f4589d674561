"""Errors that a user can act on. The commands print their message without a traceback and exit with 1."""


class UnclipError(Exception):
    """Base of every error whose message says what is wrong, where, and what to do next."""


class ConfigError(UnclipError, ValueError):
    """A setting is misspelt, of the wrong type, or contradicts another one."""


class ArtifactError(UnclipError):
    """An artifact is missing, damaged, of another kind, or belongs to another CLIP."""


class DataError(UnclipError):
    """A data set or an embeddings folder is missing, damaged or does not match."""


class TrainingError(UnclipError):
    """A run cannot go on: its loss is not finite."""
