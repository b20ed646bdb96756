"""Mathematics on tensors: which singular triplets of a weight, how exactly, and what is left of the weight.

Nothing here knows a file, an option or a model. This module imports nothing, so that `linalg.cost`
can be read without torch. The front doors are `linalg.split.split` and `linalg.svd.singular_triplets`.

    cost             operations and memory of a solve, from sizes alone
    arithmetic       which algorithm a device gets for QR, for an inverse, and in which block sizes
    blocked_matrix   the weight, read in float64 one block of rows at a time
    cholesky         factor and inverse of the Gram matrix
    lanczos          the largest eigenpairs of a symmetric operator
    filtered_subspace  the same by few and large products, in float32
    mixed_precision  the smallest or largest triplets by float32 work, corrected in float64
    corrected_lanczos  the same by fewer columns and more calls, for a CPU
    certificate      how far a computed solution is from the weight's own
    svd              the solver
    rounding         one rounding to a short dtype
    split            weight = residual + scale * B @ A
"""
