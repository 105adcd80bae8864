"""Bytes at the peak of each stage of a job, by the model's shape and what a few of its blocks were seen to hold."""

from __future__ import annotations

from collections.abc import Sequence

from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models.blueprint import Blueprint
from vqlib.models.geometry import MIB, Geometry
from vqlib.quantizer.soft import CandidateLinear

Shape = Geometry | Blueprint
# Tensors [rows, tokens, hidden] at once, one of the MLP counted as four: in a block's graph, in a forward pass.
IN_GRAPH, IN_FORWARD = 34, 12


def unquantized_bytes(shape: Shape) -> int:
    """All parameters but the weights and biases of the quantizable layers, float32."""
    return 4 * (shape.parameters_in_memory - shape.weights - shape.biases)


def codebook_bytes(shape: Shape, vq: VQConfig, layers: float, soft: Sequence[CandidateLinear]) -> float:
    """Of all soft layers (`layers`), the search in the largest of `soft`, and second moments where they are needed."""
    largest = max(len(layer.candidates) for layer in soft)
    moments = 0 if vq.assignment == "nearest" else moments_bytes(shape)
    return layers + largest * 8 * (vq.candidates + 4) + moments


def moments_bytes(shape: Shape) -> int:
    """All second moments in float32, and error feedback's work on the widest layer in float64.

    As if no two layers had the same inputs; q, k and v have.
    """
    moments = sum(into**2 for _, into in shape.shapes)
    return 4 * moments + 8 * max(4 * into**2 + 4 * out * into for out, into in shape.shapes)


def graph_bytes(shape: Shape, config: CalibrationConfig, rows: int, layers: float) -> float:
    """What a backward pass needs: of all blocks end to end or, checkpointed, of one and every block's input."""
    row, depth = 4 * shape.tokens * shape.hidden, shape.depth
    whole = config.block_inputs == "end-to-end" and not config.activation_checkpointing
    inputs = depth * rows * row if config.activation_checkpointing else 0
    graphs = depth if whole else 1
    return graphs * (IN_GRAPH * rows * row + (layers + 3 * 4 * shape.weights) / depth) + inputs


def sampling_bytes(shape: Shape, vq: VQConfig, batch: int) -> int:
    """The packed model, and a forward pass of both halves."""
    return packed_bytes(shape, vq) + 2 * IN_FORWARD * batch * 4 * shape.tokens * shape.hidden


def packed_bytes(shape: Shape, vq: VQConfig) -> int:
    """The packed file: codes, codebooks, all else once in float16."""
    sizes = shape.sizes(vq)
    quantized = (
        round((sizes.full - sizes.biases) * MIB) // 4
    )  # of all linears, those that are not left in full precision
    return int((sizes.codes + sizes.codebooks) * MIB) + 2 * (shape.parameters - quantized)
