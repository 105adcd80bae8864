"""Every notebook runs from top to bottom with small parameters, and is committed clean and executed."""

import re
from pathlib import Path

import nbformat
import papermill
import pytest
import tiny

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
ON_BOTH = ("00", "01", "02", "03", "04", "05", "90")  # run once more with the second bundled model
DEVICE = 'device = "auto"  # the GPU where there is one; or cpu, cuda:1'
MADE_BY_HAND = r"\btorch\.(tensor|as_tensor|zeros|ones|full|empty|arange|linspace|eye|rand|randn)\("


def test_the_table_of_contents_lists_exactly_the_notebooks():
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert rows == [path.stem for path in NOTEBOOKS]


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_small_parameters(path, tmp_path, monkeypatch):
    """One without views runs where there is no ipywidgets; one with views shows a still figure before each."""
    has_views = bool(re.search(r"\bexplore\.\w+\(", path.read_text()))
    if not has_views:
        hide_ipywidgets(tmp_path / "hidden", monkeypatch)
    kinds = [tuple(output.data) for output in execute(path, tmp_path, monkeypatch) if "data" in output]
    views = [i for i, kind in enumerate(kinds) if "application/vnd.jupyter.widget-view+json" in kind]
    assert any("image/png" in kind for kind in kinds)
    assert bool(views) is has_views and all("image/png" in kinds[i - 1] for i in views)


@pytest.mark.notebooks
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] in ON_BOTH], ids=lambda path: path.stem)
def test_notebook_runs_with_the_second_bundled_model(path, tmp_path, monkeypatch):
    """In colour, with other classes, a velocity in place of ε, and a reference of its own."""
    source = parameters_cell(nbformat.read(path, as_version=4)).source
    names = re.findall(r"^(model_name|table_name|subject|preset_name)\s*=", source, re.MULTILINE)
    assert len(names) == 1, names
    values = {"subject": "emoji", "preset_name": "sit-mini-emoji-w2"}
    outputs = execute(path, tmp_path, monkeypatch, {names[0]: values.get(names[0], "sit-mini-emoji")})
    shown = "\n".join(str(output.get("data", "")) + output.get("text", "") for output in outputs)
    assert "fashion" not in shown.lower().replace(str(tmp_path).lower(), "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_works_on_the_device_it_is_given(path, tmp_path, monkeypatch):
    """A GPU by itself, or the one named: with one that is not here it stops before anything is computed on the CPU."""
    notebook = nbformat.read(path, as_version=4)
    assert DEVICE in parameters_cell(notebook).source.splitlines()
    cells = [cell.source.removeprefix("%matplotlib inline\n") for cell in notebook.cells if cell.cell_type == "code"]
    code = "\n".join(cells)
    for call in ("load", "load_transformer", "evaluate"):
        for given in re.findall(rf"\bvqlib\.{call}\(([^()]*)\)", code):
            assert "device" in given or given == "damaged", f"vqlib.{call}({given})"
    for line in code.splitlines():
        assert "device" in line or not re.search(MADE_BY_HAND, line), f"on the CPU beside a GPU: {line}"
    monkeypatch.setenv("FASHION_MNIST", str(tiny.fashion_mnist(tmp_path / "fashion-mnist")))
    monkeypatch.chdir(FOLDER)
    for name in ("models.pipeline._load_folder", "bundled.training.train"):
        monkeypatch.setattr(f"vqlib.{name}", lambda *_, **__: pytest.fail("on another device than the one given"))
    names = {"__name__": "notebook"}
    with pytest.raises(ValueError, match="device 'cuda:77' is not here"):
        for source in cells:
            exec(source, names)
            names["device"] = "cuda:77" if DEVICE in source else names["device"]


def execute(path, folder, monkeypatch, others=()):
    """All outputs of a notebook. Parameters come from its metadata and `others`; `out` is added where it has such a parameter."""
    monkeypatch.setenv("FASHION_MNIST", str(tiny.fashion_mnist(folder / "fashion-mnist")))
    monkeypatch.setenv("EMOJI_DATASOURCE", str(tiny.emoji(folder / "emoji.tgz")))
    notebook = nbformat.read(path, as_version=4)
    parameters = dict(notebook.metadata["vqlib"]["test_parameters"]) | dict(others)
    if re.search(r"^out\s*=", parameters_cell(notebook).source, re.MULTILINE):
        parameters["out"] = str(folder / "run")
    target = folder / path.name
    papermill.execute_notebook(path, target, parameters, cwd=FOLDER, progress_bar=False, kernel_name="python3")
    cells = nbformat.read(target, as_version=4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def hide_ipywidgets(folder, monkeypatch):
    """Kernels find no ipywidgets, as where it is not installed."""
    folder.mkdir()
    (folder / "ipywidgets.py").write_text("raise ImportError('hidden by a test')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata, "drop metadata.widgets before committing"
    assert parameters_cell(notebook)
    assert not [cell for cell in notebook.cells if cell.metadata.keys() - {"tags"}], "drop the clock times"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not executed from top to bottom in a fresh kernel"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure in the committed notebook"
    assert path.stat().st_size < 2_000_000


def parameters_cell(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged 'parameters'"
    return tagged[0]
