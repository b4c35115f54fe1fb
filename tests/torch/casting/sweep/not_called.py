"""Functions of torch that the sweep does not call, by the reason."""

_BY_REASON = {
    "operators, which are functions that are called": """
        __add__ __and__ __array__ __array_wrap__ __bool__ __complex__ __contains__ __deepcopy__ __div__ __dlpack__
        __dlpack_device__ __eq__ __float__ __floordiv__ __format__ __ge__ __gt__ __iadd__ __iand__ __idiv__
        __ifloordiv__ __ilshift__ __imod__ __imul__ __index__ __int__ __invert__ __ior__ __irshift__ __isub__ __ixor__
        __le__ __len__ __long__ __lshift__ __lt__ __mod__ __mul__ __ne__ __nonzero__ __or__ __radd__ __rand__
        __reduce_ex__ __repr__ __reversed__ __rfloordiv__ __rlshift__ __rmod__ __rmul__ __ror__ __rrshift__ __rshift__
        __rsub__ __rxor__ __setstate__ __sub__ __truediv__ __xor__
    """,
    "forms in place of functions that are not called": """
        _coalesced_ apply_ cauchy_ exponential_ fill_diagonal_ geometric_ log_normal_ map2_ map_ normal_ random_
        requires_grad_ resize_as_sparse_ set_ share_memory_ sparse_resize_ sparse_resize_and_clear_ uniform_ zero_
    """,
    "of quantized tensors, other vendors' libraries, or FP16 kernels of FBGEMM": """
        choose_qparams_optimized dequantize fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation
        fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight
        fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix int_repr miopen_batch_norm miopen_convolution
        miopen_convolution_add_relu miopen_convolution_relu miopen_convolution_transpose miopen_depthwise_convolution
        miopen_rnn q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme
        quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm quantized_gru_cell
        quantized_lstm_cell quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell
        quantized_rnn_tanh_cell
    """,
    "private, or without a number": """
        _autocast_to_full_precision _autocast_to_reduced_precision _clear_non_serializable_cached_data _dimI _dimV
        _indices _is_view _nested_tensor_size _nested_tensor_storage_offsets _nested_tensor_strides _nnz
        _sparse_mask_projection _sym_sqrt _to_dense _values backward const_data_ptr data_ptr dense_dim dim dim_order
        element_size get_device hash_tensor is_coalesced is_conj is_contiguous is_distributed is_floating_point
        is_inference is_neg is_nonzero is_pinned is_same_size is_set_to is_shared is_signed module_load ndimension
        nelement pin_memory record_stream register_hook register_post_accumulate_grad_hook retain_grad size sparse_dim
        sparse_mask storage storage_offset storage_type sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum type
        type_as untyped_storage
    """,
    "copies, views and conversions, whose gradients are copies": """
        adjoint alias_copy argwhere as_strided_copy as_strided_scatter atleast_1d atleast_2d atleast_3d bfloat16 bool
        broadcast_tensors broadcast_to byte ccol_indices ccol_indices_copy cdouble cfloat chalf char chunk col_indices
        col_indices_copy conj conj_physical constant_pad_nd cpu crow_indices crow_indices_copy cuda detach detach_copy
        diag diagflat diagonal diagonal_copy double dsplit empty_like expand_as expand_copy fft_fftshift fft_ifftshift
        flatten fliplr flipud full_like half hsplit imag indices_copy int ipu item linalg_diagonal long lu_unpack
        moveaxis movedim mtia narrow narrow_copy native_channel_shuffle numpy one_hot ones_like permute permute_copy
        ravel real reshape_as resize resize_as resolve_conj resolve_neg row_indices row_indices_copy select
        select_copy short slice_copy slice_inverse split split_copy split_with_sizes split_with_sizes_copy squeeze
        squeeze_copy swapaxes swapdims t_copy to_mkldnn tolist transpose transpose_copy triu unbind unbind_copy
        unflatten unfold_copy unravel_index unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy
        values values_copy view view_as view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit xpu
        zeros_like
    """,
    "predicates, integers and comparisons": """
        all any argsort bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor eq equal
        gcd ge greater greater_equal isfinite isinf isnan isneginf isposinf isreal lcm le less less_equal logical_and
        logical_not logical_or logical_xor lt ne negative nextafter nonzero nonzero_static not_equal signbit unique
        unique_consecutive
    """,
    "random numbers, whose draws depend on the dtype": """
        alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout native_dropout
        poisson
    """,
    "other names of functions that are called": """
        absolute adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
        clamp_max clamp_min clip divide fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices
        grid_sampler grid_sampler_2d grid_sampler_3d max_pool1d_with_indices max_pool2d_with_indices
        max_pool3d_with_indices multiply special_log_softmax special_round special_softmax subtract
    """,
    "parts of distributed batch norm": """
        batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats
        batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats
    """,
    "held bit for bit by the tests of the table": """
        coalesce max_unpool1d max_unpool3d
    """,
    "made of functions that are called, or other names of them": """
        dsmm hsmm lobpcg native_batch_norm native_norm pca_lowrank saddmm spmm svd_lowrank threshold
    """,
    "a count": "numel",
}
NOT_CALLED = {name: reason for reason, names in _BY_REASON.items() for name in names.split()}
