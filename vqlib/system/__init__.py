"""Files replaced as a whole, fingerprints, memory, start-up mends: nothing here knows of models."""
