"""Attention: a vision transformer, a GPT with tied embeddings, and an encoder and decoder with masks of both kinds."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .convolutional import SIZE

VOCABULARY = 32
PAD = 0


class ViT(nn.Module):
    """Patches, a class token, learned positions, torch's own encoder."""

    def __init__(self, width: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIZE // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.encoder(x)[:, 0]))


class CausalBlock(nn.Module):
    """A pre-norm block with scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (t.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).contiguous().view(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """Two blocks; the head is the embedding."""

    def __init__(self, width: int = 32, context: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([CausalBlock(width, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, token: Tensor) -> Tensor:
        x = self.tokens(token) + self.positions(torch.arange(token.shape[1], device=token.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CrossAttention(nn.Module):
    """Attention written out by hand: scores, a filled mask, a softmax in FP32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, is_pad: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(memory).chunk(2, dim=-1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(is_pad[:, None, :], torch.finfo(scores.dtype).min)
        return self.out(torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v)


class EncoderDecoder(nn.Module):
    """Torch's encoder under a boolean mask, and a decoder whose own attention has a float mask."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.cross = CrossAttention(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor, causal: Tensor) -> Tensor:
        is_pad = source == PAD
        memory = self.encoder(self.tokens(source), src_key_padding_mask=is_pad)
        x = self.tokens(target)
        x = self.norms[0](x + self.attention(x, x, x, attn_mask=causal, need_weights=False)[0])
        x = self.norms[1](x + self.cross(x, memory, is_pad))
        return self.head(self.norms[2](x + self.mlp(x)))


def chains(generator: Generator) -> tuple[Tensor]:
    """Draw sequences of tokens in which the next is a fixed function of the last."""
    successor = torch.randperm(VOCABULARY, generator=Generator().manual_seed(1))
    tokens = [torch.randint(VOCABULARY, (24,), generator=generator)]
    for _ in range(16):
        tokens.append(successor[tokens[-1]])
    return (torch.stack(tokens, dim=1),)


def predict_next(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Return the cross entropy of each next token."""
    (token,) = batch
    return F.cross_entropy(model(token[:, :-1]).flatten(0, 1), token[:, 1:].flatten())


def shifts(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sources of one repeated key, padded, and targets that count up by it, with their causal mask."""
    key = torch.randint(1, 4, (32, 1), generator=generator)
    length = torch.randint(2, 9, (32, 1), generator=generator)
    source = torch.where(torch.arange(8) < length, key, PAD)
    start = torch.randint(VOCABULARY, (32, 1), generator=generator)
    return source, (start + key * torch.arange(9)) % VOCABULARY, nn.Transformer.generate_square_subsequent_mask(8)


def translate(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of each next token of the target."""
    source, target, causal = batch
    return F.cross_entropy(model(source, target[:, :-1], causal).flatten(0, 1), target[:, 1:].flatten())
