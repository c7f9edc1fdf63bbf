"""The loss in Triton: a forward that keeps a few numbers a token, and a backward that computes the logits again.

Read device.py (the kernels) and passes.py (how they make a loss and gradients); tilings.py and plan.py choose sizes.
Importing this needs Triton, so only what is about to use it does; `why_not` says beforehand whether it can be used.
"""

from .launch import interpreted
from .passes import Kept, backward_pass, forward_pass

__all__ = ["Kept", "backward_pass", "forward_pass", "interpreted"]
