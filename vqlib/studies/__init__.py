"""Whole jobs: presets, estimates, methods and baselines, rows and tables, ablations."""
