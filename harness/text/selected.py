"""Where a finished selection keeps what it says of itself and its documents: `harness select` writes them, training
reads them."""

from __future__ import annotations

SELECTION_RECORD = "selection.json"
"""The file, in the selection's folder, that training keeps as provenance."""
CHOSEN = "chosen"
"""The folder there with the documents."""
