"""Elementwise functions, and those along a dimension that have as many results as elements."""

from functools import partial

import torch
from torch.nn import functional as F

from .data import BIG, LONG, ROWS, ROWS2, P, Q, case, named, rand, randn

OF_ANY_NUMBER = """
    abs arctan atan asinh arcsinh ceil cos sin erf erfc floor frac neg round sgn sign sigmoid sinc tanh trunc positive
    exp exp2 expm1 square softplus sinh cosh celu elu gelu hardshrink hardtanh hardsigmoid hardswish leaky_relu
    logsigmoid mish relu relu6 selu silu softshrink softsign tanhshrink nan_to_num deg2rad rad2deg special.i0 i0
    special.i0e
    special.i1 special.i1e special.erfcx special.log_ndtr special.ndtr special.sinc special.expit special.erf
    special.erfc digamma lgamma fix
"""
FROM_0_TO_1 = """
    acos asin atanh arctanh log log2 log10 log1p logit sqrt rsqrt reciprocal erfinv special.ndtri special.entr
    special.logit special.log1p
"""
ALONG = "cumsum logcumsumexp softmax log_softmax softmin cummax cummin glu"
OF_TWO = """
    add sub mul rsub maximum minimum fmax fmin copysign hypot atan2 logaddexp logaddexp2 dist mse_loss l1_loss
    smooth_l1_loss huber_loss
"""
OF_TWO_POSITIVE = """
    div true_divide fmod remainder floor_divide float_power pow xlogy special.xlog1py special.gammainc special.gammaincc
    igamma igammac
"""
for name in OF_ANY_NUMBER.split():
    case(name, named(name), ROWS)
for name in FROM_0_TO_1.split():
    case(name, named(name), P)
for name in ALONG.split():
    case(name, partial(named(name), dim=-1), ROWS)
for name in OF_TWO.split():
    case(name, named(name), ROWS, ROWS2)
for name in OF_TWO_POSITIVE.split():
    case(name, named(name), P, Q)
case("flip", partial(torch.flip, dims=(-1,)), ROWS)
case("cumprod", partial(torch.cumprod, dim=-1), 1 + ROWS * 0.01)
case("acosh", torch.acosh, P + 1)
case("frexp", lambda x: torch.frexp(x).mantissa, P)
case("special.zeta", torch.special.zeta, P + 2, Q)
case("ldexp", lambda x: torch.ldexp(x, torch.tensor(3)), P)
case("softmax long", lambda x: x.softmax(0), LONG)
case("log_softmax long", lambda x: x.log_softmax(0), LONG)
case("cumsum long", lambda x: x.cumsum(0), LONG)
case("threshold", lambda x: F.threshold(x, 0.1, 0.2), ROWS)
case("clamp", lambda x: x.clamp(-1, 1), ROWS)
case("rrelu eval", F.rrelu, ROWS)
case("round decimals", lambda x: torch.round(x, decimals=2), ROWS)
case("fmod BIG", lambda x: x.fmod(1.0), BIG)
case("remainder BIG", lambda x: x.remainder(3.0), BIG)
case("lerp", lambda x, y: torch.lerp(x, y, 0.3), ROWS, ROWS2)
case("lerp t", torch.lerp, ROWS, ROWS2, P)
case("addcmul", torch.addcmul, ROWS, ROWS2, P)
case("addcdiv", torch.addcdiv, ROWS, ROWS2, P)
case("where", lambda x, y: torch.where(x > 0, x, y), ROWS, ROWS2)
case("cross", torch.linalg.cross, randn(4096, 3), randn(4096, 3, seed=1))
case("broadcast add grad", lambda x, y: x + y, LONG[:, None].expand(-1, 2).contiguous(), randn(2))
case("broadcast mul grad", lambda x, y: x * y, ROWS, randn(4096))
case("expand grad", lambda x: x.expand(70_000, 4), rand(1, 4))
case("repeat grad", lambda x: x.repeat(4096, 1), rand(4, 4))
case("tile grad", lambda x: x.tile(4096, 1), rand(4, 4))
case("repeat_interleave grad", lambda x: x.repeat_interleave(4096, 0), rand(4, 4))
case("repeat_interleave t grad", lambda x: x.repeat_interleave(torch.tensor([4096, 3]), 0), rand(2, 4))
