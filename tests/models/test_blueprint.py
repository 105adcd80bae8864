"""Geometry of published transformers on the meta device, against counts made by hand."""

import pytest
import torch

from vqlib.config import VQConfig
from vqlib.models.blueprint import FLUX_DEV, PIXART_SIGMA_XL, SD35_MEDIUM, Blueprint
from vqlib.models.geometry import MIB

# In squares of the hidden size. PixArt's block: twice four of attention, and eight of the MLP.
PIXART = 28 * (4 + 4 + 8)
# SD3.5-medium: modulation 6 (9 with a second attention of the image alone), of the text 6, q, k, v and out of both streams 8,
# two MLPs of 8. In 13 blocks a second attention of 4. The last one gives no text: modulation 2, no out, no MLP of it.
SD3 = 13 * (9 + 6 + 8 + 4 + 16) + 10 * (6 + 6 + 8 + 16) + (6 + 2 + 7 + 8)
# FLUX.1-dev: 19 blocks like SD3's without a second attention; 38 of modulation 3, q, k, v, MLP in 4, and out of both 5.
FLUX = 19 * (6 + 6 + 8 + 16) + 38 * (3 + 3 + 4 + 5)


@pytest.mark.parametrize(
    ("blueprint", "hidden", "squares", "layers", "blocks"),
    [
        (PIXART_SIGMA_XL, 1152, PIXART, 28 * 10, 28),
        (SD35_MEDIUM, 1536, SD3, 13 * 18 + 10 * 14 + 11, 24),
        (FLUX_DEV, 3072, FLUX, 19 * 14 + 38 * 6, 57),
    ],
)
def test_every_linear_of_every_block_is_found(blueprint, hidden, squares, layers, blocks):
    assert blueprint.weights == squares * hidden**2
    assert len(blueprint.layers) == layers and blueprint.depth == blocks
    outside = {n for n, m in blueprint.model.named_modules() if isinstance(m, torch.nn.Linear)} - set(blueprint.layers)
    assert outside and not any("transformer_blocks" in name for name in outside)
    assert all(p.is_meta for p in blueprint.model.parameters())


def test_whole_models_have_their_published_size():
    assert FLUX_DEV.parameters / 1e9 == pytest.approx(11.9, abs=0.05)
    assert SD35_MEDIUM.parameters / 1e9 == pytest.approx(2.24, abs=0.05)
    assert PIXART_SIGMA_XL.parameters / 1e9 == pytest.approx(0.61, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_flux_takes_these_bytes(bits):
    """11.8 billion weights: bits/8 bytes each, and 494 codebooks in float32; biases once for every output."""
    weights = 1254 * 3072**2
    sizes = FLUX_DEV.sizes(VQConfig(bits=bits))
    k, d = {2: (256, 4), 3: (64, 2), 4: (256, 2)}[bits]
    assert sizes.codes * MIB == weights * bits / 8
    assert sizes.codebooks * MIB == 494 * k * d * 4
    double, single = 6 + 6 + 4 + 4 + (4 + 1) + (4 + 1), 3 + 3 + 4 + 1
    assert sizes.biases * MIB == 4 * 3072 * (19 * double + 38 * single)
    assert sizes.full * MIB == 4 * weights + sizes.biases * MIB


def test_sizes_by_kind_of_layer_add_up():
    vq = VQConfig(bits=2)
    kinds = FLUX_DEV.sizes_by_kind(vq)
    assert sum(sizes.total for sizes in kinds.values()) == pytest.approx(FLUX_DEV.sizes(vq).total)
    wider = FLUX_DEV.sizes_by_kind(vq.replace(layers=(("*.attn.to_q", 16, 4),)))
    assert wider["attn.to_q"].codes == kinds["attn.to_q"].codes / 2 and wider["attn.to_k"] == kinds["attn.to_k"]
    assert kinds["ff.net.2"].codes * MIB == 19 * 4 * 3072**2 / 4
    assert kinds["attn.to_q"].codes * MIB == (19 + 38) * 3072**2 / 4


def test_a_blueprint_is_what_its_class_builds():
    small = Blueprint(
        "PixArtTransformer2DModel", {"num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 128}, 128, 5
    )
    assert small.depth == 2 and small.weights == 2 * 16 * 128**2
