"""Plain products whose sums are kept in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """out (n, D) fp32 [+]= left (n, k) · right (k, D), both of one dtype: products of 16-bit values summed in fp32.

    fp32 inputs are multiplied as torch.backends.cuda.matmul says.
    """
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, beta=1.0 if add else 0.0, out=out)
    elif not left.is_cuda:  # in the interpreter
        torch.addmm(out, left.float(), right.float(), beta=1.0 if add else 0.0, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
