"""Bytes of a stage by hand, and whether a model that no card holds fits into eight of them."""

from vqlib.config import CalibrationConfig, VQConfig, recipe_distillation
from vqlib.models.geometry import Geometry
from vqlib.studies.job_memory import moments_bytes
from vqlib.studies.stage_memory import IDLE, dit_stage_bytes, row_bytes, stage_bytes

GIB = 2**30


def test_a_stage_by_hand():
    vq = VQConfig(k=256, d=4, candidates=3)
    config = CalibrationConfig(batch_size=2, guidance_scale=1.5)  # 4 rows
    weights = (4000 + 8000) * 4  # both blocks in float32
    subvectors = 3000 * (3 * 1 + 3 * (4 + 4))  # uint8 candidates, logits and RMSprop's squares
    codebooks = 2 * 10 * 256 * 4 * (4 + 4)
    kept = 3 * 4 * 100  # the activations between the two blocks, before and behind them
    graph = 34 * 4 * 100 + 3 * 4 * 8000 + 4 * 3 * 2000  # of the wider block
    assert stage_bytes([4000, 8000], 100, 7, vq, config) == 7 + weights + subvectors + codebooks + kept + graph
    alone, wide = vq.replace(candidates=1), VQConfig(k=1024, d=4, candidates=1)
    assert stage_bytes([4000], 0, 0, alone, config, 2, 0) == 8000 + 1000 + 3 * 4 * 4000  # no ratios where n = 1
    assert stage_bytes([4000], 0, 0, wide, config, 2, 0) == 8000 + 2000 + 3 * 4 * 4000  # uint16 above 256 codewords
    adam = stage_bytes([4000], 0, 0, vq, config.replace(optimizer="adam"), 2, 0)
    assert adam - stage_bytes([4000], 0, 0, vq, config, 2, 0) == 1000 * 3 * 4


def test_end_to_end_the_graphs_of_all_blocks_are_held_and_latents_are_trained():
    vq = VQConfig(k=256, d=4, candidates=1)
    last = recipe_distillation("best", batch_size=2, guidance_scale=1.5)
    weights, codes, latents = 12000 * 4, 3000, 3000 * 4 * (4 + 4)
    codebooks, kept = 2 * 10 * 256 * 4 * (4 + 4), 3 * 4 * 100
    graphs = [34 * 4 * 100 + 3 * 4 * own + 4 * own for own in (4000, 8000)]
    held = 7 + weights + codes + latents + codebooks + kept
    assert stage_bytes([4000, 8000], 100, 7, vq, last) == held + sum(graphs)
    twice = last.replace(activation_checkpointing=True)
    assert stage_bytes([4000, 8000], 100, 7, vq, twice) == held + max(graphs)


def test_flux_fits_into_eight_cards_of_24_gb():
    """FLUX.1's blocks from its published shapes: width 3072, 19 of two streams, 38 of one; 1024×1024 and 512 words of text."""
    h, tokens = 3072, 4096 + 512
    two, one = 2 * (4 * h * h + 8 * h * h + 6 * h * h), 3 * h * h + 4 * h * h + 5 * h * h + 3 * h * h
    blocks = [two] * 19 + [one] * 38
    assert 11.8e9 < sum(blocks) < 12e9
    stages = [blocks[0:4], blocks[4:9], blocks[9:13], blocks[13:17], [*blocks[17:19], *blocks[19:26]], blocks[26:36]]
    stages += [blocks[36:47], blocks[47:57]]
    assert sum(map(len, stages)) == 57
    vq, config = VQConfig(candidates=3), CalibrationConfig(batch_size=1, guidance_scale=1.0)
    most = max(stage_bytes(own, 4 * tokens * h, 200 << 20, vq, config, weight_bytes=2) for own in stages)
    assert 16 * GIB < most < 22 * GIB
    assert stage_bytes(blocks, 4 * tokens * h, 200 << 20, vq, config, weight_bytes=2) > 80 * GIB


def test_stages_hold_less_than_the_whole_and_a_row_at_least_the_model():
    geometry, vq, config = Geometry(), VQConfig(), CalibrationConfig()
    whole, half = (dit_stage_bytes(geometry, (0, last), vq, config) for last in (28, 14))
    own = 14 * geometry.block_weights
    assert whole - half >= own * 4 + own // 4 * 27 and half < 0.6 * whole
    weights = 4 * geometry.parameters_in_memory
    assert (
        row_bytes(geometry, vq, config, None, False, 32)
        > row_bytes(geometry, vq, None, None, False, 32)
        > IDLE + weights
    )
    assert row_bytes(geometry, vq, config, None, True, 32, on_host=False) == IDLE + weights
    assert row_bytes(geometry, vq, None, None, True, 0) == IDLE + 2 * weights + moments_bytes(geometry)
    assert row_bytes(geometry, vq, None, None, False, 400) > row_bytes(geometry, vq, None, None, False, 100) + (1 << 30)
    last = recipe_distillation("best")
    alone = dit_stage_bytes(geometry, (0, 28), vq.replace(candidates=1), last)
    assert (
        row_bytes(geometry, vq, config, last, False, 32)
        == IDLE + alone
        > row_bytes(geometry, vq, config, None, False, 32)
    )
