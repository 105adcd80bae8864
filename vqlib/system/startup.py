"""Lets `import torchvision` succeed beside a CPU build of torch, in a whole environment, also without `import vqlib`.

The Linux wheel of torchvision is a CUDA build. Beside a CPU torch its compiled part does not load, its Python part then
asks for operators nobody declared, and torch-fidelity and diffusers' DiT fail with it. `make env` runs this file as a
script: it copies itself into site-packages, where a .pth line makes Python import it at every start. It imports nothing
heavy, waits for `import torchvision`, and does nothing where that succeeds by itself.
"""

import importlib.machinery
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARY = []  # torch forgets the operators when the library object is collected


class _Loader:
    """Runs torchvision's own loader; when an operator is missing, declares the operators and runs it once more."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            declare_operators()
            self.loader.exec_module(module)


class Finder:
    """A meta-path finder that knows one module: torchvision."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def declare_operators() -> None:
    """Declare the schemas torchvision's Python part refers to, once; calling such an operator still fails."""
    if not _LIBRARY:
        import torch

        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for schema in SCHEMAS:
            _LIBRARY[0].define(schema)


def listen() -> None:
    """Wait for `import torchvision` in this process."""
    if not any(
        getattr(finder, "__name__", "") == "Finder" and finder.__module__.endswith("_startup")
        for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, Finder)


def install() -> str:
    """Copy this file into this interpreter's site-packages and have it imported at every start; returns its path."""
    import pathlib
    import shutil
    import sysconfig

    folder = pathlib.Path(sysconfig.get_paths()["purelib"])
    copy = shutil.copyfile(__file__, folder / "vqlib_startup.py")
    (folder / "vqlib_startup.pth").write_text("import vqlib_startup; vqlib_startup.listen()\n")
    return str(copy)


if __name__ == "__main__":
    install()
