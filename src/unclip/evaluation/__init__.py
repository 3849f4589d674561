"""Metrics, probes and reports on generated pictures."""
