"""JAX's primitives by family: what `duotone.operations` gives a kind to, and what of the rest is how.

    FAMILIES     have a kind, as torch's operations of the same families have
    MOVES        copies of elements: what they are given, they give
    POINTWISE    element by element, in the dtype of what they are given
    CURVED       of those the ones whose derivatives are computed from what they were given: FP32 inside
    STEEP        of those the ones whose results change with the last bits of large operands
    COMPARISONS  element by element, but what they give is no float
    TRACED       run on the dtypes that they were traced in: programs of the user's, bit patterns, kernels
    SUMMED       of those the ones that sum or solve, whose FP32 results stay FP32
    PROGRAMS     hold programs that autocast goes through
    INTEGER      see no float of 32 or 16 bits

What is in no list, such as a primitive of another library, runs on the dtypes that it was traced in. Names are those of
JAX 0.10 to 0.12, as `primitive.name` says them.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

from duotone.operations import Kind, kinds_of

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "product": "dot_general ragged_dot_general",
        "convolution": "conv_general_dilated",
        "lookup": "gather",
        "sum_by_index": """
            scatter-add scatter-sub scatter-mul scatter-min scatter-max psum psum_invariant unreduced_psum
            reduce_scatter unreduced_reduce_scatter
        """,
        "remainder": "rem",
        "average_pool": "reduce_window_sum",
        "maximum_pool": "reduce_window_max reduce_window_min select_and_scatter_add select_and_gather_add",
        "overlap": "broadcast_in_dim broadcast_to tile",
        "quantization": "reduce_precision",
        "exponential": "exp exp2 expm1 log log1p log2 pow integer_pow square rsqrt reciprocal",
        "steep": "acos acosh asin atanh cosh sinh tan erf_inv lgamma digamma polygamma atan2",
        "sum": "add_any reduce_sum reduce_prod cumsum cumprod cumlogsumexp polynomial",
        "sampling": "random_gamma rng_uniform random_gamma_grad",
        "fourier": "fft",
        "complex": "complex",
        "factorization": """
            cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu ormqr qr schur spsolve svd
            symmetric_product triangular_solve tridiagonal tridiagonal_solve
        """,
        "special": "igamma igamma_grad_a igammac regularized_incomplete_beta zeta bessel_i0e bessel_i1e",
        "join": "concatenate stack pad",
        "mixed_operands": "select_n",
        "copy_by_index": "scatter dynamic_update_slice",
        "number": "add sub mul div",
        "bound": "max min clamp",
        "cast": "convert_element_type",
        "scaled_product": "scaled_dot scaled_matmul scaled_matmul_wrapper",
    }
)
# what has no kind
_LISTS: Mapping[str, str] = MappingProxyType(
    {
        "moves": """
            reshape squeeze expand_dims transpose rev slice dynamic_slice split unstack copy copy_p stop_gradient
            name sort top_k reduce_max reduce_min cummax cummin optimization_barrier sharding_constraint reshard
            layout_constraint relayout device_put with_memory_space_constraint stage pin unpin tie all_gather
            all_gather_invariant all_gather_reduced all_to_all pbroadcast pbroadcast_dynamic ppermute pvary preduced
            reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p pmax pmin unreduced_pmax
            unreduced_pmin approx_top_k xla_metadata_value real imag conj
            """,
        "pointwise": """
            abs neg sign floor ceil round asinh atan cbrt cos erf erfc logistic sin sqrt tanh one_minus_square
            nextafter
            """,
        "bounded": """
            cos erf erfc logistic sin tanh
            """,
        "curved": """
            asinh atan cbrt cos erf erfc logistic sin sqrt tanh
            """,
        "steep": """
            cos erfc sin
            """,
        "summed": """
            reduce reduce_window select_and_scatter custom_linear_solve
            """,
        "comparisons": """
            eq ne ge gt le lt eq_to le_to lt_to is_finite argmax argmin
            """,
        "programs": """
            jit closed_call core_call call eval_jaxpr remat2 remat checkpoint custom_jvp_call custom_vjp_call scan
            while cond shard_map
            """,
        "traced": """
            reduce reduce_window select_and_scatter bitcast_convert_type pallas_call core_map mpmd_map run_scoped
            run_state pure_callback io_callback debug_callback debug_print inspect_sharding ffi_call call_exported
            custom_linear_solve custom_partitioning custom_vmap_call custom_transpose_call linear_call custom_lin
            custom_jvp_call_jaxpr composite create_linear xla_metadata_call call_hi_primitive
            call_hi_primitive_linearized jaxpr_call remat_opt delay get swap addupdate accum_grad_in_ref masked_load
            masked_swap new_ref empty_ref free_ref freeze empty empty2 new_box box_get box_set new_log log_extend
            log_read dce_sink get_global check ragged_all_to_all cudnn_fusion dot_product_attention_fwd
            dot_product_attention_fwd_wrapper dot_product_attention_bwd dot_product_attention_bwd_wrapper
            dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd
            dot_product_attention_fp8_bwd_wrapper zeros_like to_edtype from_edtype mulhi bcoo_dot_general
            bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general
            bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense
            bcsr_todense coo_fromdense coo_matmat coo_matvec coo_spmm coo_spmv coo_todense csr_fromdense csr_matmat
            csr_matvec csr_spmm csr_spmv csr_todense todense all_gather_start all_gather_done
            all_gather_reduced_start all_to_all_start all_to_all_done pbroadcast_start pbroadcast_done
            ppermute_start ppermute_done psum_start psum_done psum_invariant_start reduce_scatter_start
            reduce_scatter_done unreduced_psum_start unreduced_reduce_scatter_start precv psend
    global_array_to_host_local_array host_local_array_to_global_array
            """,
        "integer": """
            after_all and axis_index clz create_token dim_as_value dimension_size iota iota_2x32_shape
            lu_pivots_to_permutation multiple_of not num_programs or philox2x32 philox4x32 platform_index
            population_count program_id random_bits random_clone random_fold_in random_seed random_split
            random_unwrap random_wrap reduce_and reduce_or reduce_xor rng_bit_generator semaphore_read
            semaphore_signal semaphore_wait shape_assertion shift_left shift_right_arithmetic shift_right_logical
            threefry2x32 threefry4x32 unreachable xor
            """,
    }
)
MOVES = frozenset(_LISTS["moves"].split())
POINTWISE = frozenset(_LISTS["pointwise"].split())
# near their limits 16 bits have few values: 1 + erf(x), 1 - tanh(x)
BOUNDED = frozenset(_LISTS["bounded"].split())
# in 16 bits a square overflows: 1 / (1 + x^2), the derivative of atan, is 0 from 256 on in FP16
CURVED = frozenset(_LISTS["curved"].split())
# sin(30 * x), and the far end of erfc
STEEP = frozenset(_LISTS["steep"].split())
# of TRACED: their FP32 results are sums and solutions, which stay FP32
SUMMED = frozenset(_LISTS["summed"].split())
COMPARISONS = frozenset(_LISTS["comparisons"].split())
PROGRAMS = frozenset(_LISTS["programs"].split())
TRACED = frozenset(_LISTS["traced"].split())
INTEGER = frozenset(_LISTS["integer"].split())


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """Return the kind of each primitive that has one, by name.

    >>> kinds()["dot_general"], kinds()["exp"], kinds()["reduce_window_sum"]
    ('compute', 'float32', 'float32_inside')
    """
    return MappingProxyType(kinds_of(FAMILIES))


@functools.cache
def families() -> Mapping[str, str]:
    """Return the family of each primitive that has one, by name.

    >>> families()["exp"]
    'exponential'
    """
    return MappingProxyType({name: family for family, names in FAMILIES.items() for name in names.split()})


@functools.cache
def known() -> frozenset[str]:
    """Return the names of all primitives in this file.

    >>> {"exp", "scan", "xor"} <= known()
    True
    """
    return frozenset(kinds()) | MOVES | POINTWISE | COMPARISONS | PROGRAMS | TRACED | INTEGER
