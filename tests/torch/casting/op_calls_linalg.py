"""Calls of matrix functions and transforms, and what all calls are made of."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Positional and named arguments; the FP32 tensors among them are operands."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def takes(*args: Any, **kwargs: Any) -> Arguments:
    """Return the arguments of a call, as they are written."""
    return Arguments(args, kwargs)


def signed(*shape: int, seed: int = 0) -> Tensor:
    """Return values in -2.4 to 2.4 that 16 bits do not hold, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 4.8 - 2.4


A, B = signed(4, 4, seed=20), signed(4, 2, seed=21)
# positive definite, far enough from singular to stay so in 16 bits
S = A @ A.T / 8 + torch.eye(4)
L = torch.linalg.cholesky(S)
TALL = signed(6, 3, seed=22)
FACTORS, TAU = torch.geqrf(TALL)
LU, PIVOTS = torch.linalg.lu_factor(S)
LDL, LDL_PIVOTS = torch.linalg.ldl_factor(S)
SIGNAL, SIGNALS = signed(8, seed=23), signed(4, 4, seed=24)

_SQUARE = """
    linalg.cond linalg.det linalg.eig linalg.eigvals linalg.inv linalg.inv_ex linalg.lu linalg.lu_factor
    linalg.lu_factor_ex linalg.matrix_exp linalg.matrix_norm linalg.matrix_rank linalg.slogdet linalg.svdvals det
    slogdet inverse matrix_exp linalg.cholesky linalg.cholesky_ex linalg.eigh linalg.eigvalsh linalg.ldl_factor cholesky
    logdet linalg.ldl_factor_ex
"""
_TALL = "linalg.norm linalg.vector_norm linalg.pinv linalg.qr linalg.svd pinverse svd qr geqrf"
_TRANSFORMS = "fft ifft rfft irfft hfft ihfft"

OF_MATRICES: dict[str, list[Arguments]] = {
    **{name: [takes(S)] for name in _SQUARE.split()},
    **{name: [takes(TALL)] for name in _TALL.split()},
    **{f"fft.{name}": [takes(SIGNAL), takes(SIGNALS, 3, dim=0)] for name in _TRANSFORMS.split()},
    **{f"fft.{name}{rank}": [takes(SIGNALS)] for name in _TRANSFORMS.split() for rank in ("2", "n")},
    "linalg.matmul": [takes(A, B)],
    "linalg.multi_dot": [takes([A, B, B.T])],
    "linalg.matrix_power": [takes(S, 3)],
    "matrix_power": [takes(S, 3)],
    "linalg.householder_product": [takes(FACTORS, TAU)],
    "orgqr": [takes(FACTORS, TAU)],
    "ormqr": [takes(FACTORS, TAU, signed(6, 2))],
    "linalg.ldl_solve": [takes(LDL, LDL_PIVOTS, B)],
    "linalg.lstsq": [takes(A, B)],
    "linalg.lu_solve": [takes(LU, PIVOTS, B)],
    "lu_solve": [takes(B, LU, PIVOTS)],
    "lu": [takes(S), takes(S, get_infos=True)],
    "linalg.solve": [takes(S, B)],
    "linalg.solve_ex": [takes(S, B)],
    "linalg.solve_triangular": [takes(L, B, upper=False)],
    "triangular_solve": [takes(B, L, False)],
    "cholesky_inverse": [takes(L)],
    "cholesky_solve": [takes(B, L)],
    "linalg.tensorinv": [takes(S.view(4, 2, 2), 1)],
    "linalg.tensorsolve": [takes(S.view(2, 2, 4), A[:2, :2])],
    "linalg.vander": [takes(SIGNAL[:4])],
}
