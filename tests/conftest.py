"""What every test needs: no display, no network, no figure left open."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub fails at once instead of hanging

import pytest

import vqlib.system.compat  # noqa: F401, before any test imports diffusers


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import sys

    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
