"""The parts of tools/gpu_check.py: a command that proves the linear cross-entropy on one GPU, and times it.

In: a device. Out: checks, times and measurements for tuning, as what JSON takes. Read ../gpu_check.py first, which runs
everything in other processes (jobs.py); those run worker.py: checks of cases.py, then speed.py, then tuning.py.
"""
