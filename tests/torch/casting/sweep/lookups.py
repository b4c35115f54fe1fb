"""Lookups and sums by index."""

import torch
from torch.nn import functional as F

from .data import FEW, IDX, LONG, ROWS, P, Q, case, rand, randn


# lookups and writes by index
def written(x, values):
    x = x.clone()
    x[:, :] = values
    return x


case("embedding", lambda w: F.embedding(FEW, w), randn(3, 4))
case("embedding_bag mean", lambda w: F.embedding_bag(IDX, w), randn(4096, 8))
case("embedding_bag long", lambda w: F.embedding_bag(FEW[None], w, mode="sum"), rand(3, 4))
case("torch.embedding", lambda w: torch.embedding(w, FEW), randn(3, 4))
case("torch.embedding_bag", lambda w: torch.embedding_bag(w, FEW, torch.tensor([0]), False, 0)[0], rand(3, 4))
case("embedding max_norm", lambda w: F.embedding(FEW[:100], w.clone(), max_norm=1.0), randn(3, 4))
case("embedding scaled", lambda w: F.embedding(FEW, w, scale_grad_by_freq=True), randn(3, 4))
case("index_select", lambda x: x.index_select(0, FEW), rand(3, 4))
case("gather", lambda x: x.gather(0, FEW[:, None].expand(-1, 4)), rand(3, 4))
case("take", lambda x: x.take(FEW), rand(3))
case("take_along_dim", lambda x: x.take_along_dim(FEW[:, None], 0), rand(3, 4))
case("getitem", lambda x: x[FEW], rand(3, 4))
case("getitem 2", lambda x: x[FEW, FEW % 2], rand(3, 4))
case("index", lambda x: torch.ops.aten.index(x, [FEW]), rand(3, 4))
case("masked_select", lambda x: x.masked_select(ROWS > 0), P)
case("index_add", lambda x, s: x.index_add(0, FEW, s), rand(3, 1), rand(70_000, 1))
case("index_add_", lambda x, s: x.clone().index_add_(0, FEW, s), rand(3, 1), rand(70_000, 1))
case("scatter_add", lambda x, s: x.scatter_add(0, FEW, s), rand(3), rand(70_000))
case("scatter_add_", lambda x, s: x.clone().scatter_add_(0, FEW, s), rand(3), rand(70_000))
case("scatter_reduce mean", lambda x, s: x.scatter_reduce(0, FEW, s, "mean"), rand(3), rand(70_000))
case("scatter_reduce_ sum", lambda x, s: x.clone().scatter_reduce_(0, FEW, s, "sum"), rand(3), rand(70_000))
case("index_reduce mean", lambda x, s: x.index_reduce(0, FEW, s, "mean"), rand(3), rand(70_000))
case("index_put accumulate", lambda x, s: x.index_put((FEW,), s, accumulate=True), rand(3), rand(70_000))
case("index_put_ accumulate", lambda x, s: x.clone().index_put_((FEW,), s, accumulate=True), rand(3), rand(70_000))
case("put accumulate", lambda x, s: x.put(FEW, s, accumulate=True), rand(3), rand(70_000))
case("put_ accumulate", lambda x, s: x.clone().put_(FEW, s, accumulate=True), rand(3), rand(70_000))
case("scatter reduce=add", lambda x, s: x.scatter(0, FEW, s, reduce="add"), rand(3), rand(70_000))
case("scatter_ reduce=add", lambda x, s: x.clone().scatter_(0, FEW, s, reduce="add"), rand(3), rand(70_000))
case("index_fill", lambda x: x.index_fill(0, FEW, 0.5), rand(5))
case("index_copy", lambda x, s: x.index_copy(0, torch.tensor([1, 3]), s), rand(5), rand(2))
case("masked_scatter", lambda x, s: x.masked_scatter(ROWS > 0, s), P, Q)
case("masked_fill", lambda x: x.masked_fill(ROWS > 0, 0.5), P)
case("masked_fill value grad", lambda x, v: x.masked_fill(ROWS > 0, v.reshape(())), P, rand(1))
case("setitem scalar grad", written, P, rand(1))
case("setitem", written, P, rand(64, 1))
case("where scalar grad", lambda x, v: torch.where(ROWS > 0, x, v), P, rand(1))
case("copy_ broadcast grad", lambda x, v: x.clone().copy_(v), P, rand(4096))
case("segment_reduce", lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([69_000, 1000])), LONG)
case("fill_ grad", lambda x, v: x.clone().fill_(v.reshape(())), P, rand(1))
case("full grad add", lambda x, v: x + v, P, rand(1))
