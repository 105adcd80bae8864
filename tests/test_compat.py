"""`import vqlib._compat` is enough for torch-fidelity and diffusers' DiT, and leaves a working torchvision alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_torch_fidelity_and_dit_import_after_it():
    result = python("import vqlib._compat, torch_fidelity\nfrom diffusers import DiTPipeline\nprint('ready')")
    assert result.stdout.strip() == "ready", result.stderr


ALONE = """
import sys, types
sys.modules["vqlib"] = types.ModuleType("vqlib")  # the package without what its __init__ imports
sys.modules["vqlib"].__path__ = ["vqlib"]
from vqlib import _compat, _startup
"""


def test_a_torchvision_that_loads_gets_no_operators(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("works = True\n")
    code = f"{ALONE}\nsys.path.insert(0, {str(tmp_path)!r})\nimport torchvision\n" \
        "print(torchvision.works, len(_startup._LIBRARY), 'torch' in sys.modules)"
    result = python(code)
    assert result.stdout.split() == ["True", "0", "False"], result.stderr


def test_it_listens_once():
    result = python(f"{ALONE}\n_startup.listen()\nprint(sum(f.__module__.endswith('_startup') for f in sys.meta_path "
                    "if getattr(f, '__name__', '') == 'Finder'))")
    assert result.stdout.strip() == "1", result.stderr
