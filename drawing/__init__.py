"""Figures and pages, without a display."""

import os

# Before Matplotlib is imported: Jupyter names a backend that only its own environment has.
os.environ["MPLBACKEND"] = "agg"
