"""Zero-data, block-wise calibration of codebooks and assignments."""
