"""harness: a distributed pretraining harness for language models.

`harness/train.py` is the loop and reads from top to bottom; `harness/cli.py` lists the verbs. Importing this package
imports nothing else: rooms are imported from where they are used, so `harness --help` needs neither torch nor a GPU.
"""

__version__ = "0.1.0"
