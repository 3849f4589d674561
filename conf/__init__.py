"""The settings that ship with unclip."""
