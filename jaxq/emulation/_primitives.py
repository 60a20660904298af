"""Tables of jax's primitives by name: which ones round, and which ones are sums.

Two more tables are elsewhere: `_calls.CALLS` has the primitives that call functions,
and `_accumulate.SUMS` the sums with a narrow accumulator. A primitive that is in no
table is arithmetic on single numbers, so its operands and results are rounded.
"""

# The results are some of the operands. If all operands are numbers of one grid, so are
# the results.
MOVES = frozenset([
    "broadcast_in_dim", "clamp", "concatenate", "copy", "dynamic_slice",
    "dynamic_update_slice", "max", "min", "optimization_barrier", "reduce_max",
    "reduce_min", "reshape", "rev", "select_n", "slice", "squeeze", "stop_gradient",
    "transpose",
])  # fmt: skip

# These primitives move, compare or select numbers, or change a sign. They never round.
EXACT = MOVES | frozenset([
    "abs", "all_gather", "all_gather_invariant", "all_to_all", "always_true", "argmax",
    "argmin", "bitcast_convert_type", "cummax", "cummin", "debug_callback",
    "debug_print", "device_put", "eq", "eq_to", "gather", "ge", "gt", "is_finite", "le",
    "le_to", "lt", "lt_to", "mesh_cast", "ne", "neg", "pad", "pbroadcast", "pcast",
    "pmax", "pmin", "ppermute", "pvary", "quantized_product", "reduce_precision",
    "reduce_window_max", "reduce_window_min", "reshard", "scatter", "scatter-max",
    "scatter-min", "select_and_gather_add", "sharding_constraint", "sign", "sort",
    "split", "tile", "top_k",
])  # fmt: skip

# Sums, and algorithms that are made of sums. They have no form with a narrow
# accumulator.
WIDE_SUMS = frozenset([
    "addupdate", "cholesky", "cholesky_update", "cumlogsumexp", "cumprod", "eig",
    "eigh", "fft", "geqp3", "geqrf", "hessenberg", "householder_product", "lu",
    "ormqr", "psum", "psum_invariant", "psum_invariant_start", "psum_start", "qr",
    "ragged_dot", "ragged_dot_general", "reduce", "reduce_prod", "reduce_scatter",
    "reduce_scatter_start", "reduce_window", "scaled_dot", "scaled_matmul",
    "scaled_matmul_wrapper", "scatter-add", "scatter-mul", "scatter-sub", "schur",
    "select_and_scatter_add", "svd", "symmetric_product", "triangular_solve",
    "tridiagonal", "tridiagonal_solve", "unreduced_psum", "unreduced_psum_start",
    "unreduced_reduce_scatter", "unreduced_reduce_scatter_start",
])  # fmt: skip

# Their parameters hold a small function of jax, such as the comparison of a sort. They
# do not call functions of the user.
NOT_CALLS = frozenset([
    "argmax", "argmin", "reduce", "reduce_window", "scatter", "scatter-add",
    "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "sort",
])  # fmt: skip
