"""Whether a parameter of a cast model can be shared by ranks in torch's ways."""

import torch
from torch import Tensor

from duotone.errors import PolicyError
from duotone.torch.parameters.full_precision import check_not_in_block
from duotone.torch.parameters.storage import storage_of

CAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_cast(name: str, param: Tensor, verb: str) -> None:
    """Raise unless `cast` has seen a parameter that it concerns, and it is as it was cast.

    Raises:
        PolicyError: it has not, or the model is in a `full_precision` block.
    """
    check_not_in_block(param, verb)
    if param.dtype in CAST_DTYPES and storage_of(param).reduce is None:
        raise PolicyError(
            f'parameter "{name}" was never cast; call duotone.torch.cast(model, policy) on the whole model before '
            f'{verb}, policy "fp32" included'
        )


def check_one_dtype(name: str, param: Tensor, who: str, instead: str) -> None:
    """Raise unless a parameter and its gradient have one dtype.

    Args:
        name: the parameter's.
        param: any.
        who: needs it so.
        instead: what to do.

    Raises:
        PolicyError: they have not.
    """
    if param.is_floating_point() and param.grad_dtype not in (None, param.dtype):  # type: ignore[attr-defined]
        raise PolicyError(
            f'parameter "{name}" is kept in {param.dtype} and its gradient in {param.grad_dtype}; '  # type: ignore[attr-defined]
            f"{who} keeps both in one dtype: {instead}"
        )
