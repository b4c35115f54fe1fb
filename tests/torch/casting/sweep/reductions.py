"""Reductions, norms over dimensions, order and counts."""

import math
from functools import partial

import torch
from torch.nn import functional as F

from .data import BIG, FEW, IMG, LONG, MAT, MAT2, OFF, ONES, ROWS, ROWS2, P, case, named

ALONG = """
    sum mean nansum nanmean std var logsumexp norm amax amin prod median nanmedian max min std_mean var_mean argmax
    argmin count_nonzero aminmax mode
"""
for label, x in (("long", LONG), ("off", OFF), ("rows", ROWS)):
    for name in ALONG.split():
        # products of thousands of numbers that are not near 1 leave every range, and FP16 holds few counts apart
        data = (1 + 0.001 * (x - x.mean()))[..., :2000] if name == "prod" else x[..., :100] if name == "mode" else x
        extra = {"norm": {"p": 2}}.get(name, {})
        case(f"{name} {label}", partial(named(name), **extra, dim=-1), data)

for p in (0.5, 1, 1.5, 3, 4, math.inf, -math.inf, 0):
    case(f"vector_norm {p}", partial(torch.linalg.vector_norm, ord=p, dim=-1), ROWS)
    case(f"vector_norm of all {p}", partial(torch.linalg.vector_norm, ord=p), LONG)
    case(f"norm {p}", partial(torch.norm, p=p, dim=-1), ROWS)
    if p > 0:
        case(f"normalize {p}", partial(F.normalize, p=p, dim=-1), ROWS)
        case(f"cdist {p}", partial(torch.cdist, p=p), ROWS, ROWS2)
    if 0 < p < math.inf:
        case(f"pdist {p}", partial(F.pdist, p=p), ROWS)
        case(f"renorm {p}", partial(torch.renorm, p=p, dim=0, maxnorm=1.0), ROWS)
        case(f"pairwise_distance {p}", partial(F.pairwise_distance, p=p), ROWS, ROWS2)
        case(f"dist {p}", partial(torch.dist, p=p), ROWS, ROWS2)
        case(f"lp_pool2d {p}", partial(F.lp_pool2d, norm_type=p, kernel_size=3), P.view(1, 1, 512, 512))
        case(f"lp_pool1d {p}", partial(F.lp_pool1d, norm_type=p, kernel_size=300, stride=1), P[None, :4])
for order in ("fro", "nuc", 1, 2, math.inf):
    case(f"matrix_norm {order}", partial(torch.linalg.matrix_norm, ord=order), MAT[:64, :64])
case("cosine_similarity", F.cosine_similarity, ROWS, ROWS2)
case("var of a population", partial(torch.var, dim=-1, correction=0), OFF)
case("std of all", torch.std, BIG)
case("var of images", partial(torch.var, dim=(2, 3)), IMG + 30)
case("linalg.vecdot", torch.linalg.vecdot, ROWS, ROWS2)
case("dot", torch.dot, LONG, LONG.flip(0).contiguous())
case("inner", torch.inner, ROWS, ROWS2)
case("outer", torch.outer, ROWS[0], ROWS[1, :512])
case("ger", torch.ger, ROWS[0], ROWS[1, :512])
case("kron", torch.kron, MAT[:64, :64], MAT2[:32, :32])
case("trace", torch.trace, MAT)
case("diff", torch.diff, ROWS)
case("gradient", partial(torch.gradient, dim=-1), ROWS)
case("trapezoid", torch.trapezoid, LONG)
case("trapezoid between points", torch.trapezoid, P, torch.linspace(0, 1, 4096))
case("cumulative_trapezoid", torch.cumulative_trapezoid, LONG)
case("quantile", partial(torch.quantile, q=0.3, dim=-1), ROWS)
case("histc", partial(torch.histc, bins=10), LONG)
case("histogram", lambda x: torch.histogram(x, 10).hist, LONG)
case("bincount", partial(torch.bincount, FEW), LONG)
case("cov", torch.cov, ROWS)
case("corrcoef", torch.corrcoef, OFF)
case("kthvalue", partial(torch.kthvalue, k=100), ROWS)
case("sort", lambda x: x.sort(-1).values, ROWS)
case("topk", lambda x: x.topk(300, -1).values, ROWS)
case("msort", torch.msort, ROWS)
case("searchsorted", partial(torch.searchsorted, torch.arange(0, 4096.0)), BIG * 40)
case("bucketize", partial(torch.bucketize, boundaries=torch.arange(0, 4096.0)), BIG * 40)
case("isin", lambda x: torch.isin(x, x[:, :10]), P)
case("sum_to_size", lambda x: x.sum_to_size(1), LONG)
case("mean of an image", partial(torch.mean, dim=(2, 3)), ONES)
