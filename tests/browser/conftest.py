"""One server and one browser for all tests; notebooks are copies in the server's own folder."""

import shutil
from pathlib import Path

import nbformat
import pytest

from tests.browser import lab as jupyter

NOTEBOOKS = sorted((jupyter.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The folder that JupyterLab shows: every notebook as it is committed."""
    path = tmp_path_factory.mktemp("lab")
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, path)
    return path


@pytest.fixture(scope="session")
def address(folder):
    with jupyter.server(folder, folder.parent / "jupyterlab.log") as found:
        yield found


@pytest.fixture(scope="session")
def chromium():
    with jupyter.browser() as found:
        yield found


@pytest.fixture(scope="module")
def lab(chromium, address):
    """A page for the tests of one file; its kernels end with it."""
    found = jupyter.Lab(chromium, address)
    yield found
    found.end_kernels()
    found.page.close()


def write_small(source: Path, target: Path, **parameters) -> Path:
    """A copy of a notebook with its small test parameters and `parameters`."""
    small = nbformat.read(source, as_version=4).metadata["vqlib"]["test_parameters"]
    return jupyter.write_copy(source, target, small | parameters)


def write_cells(target: Path, *sources: str) -> Path:
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, target)
    return target
