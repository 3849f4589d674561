"""Pages about runs: curves, sheets, lineage."""
