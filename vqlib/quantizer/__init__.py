"""Weights -> codes: sub-vectors, codebook, candidates, error feedback, the soft layer."""
