"""Corpora that `harness select` chose: what to read, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import HarnessError
from harness.disk import sha256_of
from harness.text import CHOSEN, SELECTION_RECORD

from .config import CorpusSection, DataSection

KEPT = ("harness", "method", "targets", "budget", "thresholds")
"""What of a selection's record goes with every model that is trained on it."""


def with_selections(config: DataSection) -> DataSection:
    """The section with the sources of corpora that name a selection filled in.

    HarnessError where there is no finished selection, or its files are not the ones that it wrote.
    """
    corpora = tuple(_filled(corpus) if corpus.selection is not None else corpus for corpus in config.corpora)
    return config.model_copy(update={"corpora": corpora})


def provenance(corpus: CorpusSection) -> dict[str, Any] | None:
    """How a corpus was chosen (JSON): targets, method, budget, digests; None where it names no selection."""
    if corpus.selection is None:
        return None
    folder, record = _read(corpus)
    files = record["files"]
    return {
        "sha256": sha256_of(folder / SELECTION_RECORD),
        **{key: record[key] for key in KEPT},
        "documents": sum(file["documents"] for file in files),
        "bytes_on_disk": sum(file["bytes"] for file in files),
        "files": {file["file"]: file["sha256"] for file in files},
    }


def _filled(corpus: CorpusSection) -> CorpusSection:
    folder, record = _read(corpus)
    sources = []
    for file in record["files"]:
        path = folder / CHOSEN / file["file"]
        if not path.is_file():
            raise HarnessError(f"{corpus.label}: selection {corpus.selection}: {path} is gone; select again")
        if path.stat().st_size != file["bytes"] or sha256_of(path) != file["sha256"]:
            raise HarnessError(f"{corpus.label}: selection {corpus.selection}: {path} was changed since; select again")
        sources.append(str(path))
    if not sources:
        raise HarnessError(f"{corpus.label}: selection {corpus.selection}: chose no documents")
    text = record["text"]
    fields = text["text_field"]
    return corpus.model_copy(
        update={
            "source": tuple(sources),
            "text_field": fields if isinstance(fields, str) else tuple(fields),
            "joined_by": text["joined_by"],
            "separator": text["separator"],
        }
    )


def _read(corpus: CorpusSection) -> tuple[Path, dict[str, Any]]:
    assert corpus.selection is not None
    folder = Path(corpus.selection).expanduser()
    file = folder / SELECTION_RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for key in ("files", "text", *KEPT):
            record[key]
    except FileNotFoundError:
        raise HarnessError(
            f"{corpus.label}: selection {corpus.selection}: has no {SELECTION_RECORD}, so it is no finished selection; "
            "run `harness select` first, and name its output.folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{file}: is damaged ({error!r}); select again") from None
    return folder, record
