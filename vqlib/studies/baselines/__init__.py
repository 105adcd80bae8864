"""Other ways to few bits, on the same layers and seeds as VQ4DiT, one file each; every one ends as a `Baseline`."""
