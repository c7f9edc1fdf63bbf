"""The study of tokenization: transformers with and without a tokenizer on Markov text whose entropy rate is known.

After Rajaraman, Jiao and Ramchandran 2024, "Toward a Theory of Tokenization in LLMs", arXiv 2404.08335. In: a file of
configs/studies/ of kind tokenization. Out: a result for every run in the work folder, and a report. Read markov.py
first (the text), then config.py, runs.py (one run), summary.py (the report).
"""

from .markov import MarkovSource
from .verbs import plan, report, run, status

__all__ = ["MarkovSource", "plan", "report", "run", "status"]
