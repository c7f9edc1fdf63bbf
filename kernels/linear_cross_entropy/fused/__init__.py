"""The loss in Triton: a forward that keeps a few numbers a token, and a backward that computes the logits again.

Read device.py (the kernels) and passes.py (how they make a loss and gradients); tilings.py and plan.py choose sizes.
device.py, launch.py and passes.py need Triton, so only what is about to run them imports them (choice.py says whether
it can).
"""
