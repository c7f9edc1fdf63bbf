"""The two kinds of MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from harness.parallel import TensorParallel

from .config import ModelSection


class GeluMLP(nn.Module):
    """down(gelu(up(x))), GELU in its tanh form, as in GPT-2."""

    def __init__(self, section: ModelSection, tensor: TensorParallel) -> None:
        super().__init__()
        self.up = tensor.column_linear(section.hidden_size, section.mlp_width, bias=section.bias)
        self.down = tensor.row_linear(section.mlp_width, section.hidden_size, bias=section.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama (Shazeer, arXiv 2002.05202)."""

    def __init__(self, section: ModelSection, tensor: TensorParallel) -> None:
        super().__init__()
        self.gate = tensor.column_linear(section.hidden_size, section.mlp_width, bias=section.bias)
        self.up = tensor.column_linear(section.hidden_size, section.mlp_width, bias=section.bias)
        self.down = tensor.row_linear(section.mlp_width, section.hidden_size, bias=section.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def build_mlp(section: ModelSection, tensor: TensorParallel) -> nn.Module:
    """The MLP that `model.activation` names, its width divided over the tensor-parallel ranks."""
    return {"gelu": GeluMLP, "swiglu": SwiGLUMLP}[section.activation](section, tensor)
