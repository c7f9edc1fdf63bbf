"""Fragments of named tensors and JSON state in, a committed and verified step folder out, and back on any layout.

Tensors are known by logical name and global shape, never by the layout that wrote them; nothing is ever unpickled.
Read store.py first (saving, finding, loading), then manifest.py (the format).
"""

from . import inspection
from .boxes import Box, cover_problem
from .disk import make_folders, remove, write_synced
from .errors import CannotWriteError, CheckpointError
from .manifest import Manifest, StoredFile, StoredFragment, StoredTensor
from .retention import Pruner, Retention
from .saver import Saved, Saver
from .store import CheckpointStore
from .tensor_file import write_tensor_file
from .tensor_reader import TensorEntry, TensorFile

__all__ = [
    "Box",
    "CannotWriteError",
    "CheckpointError",
    "CheckpointStore",
    "Manifest",
    "Pruner",
    "Retention",
    "Saved",
    "Saver",
    "StoredFile",
    "StoredFragment",
    "StoredTensor",
    "TensorEntry",
    "TensorFile",
    "cover_problem",
    "inspection",
    "make_folders",
    "remove",
    "write_synced",
    "write_tensor_file",
]
