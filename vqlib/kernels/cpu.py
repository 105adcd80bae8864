"""The CPU's back end: numba's loops over the memory of float32 tensors; results do not depend on the number of threads."""

from vqlib.kernels import cpu_gather, cpu_ratios, cpu_search, cpu_soft

MAX_LENGTH, MAX_CANDIDATES = min(cpu_search.MAX_LENGTH, cpu_soft.MAX_LENGTH), cpu_soft.MAX_CANDIDATES
assign, nearest, cluster_sums = cpu_search.assign, cpu_search.nearest, cpu_search.cluster_sums
soft_reconstruct, gather = cpu_soft.soft_reconstruct, cpu_gather.gather
ratio_loss, add_ratio_gradient = cpu_ratios.ratio_loss, cpu_ratios.add_ratio_gradient
rmsprop_step, ratio_limit, settle_ratios = cpu_ratios.rmsprop_step, cpu_ratios.ratio_limit, cpu_ratios.settle_ratios
