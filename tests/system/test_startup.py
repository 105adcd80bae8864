"""torch-fidelity and diffusers' DiT import in this environment; the torchvision rescue acts only where needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STARTUP = Path(__file__).resolve().parents[2] / "vqlib" / "system" / "startup.py"
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("copy_startup", {str(STARTUP)!r})
startup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(startup)
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "Finder"]
startup.listen()
"""


def python(code, path=None):
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("first", ["", "import vqlib", "import torchvision"])
def test_torch_fidelity_and_diffusers_import(first):
    result = python(f"{first}\nimport torch_fidelity\nfrom diffusers import DiTPipeline\nimport vqlib\nprint('ready')")
    assert result.stdout.strip().endswith("ready"), result.stderr


def torchvision(folder, body):
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text("from torchvision import parts\n")
    (folder / "torchvision" / "parts.py").write_text(body)
    return folder


def test_missing_operators_are_declared(tmp_path):
    broken = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: dets)\n"
    result = python(LOAD + "import torchvision\nprint(len(startup._LIBRARY))", torchvision(tmp_path, broken))
    assert result.stdout.strip() == "1", result.stderr


def test_a_working_torchvision_is_left_alone(tmp_path):
    result = python(
        LOAD + "import torchvision\nprint(len(startup._LIBRARY), 'torch' in sys.modules)", torchvision(tmp_path, "")
    )
    assert result.stdout.split() == ["0", "False"], result.stderr


def test_another_error_is_not_swallowed(tmp_path):
    result = python(LOAD + "import torchvision", torchvision(tmp_path, "raise RuntimeError('disk on fire')"))
    assert result.returncode and "disk on fire" in result.stderr


def test_vqlib_listens_once_and_asks_nothing_of_a_torchvision_that_loads(tmp_path):
    code = f"""
import sys, types
sys.modules["vqlib"] = package = types.ModuleType("vqlib")  # without what its __init__ imports
package.__path__ = [{str(STARTUP.parents[1])!r}]
from vqlib.system import compat, startup
startup.listen()
import torchvision
ours = [f for f in sys.meta_path if getattr(f, "__name__", "") == "Finder" and f.__module__.endswith("startup")]
print(len(ours), len(startup._LIBRARY), "torch" in sys.modules)
"""
    result = python(code, torchvision(tmp_path, ""))
    assert result.stdout.split() == ["1", "0", "False"], result.stderr
