"""The web page of ``unclip ui``."""
