"""Bytes at the peak, from shapes alone: of a stage of a pipelined calibration (does a model fit into these cards?), of a row."""

from __future__ import annotations

from collections.abc import Sequence

from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models.geometry import Geometry
from vqlib.studies.job_memory import IN_FORWARD, IN_GRAPH, moments_bytes

IDLE = 640 << 20  # of a process that has imported vqlib and compiled its kernels


def stage_bytes(
    blocks: Sequence[int],
    row: int,
    rest: int,
    vq: VQConfig,
    config: CalibrationConfig,
    weight_bytes: int = 4,
    linears: int = 10,
) -> int:
    """blocks: weights in the linears of each own block; row: bytes of one image's activations between blocks, float32.

    rest: bytes of all that is no block's linear; linears: codebooks a block; weight_bytes: of a full-precision weight. What
    counts: both models' weights as they are held, ratios with their optimizer's state, the activations kept between a batch's
    pass and the student's step, and of the widest block or, end to end, of all, the graph, reconstructed weights and
    their gradients. Rules for single layers (`vq.layers`) are not followed: k and d are those of all.
    """
    rows = config.batch_size * (2 if config.guided else 1)
    choices = vq.candidates if vq.candidates > 1 else 0
    moments = 8 if config.optimizer == "adam" else 4
    index = 1 if vq.k <= 256 else 2
    trained = choices + (vq.d if config.lr_latents else 0)  # logits, latents
    subvector = index * vq.candidates + (4 + moments) * trained  # bytes of indices, of what is trained and its state
    held = sum(blocks) * weight_bytes + sum(blocks) // vq.d * subvector
    held += len(blocks) * linears * vq.k * vq.d * (4 + moments)
    kept = (len(blocks) + 1) * rows * row  # every block's input and the last one's output
    graphs = [IN_GRAPH * rows * row + 3 * 4 * weights + 4 * trained * (weights // vq.d) for weights in blocks]
    at_once = sum if config.block_inputs == "end-to-end" and not config.activation_checkpointing else max
    return rest + held + kept + at_once(graphs)


def dit_stage_bytes(geometry: Geometry, blocks: tuple[int, int], vq: VQConfig, config: CalibrationConfig) -> int:
    """`stage_bytes` of blocks first … last − 1 of a DiT."""
    count, row = blocks[1] - blocks[0], 4 * geometry.tokens * geometry.hidden
    rest = 4 * (geometry.parameters_in_memory - geometry.depth * geometry.block_weights)
    own, linears = [geometry.block_weights] * count, len(geometry.linears())
    return stage_bytes(own, row, rest, vq, config, linears=linears)


def row_bytes(
    geometry: Geometry,
    vq: VQConfig,
    calibration: CalibrationConfig | None,
    distillation: CalibrationConfig | None,
    moments: bool,
    batch_size: int,
    on_host: bool = True,
) -> int:
    """Of the host's memory while a row is made: on a GPU's machine the weights on their way, else all of it.

    calibration, distillation: None for a stage that the row does without; moments: whether its codes are found by second
    moments, which are let go before it is trained; batch_size: of the images sampled.
    """
    weights = 4 * geometry.parameters_in_memory
    if not on_host:
        return IDLE + weights
    stages = [(vq, calibration), (vq.replace(candidates=1), distillation)]  # the last one starts from hard codes
    made = [dit_stage_bytes(geometry, (0, geometry.depth), own, config) for own, config in stages if config]
    sampling = weights + 2 * IN_FORWARD * batch_size * 4 * geometry.tokens * geometry.hidden
    return IDLE + max(*made, 2 * weights + (moments_bytes(geometry) if moments else 0), sampling)
