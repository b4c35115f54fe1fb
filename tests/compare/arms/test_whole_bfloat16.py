"""A model in BF16 throughout takes and gives what a model in FP32 does."""

import torch
from torch import Tensor, nn

from duotone.compare.arms.whole_bfloat16 import whole_bfloat16


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.seen: list[torch.dtype] = []

    def forward(self, parts: dict[str, Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = [parts["x"].dtype, parts["index"].dtype, scale.dtype]
        return self.norm(parts["x"]) * scale, parts["index"]


def test_inputs_are_narrowed_and_outputs_widened_wherever_they_are():
    model = whole_bfloat16(Both(), torch.device("cpu"))
    assert isinstance(model, Both)
    parts = {"x": torch.randn(4, 2), "index": torch.arange(4)}
    y, index = model(parts, scale=torch.ones(1))
    assert model.seen == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert (y.dtype, index.dtype) == (torch.float32, torch.int64)
    assert parts["x"].dtype == torch.float32
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.int64}
