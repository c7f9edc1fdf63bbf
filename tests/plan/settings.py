"""Settings for dry runs: no corpus, no tokenizer file, nothing that exists."""

from __future__ import annotations

from typing import Any

from harness.config import validate
from harness.settings import Settings

NARROW = {
    "family": "llama", "layers": 3, "hidden_size": 35, "heads": 6, "kv_heads": 2, "head_size": 6, "mlp_size": 50,
    "max_positions": 64, "vocab_size": 257, "vocab_multiple": 1,
}  # fmt: skip


def settings_of(**sections: dict[str, Any]) -> Settings:
    """`sections` over a small job, whose sizes are odd where tensor parallelism does not divide them by 2. A model
    with a shape stands for itself."""
    values: dict[str, dict[str, Any]] = {
        "data": {
            "corpora": [{"name": "none", "source": ["/nowhere/*.txt"]}],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 32,
        },
        "model": {} if "shape" in sections.get("model", {}) else NARROW,
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1, "dry_run": True},
        "parallel": {"device": "cpu"},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return validate(Settings, values, "settings_of")
