import os
from pathlib import Path

import pytest
from nodes import two_nodes

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def cluster():
    """Two nodes for the whole session, whose workers find vqlib and the toys."""
    places = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    with two_nodes() as nodes:
        yield nodes
