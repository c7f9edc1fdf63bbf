"""Files of text in; records, and the work of processes on them, out.

What trains, selects and evaluates reads text the same way. Read source.py first (what a configuration says of it),
then records.py (what a file's records are). Light: nothing here imports torch.
"""

from .files import SourceFile, expand, find_files
from .progress import Progress
from .records import (
    PARQUET_ROWS,
    Content,
    Problem,
    Record,
    Unusable,
    fields_of_line,
    import_parquet,
    place_of,
    read_records,
    text_of,
)
from .selected import CHOSEN, SELECTION_RECORD
from .source import TextSource
from .streams import STREAM_ERRORS, open_stream
from .workers import available_cores, choose_workers, map_in_processes

__all__ = [
    "CHOSEN",
    "PARQUET_ROWS",
    "SELECTION_RECORD",
    "STREAM_ERRORS",
    "Content",
    "Problem",
    "Progress",
    "Record",
    "SourceFile",
    "TextSource",
    "Unusable",
    "available_cores",
    "choose_workers",
    "expand",
    "fields_of_line",
    "find_files",
    "import_parquet",
    "map_in_processes",
    "open_stream",
    "place_of",
    "read_records",
    "text_of",
]
