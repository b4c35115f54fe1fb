"""The families by name, and how each learns."""

from torch import nn

import duotone.torch as dt

from .attention import GPT, EncoderDecoder, ViT, chains, predict_next, shifts, translate
from .convolutional import ConvNet, ResNet, UNet, disks, segment, stripes
from .dense import MLP, classify, points
from .family import Family
from .generative import (
    VAE,
    Denoiser,
    Discriminator,
    bumps,
    curves,
    deceive,
    discriminate,
    energy_distance,
    evidence,
    generator_network,
    plane,
    predict_noise,
)
from .graphs_and_experts import GCN, ExpertModel, communities, fit_pieces, name_community, pieces
from .recommender import DLRM, click_through, visits
from .recurrent import GRU, LSTM, continue_wave, name_kind, sentences, waves

MOMENTUM = {"momentum": 0.9}


def adversaries() -> tuple[nn.Module, nn.Module]:
    """Return a GAN's generator and discriminator."""
    return generator_network(), Discriminator()


ZOO = {
    "MLP": Family(lambda: (MLP(),), points, (classify,), 1e-2),
    "ConvNet": Family(lambda: (ConvNet(),), stripes, (classify,), 3e-3),
    "ResNet": Family(lambda: (ResNet(),), stripes, (classify,), 3e-2, optimizer=dt.SGD, settings=MOMENTUM),
    "UNet": Family(lambda: (UNet(),), disks, (segment,), 3e-3),
    "ViT": Family(lambda: (ViT(),), stripes, (classify,), 3e-3),
    "GPT": Family(lambda: (GPT(),), chains, (predict_next,), 5e-3),
    "EncoderDecoder": Family(lambda: (EncoderDecoder(),), shifts, (translate,), 5e-3, steps=60),
    "LSTM": Family(lambda: (LSTM(),), sentences, (name_kind,), 5e-3),
    "GRU": Family(lambda: (GRU(),), waves, (continue_wave,), 5e-3),
    "GCN": Family(lambda: (GCN(),), communities, (name_community,), 5e-3),
    "MoE": Family(lambda: (ExpertModel(),), pieces, (fit_pieces,), 5e-3),
    "VAE": Family(lambda: (VAE(),), curves, (evidence,), 5e-3, steps=60),
    "GAN": Family(
        adversaries, plane, (deceive, discriminate), 2e-3, 60, settings={"betas": (0.0, 0.9)}, score=energy_distance
    ),
    "DLRM": Family(lambda: (DLRM(),), visits, (click_through,), 1e-2),
    "Diffusion": Family(lambda: (Denoiser(),), bumps, (predict_noise,), 5e-3),
}
