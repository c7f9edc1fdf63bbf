"""The heavy computations, free of the rest of the house: hidden states, an output weight and targets in, losses out.

Comes out: `LossOutput`, with gradients through autograd and never more than a chunk of logits in memory.
Read linear_cross_entropy/interface.py first. Import as `harness.kernels`, never as `kernels`.
"""

if __name__ == "kernels":
    # From the repository root this folder is also found as `kernels`, which other libraries probe for (it is the name
    # of a package by Hugging Face). Under that name it stays empty: a second copy would register custom operators twice.
    def __getattr__(name: str) -> object:
        raise AttributeError(f"{name}: this package is imported as harness.kernels")
else:
    from .linear_cross_entropy import IGNORE_INDEX, OUTPUTS, LossOutput, VocabShard, linear_cross_entropy

    __all__ = ["IGNORE_INDEX", "OUTPUTS", "LossOutput", "VocabShard", "linear_cross_entropy"]
