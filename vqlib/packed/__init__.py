"""The hard layer and its bits: packing, the checkpoint's format, diffusers' back end, inference modes."""
