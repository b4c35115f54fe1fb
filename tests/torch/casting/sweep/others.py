"""Losses, signals, linear algebra, quantization, forms in place."""

import torch
from torch.nn import functional as F

from .data import BIG, FEW, IDX, IMG, LONG, MAT, MAT2, ROWS, ROWS2, P, Q, case, ints, rand, randn

# losses
L = ints(1000, 512)
LOGITS = randn(512, 1000) * 3
case("cross_entropy", lambda x: F.cross_entropy(x, L), LOGITS)
case("cross_entropy smooth", lambda x: F.cross_entropy(x, L, label_smoothing=0.1), LOGITS)
case("cross_entropy large", lambda x: F.cross_entropy(x, ints(30000, 64)), randn(64, 30000))
case("nll_loss", lambda x: F.nll_loss(x.log_softmax(-1), L), LOGITS)
case("bce logits", F.binary_cross_entropy_with_logits, ROWS, P)
case("kl_div", lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="batchmean"), ROWS, P)
case(
    "ctc_loss",
    lambda x: F.ctc_loss(x.log_softmax(-1), ints(19, 2, 20) + 1, torch.tensor([300, 300]), torch.tensor([20, 20])),
    randn(300, 2, 20),
)
case("poisson_nll", F.poisson_nll_loss, ROWS, P)
case("gaussian_nll", F.gaussian_nll_loss, ROWS, ROWS2, P)
case("hinge", lambda x: F.hinge_embedding_loss(x, (ROWS2 > 0) * 2.0 - 1), ROWS)
case("cosine_embedding", lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(64)), ROWS, ROWS2)
case("margin_ranking", lambda x, y: F.margin_ranking_loss(x, y, torch.ones(64, 1)), ROWS, ROWS2)
case("multi_margin", lambda x: F.multi_margin_loss(x, L), LOGITS)
case("multilabel_soft_margin", F.multilabel_soft_margin_loss, ROWS, (P > 0.5).float())
case("triplet", F.triplet_margin_loss, ROWS, ROWS2, P)
case("mse sum", lambda x, y: F.mse_loss(x, y, reduction="sum"), BIG, ROWS)
case(
    "linear_cross_entropy",
    lambda x, w: (
        F.linear_cross_entropy(x, w, L) if hasattr(F, "linear_cross_entropy") else F.cross_entropy(F.linear(x, w), L)
    ),
    randn(512, 64),
    randn(1000, 64) / 8,
)
# signals, linear algebra
case("fft", lambda x: torch.fft.rfft(x).abs(), ROWS)
case("stft", lambda x: torch.stft(x, 400, window=torch.hann_window(400), return_complex=True).abs(), P)
case("det", torch.linalg.det, MAT[:16, :16] * 4)
case("inv", torch.linalg.inv, MAT[:64, :64] + 2 * torch.eye(64))
case("svdvals", torch.linalg.svdvals, MAT[:64, :64])
case("qr", lambda x: torch.linalg.qr(x).R.abs(), MAT[:64, :64])
case("cholesky", lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(64)), MAT[:64, :64])
case("matrix_exp", torch.matrix_exp, MAT[:64, :64])
case("matrix_power", lambda x: torch.linalg.matrix_power(x, 5), MAT[:64, :64])
case(
    "svd_lowrank",
    lambda x: (torch.manual_seed(0), torch.svd_lowrank(x, 4)[1][:1])[1],
    torch.outer(MAT[0], MAT2[0]) + MAT * 0.01,
)
case("slogdet", lambda x: torch.linalg.slogdet(x)[1], MAT[:64, :64])
case("solve", torch.linalg.solve, MAT[:64, :64] + 2 * torch.eye(64), MAT2[:64, :64])
case("polar", lambda x, y: torch.polar(x, y).real, P, ROWS)
case("view_as_complex", lambda x: torch.view_as_complex(x).abs(), randn(4096, 2))
case(
    "lu_solve",
    lambda x, y: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), y),
    MAT[:64, :64] + 2 * torch.eye(64),
    MAT2[:64, :64],
)
# quantization
case("fake_quantize_per_tensor", lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 128, 0, 255), ROWS)
case(
    "fake_quantize_per_channel",
    lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.full((64,), 0.02), torch.full((64,), 128, dtype=torch.int32), 0, 0, 255
    ),
    ROWS,
)
case(
    "fake_quantize tensor qparams",
    lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.tensor(0.02), torch.tensor(128, dtype=torch.int32), 0, 255
    ),
    ROWS,
)
case(
    "fused_fake_quant",
    lambda x: torch.fused_moving_avg_obs_fake_quant(
        x,
        torch.tensor([1]),
        torch.tensor([1]),
        torch.tensor([0.0]),
        torch.tensor([1.0]),
        torch.tensor([1.0]),
        torch.tensor([0], dtype=torch.int32),
        0.1,
        0,
        255,
        -1,
        False,
        False,
    ),
    ROWS,
)
# made of others in Python
case(
    "multi_head_attention",
    lambda x, w, o: F.multi_head_attention_forward(
        x,
        x,
        x,
        32,
        4,
        w,
        torch.zeros(96, dtype=w.dtype),
        None,
        None,
        False,
        0.0,
        o,
        torch.zeros(32, dtype=w.dtype),
        need_weights=False,
    )[0],
    randn(1024, 1, 32),
    randn(96, 32) / 6,
    randn(32, 32, seed=2) / 6,
)
case("gumbel_softmax", lambda x: (torch.manual_seed(0), F.gumbel_softmax(x))[1], ROWS)
case("cumsum_", lambda x: x.clone().cumsum_(0), LONG)
case("cumprod_", lambda x: x.clone().cumprod_(0), 1 + (LONG - 1) * 1e-4)
case("pow_", lambda x: x.clone().pow_(1.7), P)
case("exp_", lambda x: x.clone().exp_(), ROWS)
case("renorm_", lambda x: x.clone().renorm_(2, 0, 1.0), ROWS)
case(
    "baddbmm_",
    lambda c, x, y: c.clone().baddbmm_(x, y),
    randn(4, 128, 128),
    MAT.view(4, 128, 512),
    MAT2.view(4, 512, 128),
)
case("addr_", lambda c, x, y: c.clone().addr_(x, y), MAT, MAT[0], MAT2[0])
case("softplus beta", lambda x: F.softplus(x, 0.3), BIG)
case("logsigmoid big", F.logsigmoid, ROWS * 5)
case("sigmoid big", torch.sigmoid, ROWS * 5)
case("tanh big", torch.tanh, ROWS * 5)
case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), ROWS * 2)
case("sqrt small", torch.sqrt, P * 1e-3)
case("hypot big", torch.hypot, BIG * 5, BIG.flip(0) * 5)
case("addcdiv_", lambda x, y, z: x.clone().addcdiv_(y, z), ROWS, ROWS2, P)
case("angle", torch.angle, ROWS)
case("stack sum", lambda x, y: torch.stack([x, y]).sum(0), ROWS, ROWS2)
case("tensor_split", lambda x: x.tensor_split(3, -1)[0], ROWS)
case("embedding_bag max", lambda w: F.embedding_bag(IDX, w, mode="max"), randn(4096, 8))
case("cosh big", torch.cosh, ROWS * 2)
case("pad constant", lambda x: F.pad(x, (3, 3)), ROWS)
case("cumsum dim0", lambda x: x.cumsum(0), LONG[:, None].expand(-1, 2).contiguous())

case("index_add_ 2d", lambda x, s: x.clone().index_add_(0, FEW, s), rand(3, 4), rand(70_000, 4))
case("index_add 2d", lambda x, s: x.index_add(0, FEW, s), rand(3, 4), rand(70_000, 4))
case(
    "scatter_add_ 2d",
    lambda x, s: x.clone().scatter_add_(0, FEW[:, None].expand(-1, 4), s),
    rand(3, 4),
    rand(70_000, 4),
)
case("index_reduce_ mean", lambda x, s: x.clone().index_reduce_(0, FEW, s, "mean"), rand(3, 4), rand(70_000, 4))
case("scatter_reduce_ mean", lambda x, s: x.clone().scatter_reduce_(0, FEW, s, "mean"), rand(3), rand(70_000))
case("index_add_ dim1", lambda x, s: x.clone().index_add_(1, FEW[:5000], s), rand(4, 3), rand(4, 5000))
case("unfold grad aten", lambda x: torch.ops.aten.im2col(x, [15, 15], [1, 1], [0, 0], [1, 1]), IMG[:, :, :64, :64])
case("bce", lambda x: F.binary_cross_entropy(x.float(), Q), P)
case("bernoulli", lambda p: torch.bernoulli(p, generator=torch.Generator().manual_seed(0)), P)
