"""The report: one HTML file from which a reader can tell whether a run is healthy; ``scripts/report.py`` makes it."""
