import json

import pandas as pd
import pytest
import tiny
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from vqlib.config import VQConfig
from vqlib.models import class_conditional, pipeline, structure
from vqlib.models.geometry import MIB, Geometry
from vqlib.packed.checkpoint import size_report
from vqlib.packed.harden import harden
from vqlib.quantizer.quantize import quantize


def test_the_default_is_dit_xl_2():
    xl = Geometry()
    assert xl.tokens == 256 and xl.depth * len(xl.linears()) == 196
    assert xl.parameters / 1e6 == pytest.approx(674.8, abs=0.1)
    assert xl.parameters_in_memory / 1e6 == pytest.approx(749.8, abs=0.1)
    assert xl.depth * xl.block_weights / 1e6 == pytest.approx(668.9, abs=0.1)
    assert xl.flops() / 1e12 == pytest.approx(0.237, abs=0.003)


@pytest.mark.parametrize("bits", [2, 3])
def test_sizes_are_the_quoted_ones(bits):
    quoted = pd.read_csv(pipeline.DATA / "paper" / "size.csv").set_index("bits")
    sizes = Geometry().sizes(VQConfig(bits=bits))
    row = quoted.loc[bits]
    assert sizes.total == pytest.approx(row["total_mib"], abs=0.01)
    assert sizes.codes == pytest.approx(row["codes_mib"], abs=0.01)
    assert sizes.codebooks == pytest.approx(row["codebooks_mib"], abs=0.01)
    assert sizes.biases == pytest.approx(row["biases_mib"], abs=0.01)
    assert sizes.full == pytest.approx(quoted.loc[32, "total_mib"], abs=0.01)


@pytest.mark.parametrize("rules", [{}, {"layers": (("*.to_q", 64, 4), ("*ff*", 8, 2)), "codebook_dtype": "float16"}])
@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_sizes_are_those_of_a_packed_model(scope, rules):
    vq = VQConfig(k=16, d=4, codebook_scope=scope, candidates=1, **rules)
    model = tiny.transformer(blocks=3)
    table = size_report(harden(quantize(model, vq), storage="float32"))
    sizes = Geometry.of(model.config).sizes(vq)
    assert sizes.codes * MIB == table["codes_bytes"].sum()
    assert sizes.codebooks * MIB == table["codebook_bytes"].sum()
    assert sizes.biases * MIB == table["bias_bytes"].sum()


def test_a_geometry_follows_from_a_config_and_gives_it_back():
    model = tiny.transformer(blocks=3)
    geometry = Geometry.of(model.config)
    assert sum(p.numel() for p in model.parameters()) == geometry.parameters_in_memory
    found = {name: (m.out_features, m.in_features) for name, m in structure.quantizable(model).items()}
    assert [found[f"transformer_blocks.2.{name}"] for name in geometry.linears()] == list(geometry.linears().values())
    with torch.device("meta"):
        again = DiTTransformer2DModel(**geometry.config(depth=1))
    assert len(again.transformer_blocks) == 1 and Geometry.of(again.config).hidden == 32


def test_operations_are_those_of_the_linears_and_of_attention():
    model, counted = tiny.transformer(), []
    blocks = {m for b in model.transformer_blocks for n, m in b.named_modules() if not n.startswith("norm1.emb")}
    for module in (m for m in model.modules() if isinstance(m, nn.Linear) and m in blocks):
        module.register_forward_hook(lambda m, a, out: counted.append(2 * out.numel() * m.in_features))
    class_conditional.forward(model, torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]))
    geometry = Geometry.of(model.config)
    attention = 2 * 3 * 2 * 2 * geometry.tokens**2 * geometry.hidden  # q·k and a·v, 3 rows, 2 blocks
    assert geometry.flops(rows=3) == sum(counted) + attention


def test_the_bundled_config_is_read(tmp_path):
    config = json.loads((pipeline.DATA / pipeline.BUNDLED / "transformer" / "config.json").read_text())
    assert Geometry.of(config).depth == 6
