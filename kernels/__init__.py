"""The heavy computations, free of the rest of the house: hidden states, an output weight and targets in, losses out.

Comes out: `LossOutput`, with gradients through autograd and never more than a chunk of logits in memory.
Read linear_cross_entropy/interface.py first. Import as `harness.kernels`, never as `kernels`.
"""

if __name__ == "kernels":
    # From the repository root this folder is also found as `kernels`, a name that other libraries probe for (it is
    # Hugging Face's package). Under that name it stays empty, sub-packages included: a second copy would register
    # custom operators twice, and its types would not be the same types.
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"{name}: this package is imported as harness.kernels")
else:
    from .linear_cross_entropy import (
        IGNORE_INDEX,
        OUTPUTS,
        CompSum,
        CrossEntropy,
        LossOutput,
        VocabShard,
        block_bytes,
        chunk_length,
        linear_cross_entropy,
        machine_problem,
    )

    __all__ = [
        "IGNORE_INDEX",
        "OUTPUTS",
        "CompSum",
        "CrossEntropy",
        "LossOutput",
        "VocabShard",
        "block_bytes",
        "chunk_length",
        "linear_cross_entropy",
        "machine_problem",
    ]
