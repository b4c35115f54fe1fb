"""Images: where they are read, resampling, windows, pools, paddings."""

from functools import partial

import torch
from torch.nn import functional as F

from .data import IMG, LINE, LONG, MAT, MAT2, ONES, ROWS, VOL, P, case, rand, randn

THETA = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.9, 0.0]]])
THETA_3D = torch.tensor([[[0.9, 0.1, 0, 0], [-0.1, 0.9, 0, 0], [0, 0, 1, 0]]])
GRID = F.affine_grid(THETA, (1, 2, 300, 300), align_corners=False)
GRID_3D = F.affine_grid(THETA_3D, (1, 2, 30, 30, 30), align_corners=False)
for mode in ("bilinear", "nearest", "bicubic"):
    for padding in ("zeros", "border", "reflection"):
        sample = partial(F.grid_sample, mode=mode, padding_mode=padding, align_corners=False)
        case(f"grid_sample {mode} {padding}", sample, IMG, GRID)
case("grid_sample of volumes", partial(F.grid_sample, align_corners=False), VOL, GRID_3D)
case("affine_grid", partial(F.affine_grid, size=(1, 1, 512, 512), align_corners=False), THETA)
case("affine_grid_generator", lambda theta: torch.affine_grid_generator(theta, (1, 1, 512, 512), False), THETA)
for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
    for label, size in {"up": {"scale_factor": 1.7}, "down": {"size": 100}, "up 4": {"scale_factor": 4}}.items():
        case(f"interpolate {mode} {label}", partial(F.interpolate, mode=mode, **size), IMG[:, :, :300, :300])
for mode in ("bilinear", "bicubic"):
    case(f"interpolate {mode} antialias", partial(F.interpolate, size=100, mode=mode, antialias=True), IMG)
    case(f"interpolate {mode} corners", partial(F.interpolate, size=700, mode=mode, align_corners=True), IMG)
case(
    "interpolate bilinear channels_last",
    lambda x: F.interpolate(x.contiguous(memory_format=torch.channels_last), scale_factor=2, mode="bilinear"),
    randn(1, 32, 128, 128),
)
case("interpolate linear", lambda x: F.interpolate(x, size=9000, mode="linear"), LINE)
case("interpolate trilinear", lambda x: F.interpolate(x, size=70, mode="trilinear"), VOL)
case("interpolate nearest 1d", lambda x: F.interpolate(x, size=9000), LINE)
case("interpolate one pixel", lambda x: F.interpolate(x, size=300, mode="bilinear"), rand(1, 1, 1, 1))
case("interpolate nearest one pixel", lambda x: F.interpolate(x, size=300), rand(1, 1, 1, 1))
case("avg_pool2d", lambda x: F.avg_pool2d(x, 3), IMG)
case("avg_pool2d all", lambda x: F.avg_pool2d(x, 300), ONES)
case("avg_pool2d overlap", lambda x: F.avg_pool2d(x, 25, 1, 12), IMG[:, :, :128, :128])
case("avg_pool1d overlap", lambda x: F.avg_pool1d(x, 25, 1, 12), LINE)
case("avg_pool1d all", lambda x: F.avg_pool1d(x, 70_000), LONG[None, None])
case(
    "avg_pool2d cl", lambda x: F.avg_pool2d(x.contiguous(memory_format=torch.channels_last), 9, 1), randn(1, 32, 64, 64)
)
case("avg_pool3d", lambda x: F.avg_pool3d(x, 3, 1), VOL)
case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 1), LONG[None, None])
case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), ONES)
case("adaptive_avg_pool2d 7", lambda x: F.adaptive_avg_pool2d(x, 7), IMG)
case(
    "adaptive_avg_pool2d cl",
    lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 2),
    rand(1, 8, 512, 512),
)
case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 1), rand(1, 2, 48, 48, 48))
case("adaptive_avg_pool3d 5", lambda x: F.adaptive_avg_pool3d(x, 5), VOL)
case("max_pool1d", lambda x: F.max_pool1d(x, 3, 1), LINE)
case("max_pool2d", lambda x: F.max_pool2d(x, 3, 1), IMG)
case("max_pool2d big", lambda x: F.max_pool2d(x, 65, 1), IMG[:, :, :256, :256])
case("max_pool3d", lambda x: F.max_pool3d(x, 3, 1), VOL)
case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 7), IMG)
case("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 7), LINE)
case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 7), VOL)
s2 = rand(1, 2, 2)
s3 = rand(1, 2, 3)
case(
    "fractional_max_pool2d",
    lambda x, s: F.fractional_max_pool2d(x, 2, output_ratio=(0.7, 0.7), _random_samples=s),
    IMG,
    s2,
)
case(
    "fractional_max_pool3d",
    lambda x, s: F.fractional_max_pool3d(x, 2, output_ratio=(0.7, 0.7, 0.7), _random_samples=s),
    VOL,
    s3,
)
case("max_unpool2d", lambda x: F.max_unpool2d(x, IDXP, 2), F.max_pool2d(IMG, 2))
IDXP = F.max_pool2d(IMG, 2, return_indices=True)[1]
case("unfold", lambda x: F.unfold(x, 3), IMG)
case("unfold overlap grad", lambda x: F.unfold(x, 15), IMG[:, :, :64, :64])
case("fold", lambda x: F.fold(x, 64, 15), randn(1, 225, 2500))
case("Tensor.unfold grad", lambda x: x.unfold(-1, 300, 1), P[:2, :1000])
case("as_strided grad", lambda x: x.as_strided((4096, 300), (0, 1)), rand(300))
case("pad reflect", lambda x: F.pad(x, (100, 100, 100, 100), mode="reflect"), IMG)
case("pad replicate", lambda x: F.pad(x, (600, 600), mode="replicate"), LINE)
case("pad replicate 2d", lambda x: F.pad(x, (60, 60, 60, 60), mode="replicate"), IMG)
case("pad circular", lambda x: F.pad(x, (60, 60), mode="circular"), LINE)
case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), randn(1, 4, 256, 256))
case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), IMG)
case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), randn(1, 4, 64, 64))
case("rot90", lambda x: x.rot90(1, (2, 3)), IMG)
case("roll", lambda x: x.roll(300, -1), ROWS)
case("block_diag", torch.block_diag, MAT, MAT2)
case("cartesian_prod", torch.cartesian_prod, LINE[0, 0, :200], LINE[0, 1, :300])
case("combinations", torch.combinations, LINE[0, 0, :300])
case("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), LINE[0, 0, :500], LINE[0, 1, :500])
case("vander", lambda x: torch.vander(x, 8), P[0])
case("diag_embed", torch.diag_embed, P[:2, :256])
case("tril", torch.tril, MAT)
