"""Captioned pictures and their embeddings, in one order."""
