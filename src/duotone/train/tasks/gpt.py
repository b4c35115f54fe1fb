"""A small GPT: pre-norm blocks with rotary attention and a GELU network, no biases, no dropout.

    x <- x + attention(norm(x));  x <- x + mlp(norm(x));  logits = head(norm(x))

After Radford et al. 2019, section 2.3 (pre-norm, smaller residual projections at first), and Su et al. 2021,
section 3.4 (rotary positions). It runs in the dtype of its weights. Only the rotation is FP32 throughout,
since 16 bits leave a position of a few hundred no fraction. Left out: caching and sampling.

Shape suffixes: B batch, T time, C width, V vocabulary, H heads, K width of a head, R half of K.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import duotone.torch as dt
from duotone.errors import TaskError

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`: counts, none of them a hyperparameter of training, and how its loss is computed.

    Attributes:
        layers: blocks.
        heads: of each attention.
        width: channels of the residual stream.
        context: the most tokens.
        vocabulary: how many tokens there are.
        linear_cross_entropy: whether head and loss are one `duotone.torch.linear_cross_entropy`, whose logits are never
            whole: less memory for a fourth product of the head. It pays where the vocabulary is large.

    >>> GPTConfig(layers=2, heads=2, width=64, context=32).head_width
    32
    """

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int = 256
    linear_cross_entropy: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context", "vocabulary"):
            if (value := getattr(self, name)) < 1:
                raise TaskError(f"GPTConfig: {name} is {value}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise TaskError(
                f"GPTConfig: width {self.width} does not divide into {self.heads} heads of even width; "
                f"make it a multiple of {2 * self.heads}"
            )

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


class GPT(nn.Module):
    """A decoder over tokens below `config.vocabulary`.

    Embedding and head are not tied: for 256 bytes the second matrix is 2 % of the small model, and each keeps
    the scale that suits it. Norms have no weights: the linear layer after each can hold the gain, so every
    parameter is a matrix. They are LayerNorms: fused on CPUs in every dtype, where RMSNorm is a composite.

    >>> _ = torch.manual_seed(0)
    >>> model = GPT(GPTConfig(layers=1, heads=2, width=32, context=16))
    >>> model(torch.zeros(3, 16, dtype=torch.int64)).shape
    torch.Size([3, 16, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            std = 0.02 / math.sqrt(2 * config.layers) if name.endswith("to_residual.weight") else 0.02
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, shape (B, T, V), in the dtype of the weights, for integer tokens of shape (B, T).

        With targets, int64 of the tokens' shape, return their mean cross-entropy instead: computed in here, 16-bit
        logits never leave in FP32.

        Raises:
            TaskError: if T is longer than the context.
        """
        length = tokens_BT.shape[-1]
        if length > self.config.context:
            raise TaskError(f"got {length} tokens; this model's context is {self.config.context}")
        rotation = rotary_angles(length, self.config.head_width, tokens_BT.device)
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation)
        if targets_BT is not None and self.config.linear_cross_entropy:
            return dt.linear_cross_entropy(self.norm(x_BTC), self.head.weight, targets_BT)
        logits_BTV = self.head(self.norm(x_BTC))
        return logits_BTV if targets_BT is None else F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class Block(nn.Module):
    """Attention and a GELU network of four times the width, each added to the residual stream.

    GELU is the exact one: its CPU kernels are two to four times as fast as those of the tanh form.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up", nn.Linear(config.width, 4 * config.width, bias=False))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("to_residual", nn.Linear(4 * config.width, config.width, bias=False))

    def forward(self, x_BTC: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotation)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.to_residual = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTC: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTC.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part_BTC in self.to_qkv(x_BTC).chunk(3, dim=-1)
        )
        y_BHTK = F.scaled_dot_product_attention(
            rotate(q_BHTK, *rotation), rotate(k_BHTK, *rotation), v_BHTK, is_causal=True
        )
        return self.to_residual(y_BHTK.transpose(1, 2).flatten(-2))


def rotary_angles(length: int, head_width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of position * base^(-2r / K), each FP32 of shape (T, R).

    They are computed in every pass, for microseconds: a buffer would follow the model into 16 bits.

    >>> cos, sin = rotary_angles(3, 4, torch.device("cpu"))
    >>> cos.shape, sin[0].tolist()
    (torch.Size([3, 2]), [0.0, 0.0])
    """
    frequency_R = ROTARY_BASE ** -torch.arange(0, 1, 2 / head_width, dtype=torch.float32, device=device)
    angle_TR = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency_R)
    return angle_TR.cos(), angle_TR.sin()


def rotate(x_BHTK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate channels r and r + K/2 of each position by its angle in FP32; return the dtype of `x_BHTK`."""
    a_BHTR, b_BHTR = x_BHTK.float().chunk(2, dim=-1)
    rotated_BHTK = torch.cat((a_BHTR * cos_TR - b_BHTR * sin_TR, b_BHTR * cos_TR + a_BHTR * sin_TR), dim=-1)
    return rotated_BHTK.to(x_BHTK.dtype)
