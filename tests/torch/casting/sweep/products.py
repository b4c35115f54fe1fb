"""Products, norms, recurrent layers, sparse products."""

import torch
from torch.nn import functional as F

from .data import FEW, IMG, LINE, MAT, MAT2, OFF, ROWS, ROWS2, VOL, P, case, ints, rand, randn

# products
case("linear", F.linear, ROWS, randn(128, 4096, seed=2) / 64, randn(128, seed=3))
case("matmul", torch.matmul, MAT, MAT2)
case("mv", torch.mv, MAT, MAT2[0])
case("bmm", torch.bmm, MAT.view(4, 128, 512), MAT2.view(4, 512, 128))
case("addmm", torch.addmm, MAT, MAT, MAT2)
case("addmv", torch.addmv, MAT[0], MAT, MAT2[0])
case("addr", torch.addr, MAT, MAT[0], MAT2[0])
case("baddbmm", torch.baddbmm, randn(4, 128, 128), MAT.view(4, 128, 512), MAT2.view(4, 512, 128))
case("addbmm", torch.addbmm, randn(128, 128), MAT.view(4, 128, 512), MAT2.view(4, 512, 128))
case("einsum", lambda x, y: torch.einsum("ij,kj->ik", x, y), MAT, MAT2)
case("einsum outer", lambda x, y: torch.einsum("i,j->ij", x, y), LINE[0, 0], LINE[0, 1, :512])
case("einsum sum", lambda x: torch.einsum("ij->i", x), P)
case("einsum diag", lambda x: torch.einsum("ii->", x), MAT)
case("tensordot", lambda x, y: torch.tensordot(x, y, 1), MAT, MAT2)
case("bilinear", F.bilinear, MAT[:, :32], MAT2[:, :32], randn(4, 32, 32), randn(4))
case("chain_matmul", lambda x, y: torch.linalg.multi_dot([x, y, x]), MAT, MAT2)
case("linear long bias", F.linear, randn(70_000, 4), randn(4, 4, seed=2), randn(4, seed=3))
case("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), LINE, randn(4, 4, 3) / 4, randn(4))
case("conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=1), IMG, randn(4, 2, 3, 3) / 4, randn(4))
case("conv2d depthwise", lambda x, w, b: F.conv2d(x, w, b, padding=3, groups=2), IMG, randn(2, 1, 7, 7) / 7, randn(2))
case("conv3d", F.conv3d, VOL, randn(4, 2, 3, 3, 3) / 8, randn(4))
case("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, 2), IMG, randn(2, 4, 3, 3) / 4, randn(4))
case("conv_transpose1d", lambda x, w, b: F.conv_transpose1d(x, w, b, 2), LINE, randn(4, 4, 3) / 4, randn(4))
case("conv_tbc", torch.conv_tbc, randn(4096, 2, 8), randn(3, 8, 8) / 5, randn(8))
case(
    "sdpa",
    F.scaled_dot_product_attention,
    randn(1, 2, 1024, 32),
    randn(1, 2, 1024, 32, seed=1),
    randn(1, 2, 1024, 32, seed=2),
)
case("prelu", F.prelu, IMG, rand(2))
case("prelu 1", F.prelu, IMG, rand(1))
# norms
case("layer_norm", lambda x, w, b: F.layer_norm(x, (4096,), w, b), OFF, rand(4096), rand(4096))
case("rms_norm", lambda x, w: F.rms_norm(x, (4096,), w), OFF, rand(4096))
case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), randn(2, 4, 128, 128) + 10, rand(4), rand(4))
case(
    "batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), randn(2, 4, 128, 128) + 10, rand(4), rand(4)
)
case(
    "batch_norm eval",
    lambda x, w, b: F.batch_norm(x, torch.full((4,), 10.0), torch.ones(4), w, b, False),
    randn(2, 4, 128, 128) + 10,
    rand(4),
    rand(4),
)
case(
    "instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), randn(2, 4, 128, 128) + 10, rand(4), rand(4)
)
case("local_response_norm", lambda x: F.local_response_norm(x, 5), randn(1, 16, 128, 128))
case(
    "torch.batch_norm",
    lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    randn(2, 4, 128, 128) + 10,
    rand(4),
    rand(4),
)
case(
    "torch.instance_norm",
    lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    randn(2, 4, 128, 128) + 10,
    rand(4),
    rand(4),
)
case("torch.group_norm", lambda x, w, b: torch.group_norm(x, 2, w, b), randn(2, 4, 128, 128) + 10, rand(4), rand(4))
case(
    "native_layer_norm", lambda x, w, b: torch.native_layer_norm(x, (4096,), w, b, 1e-5)[0], OFF, rand(4096), rand(4096)
)
case(
    "native_group_norm",
    lambda x, w, b: torch.native_group_norm(x, w, b, 2, 4, 128 * 128, 2, 1e-5)[0],
    randn(2, 4, 128, 128) + 10,
    rand(4),
    rand(4),
)
case("norm_except_dim", lambda v: torch.norm_except_dim(v, 2, 0), MAT)
case("_weight_norm", lambda v, g: torch._weight_norm(v, g, 0), MAT, rand(512, 1))
# recurrent
torch.manual_seed(0)
R = torch.nn.LSTM(8, 8)
case(
    "lstm",
    lambda x, *w: torch.lstm(x, [x.new_zeros(1, 2, 8)] * 2, list(w), True, 1, 0.0, False, False, False)[0],
    randn(200, 2, 8),
    *[p.detach() for p in R.parameters()],
)
# sparse
A = torch.sparse_coo_tensor(
    torch.stack([ints(3, 70_000), ints(5000, 70_000, seed=1)]), rand(70_000), (3, 5000)
).coalesce()
case("sparse @", lambda h: A @ h, rand(5000, 4))
case("sparse 16 @", lambda h: A.to(h.dtype) @ h, rand(5000, 4))
case("sparse csr @", lambda h: A.to_sparse_csr() @ h, rand(5000, 4))
case("sparse.mm", lambda h: torch.sparse.mm(A, h), rand(5000, 4))
case("sparse.addmm", lambda b, h: torch.sparse.addmm(b, A, h), rand(3, 4), rand(5000, 4))
case(
    "sparse.sum", lambda v: torch.sparse.sum(torch.sparse_coo_tensor(A.indices(), v, A.shape), 1).to_dense(), A.values()
)
case(
    "sparse.softmax",
    lambda v: torch.sparse.softmax(torch.sparse_coo_tensor(A.indices(), v, A.shape), 1).to_dense(),
    A.values(),
)
case("sparse to_dense dup", lambda v: torch.sparse_coo_tensor(FEW[None], v, (3,)).to_dense(), rand(70_000))
case(
    "sparse.sampled_addmm",
    lambda x, y: torch.sparse.sampled_addmm(torch.ones(64, 64).to_sparse_csr().to(x.dtype), x, y).to_dense(),
    ROWS,
    ROWS2.T.contiguous(),
)
case("hspmm", lambda h: torch.hspmm(A, h).to_dense(), rand(5000, 4))
case("smm", lambda h: torch.smm(A, h).to_dense(), rand(5000, 4))
case("sparse mv", lambda h: A @ h, rand(5000))
case("sparse @ sparse", lambda v: (torch.sparse_coo_tensor(A.indices(), v, A.shape) @ A.t()).to_dense(), A.values())
case("dense @ sparse", lambda h: h @ A, rand(4, 3))
case("sspaddmm", lambda h: torch.sspaddmm(torch.zeros(3, 4).to_sparse(), A, h).to_dense(), rand(5000, 4))
case("sparse torch.mm", lambda h: torch.mm(A, h), rand(5000, 4))
case(
    "sparse grad",
    lambda v, h: torch.sparse.mm(torch.sparse_coo_tensor(A.indices(), v, A.shape), h),
    A.values(),
    rand(5000, 4),
)
case("F.linear sparse", lambda w: F.linear(A, w), rand(4, 5000))
case("sparse hsmm", lambda h: torch.hsmm(A, h).to_dense(), rand(5000, 4))
case("sparse dsmm", lambda h: torch.dsmm(A, h), rand(5000, 4))
