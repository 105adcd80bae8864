"""The Triton kernels without a GPU: in the interpreter, in a process of its own, and compiled for an A100 and an H100."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vqlib import kernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed; CUDA builds of torch on Linux bring it", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT, WIDE, SHORT, BYTES, INT, LONG = "*fp32", "*fp64", "*i16", "*u8", "*i32", "*i64"  # pointers, in Triton's words


def _compile(kernel, target, **values):
    """Compile a kernel for a GPU that need not be there; values are types of arguments, or constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {parameter.name: values[parameter.name] for parameter in kernel.params}
    types = {name: value if isinstance(value, str) else "constexpr" for name, value in names.items()}
    constants = {name: value for name, value in names.items() if not isinstance(value, str)}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"enable_fp_fusion": True}).asm


def _spilled(cubin, folder):
    """Bytes of a thread's stack, where registers go that do not fit; by what the file says of itself."""
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return int((said.stdout + said.stderr).split("STACK:")[1].split()[0])


def _kernels():
    """Every kernel, for the sizes of the paper's codes and for odd ones: name -> kernel, types and constants."""
    from vqlib.kernels import cuda_gather, cuda_ratios, cuda_search, cuda_soft

    found = {}
    search = {"x": FLOAT, "table": FLOAT, "bias": FLOAT, "found": LONG, "k": "i32"}
    sums = {"x": FLOAT, "codes": LONG, "largest": FLOAT, "partial": LONG, "count": "i32", "k": "i32", "tables": "i32"}
    sums |= {"sums": WIDE, "counts": LONG, "free": "i32", "free_square": "i32"}
    soft = {"codewords": FLOAT, "candidates": SHORT, "out": FLOAT, "grad": FLOAT, "partial": FLOAT, "k": "i32"}
    settle = {"logits": FLOAT, "candidates": BYTES, "partial": FLOAT, "counts": INT, "count": "i32", "k": "i32"}
    for d, n, count in ((4, 3, "i64"), (3, 1, "i32"), (16, 2, "i32")):
        values = search | {"n": "i32" if n > 1 else 1, "count": count} | cuda_search.search_sizes(d, n)
        found[f"nearest {d} {n}"] = cuda_search._nearest_kernel, values
        found[f"sums {d}"] = cuda_search._sums_kernel, sums | cuda_search.sums_sizes(d)
        found[f"total {d}"] = cuda_search._total_kernel, sums | {"LENGTH": d, "WIDTH": 32, "ROWS": 64}
    for d, n, logits, tables, count in ((4, 2, FLOAT, "i32", "i32"), (4, 3, FLOAT, "i32", "i64"), (3, 1, None, 1, 1)):
        values = soft | cuda_soft.soft_sizes(d, n, logits is not None) | {"logits": logits, "grad_logits": logits}
        values |= {"tables": tables, "count": count}
        found[f"forward {d} {n}"] = cuda_soft._forward_kernel, values
        found[f"backward {d} {n}"] = cuda_soft._backward_kernel, values
    for n in (2, 3, 16):
        sizes = cuda_ratios.ratio_sizes(n)
        gradient = {"logits": FLOAT, "grad": FLOAT, "open_rows": LONG, "weight": "fp32", "count": "i32"} | sizes
        for kind, rows in (("absolute", None), ("quadratic", LONG)):
            values = gradient | {"open_rows": rows, "ABSOLUTE": rows is None}
            found[f"{kind} gradient {n}"] = cuda_ratios._gradient_kernel, values
        for number in range(3):
            values = {"logits": FLOAT, "counts": INT, "count": "i32", "rank": "i32", "PASS": number} | sizes
            found[f"rank {n} {number}"] = cuda_ratios._rank_kernel, values
        for limit, here in (("fp32", True), (FLOAT, False)):
            values = settle | sizes | {"limit": limit, "LIMIT_IS_HERE": here, "FREEZE": True}
            found[f"settle {n} {here}"] = cuda_ratios._settle_kernel, values
    found["limit"] = cuda_ratios._limit_kernel, {"counts": INT, "limit": FLOAT, "rank": "i32"}
    row = {"partial": FLOAT, "counts": INT, "row": WIDE, "programs": "i32", "count": "i32", "k": "i32", "BLOCK": 1024}
    found["row"] = cuda_ratios._row_kernel, row
    numbers = {"count": "i32", "rate": "fp32", "smoothing": "fp32", "rest": "fp32", "eps": "fp32", "ELEMENTS": 2048}
    pointers = dict.fromkeys(("values", "grad", "squares", "loss"), FLOAT)
    found["rmsprop"] = cuda_ratios._rmsprop_kernel, pointers | numbers
    gather = {"codes": BYTES, "count": "i32", "size": "i32"}
    for bits, d, kinds in ((8, 4, ("*fp16", "*bf16")), (12, 3, (FLOAT, FLOAT))):
        values = gather | {"codebook": kinds[0], "scale": FLOAT, "out": kinds[1]} | cuda_gather.gather_sizes(bits, d)
        found[f"gather {bits} {d}"] = cuda_gather._gather_kernel, values
    return found


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="tests/kernels/cuda runs in this process")
def test_the_kernels_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent / "cuda")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", [80, 90])
def test_every_kernel_compiles_for_a_gpu_that_is_not_here_and_keeps_to_its_registers(tmp_path, monkeypatch, target):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spilled = {}
    for name, (kernel, values) in _kernels().items():
        asm = _compile(kernel, target, **values)
        assert asm["cubin"] and "tf32" not in asm["ptx"], name
        assert name != "gather 8 4" or "cvt.rn.bf16" in asm["ptx"]  # rounded to the nearest
        if name.startswith("nearest"):
            assert "fma.rn.f32" in asm["ptx"], name
        spilled[name] = _spilled(asm["cubin"], tmp_path)
    print("bytes of registers spilled:", {name: spilt for name, spilt in spilled.items() if spilt} or 0)
    assert max(spilled.values()) <= 16, spilled


def test_every_kernel_of_the_back_end_is_compiled_here():
    """A new kernel has to join the list above."""
    import triton

    from vqlib.kernels import cuda_gather, cuda_ratios, cuda_search, cuda_soft

    modules = (cuda_gather, cuda_ratios, cuda_search, cuda_soft)
    there = {name for module in modules for name, value in vars(module).items()
             if isinstance(value, triton.JITFunction) and name.endswith("_kernel")}  # fmt: skip
    assert there == {kernel.__name__ for kernel, _ in _kernels().values()}


def test_without_triton_the_twins_do_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("cuda", "cuda_search", "cuda_launch"):
        monkeypatch.delitem(sys.modules, f"vqlib.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    assert kernels.back_end.__wrapped__("cuda") is None and kernels.back_end("mps") is None


def test_a_compiler_that_is_not_there_is_told_once_and_the_twins_do_the_work(monkeypatch):
    from vqlib.kernels import cpu

    def assign(x, codewords):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(cpu, "assign", assign)
    with pytest.warns(UserWarning, match="no kernel can be compiled for cpu.*slower.*Failed to find C compiler"):
        assert kernels.back_end.__wrapped__("cpu") is None
