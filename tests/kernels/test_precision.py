"""Within a block products have the precision that was asked for, and torch is afterwards as it was found."""

import subprocess
import sys

ASKED = [
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = True; backends.cudnn.allow_tf32 = False",
    "backends.cuda.matmul.fp32_precision = 'tf32'; backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'tf32'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
]
SWITCHES = """
import os, sys, torch
from torch import backends
from vqlib.kernels.products import linear, products_in

def told(read):
    try:
        return read()
    except RuntimeError:
        return "disagree"

def switches():
    newer = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv]
    older = [torch.get_float32_matmul_precision, lambda: backends.cuda.matmul.allow_tf32, lambda: backends.cudnn.allow_tf32]
    return [switch.fp32_precision for switch in newer], [told(read) for read in older]

def check(asked):
    x, weight = torch.randn(4, 64, 256), torch.randn(64, 256)
    exact = linear(x, weight)
    exec(asked)
    before = switches()
    for name, gpu, older in (("float32", "ieee", "highest"), ("tf32", "tf32", "high"), ("bfloat16", "ieee", "highest")):
        with products_in(name, torch.device("cpu")):
            assert switches() == ([gpu] * 3 + ["ieee"] * 2, [older, gpu == "tf32", gpu == "tf32"]), (name, switches())
            assert name == "bfloat16" or torch.equal(linear(x, weight), exact), name
        assert switches() == before, (name, before, switches())

for asked in sys.argv[1:]:  # each in a copy of this process, which has computed nothing yet
    if not (child := os.fork()):
        check(asked)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, asked
"""


def test_products_are_those_asked_for_whatever_torch_is_set_to():
    """In processes of their own: torch does not take back which generation of its switches was used."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SWITCHES, *ASKED], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-1500:]
