"""Imported first by vqlib: torchvision, and so torch-fidelity and diffusers' DiT, import beside a CPU build of torch.

The rescue itself is `_startup.py`, which an environment can also run at every start of Python. Here it only starts to
listen, so that vqlib works from a bare source tree too; where torchvision loads by itself, nothing is declared.
"""

from vqlib import _startup

_startup.listen()
