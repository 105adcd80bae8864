"""Imported first by vqlib: torchvision, and so torch-fidelity and diffusers' DiT, import beside a CPU build of torch.

The rescue itself is `startup.py`, which an environment can also run at every start of Python. Here it only starts to
listen, so that vqlib works from a bare source tree too; where torchvision loads by itself, nothing is declared.
diffusers imports torchao where it is installed, which reports CUDA extensions it cannot load and deprecations of its
own: five lines at every start that concern nobody here, so these loggers speak up for errors only.
"""

import logging

from vqlib.system import startup

startup.listen()
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
