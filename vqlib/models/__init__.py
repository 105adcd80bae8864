"""What is quantized: pipelines, the DiT and its blocks, the process it is sampled by."""
