"""Megatron-core's distributed checkpoints of GPT models, in its "torch_dist" format.

Reading needs neither Megatron-core nor to unpickle anything; writing needs torch alone. The folder that is written is
what `megatron.core.dist_checkpointing.load` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import Box, StoredFile, TensorEntry, write_synced
from harness.config import HarnessError, plain, validate
from harness.data import Tokenizer, load_tokenizer
from harness.model import ModelSection
from harness.parallel import Fragment

from .links import Links
from .megatron_chunks import FORMAT_NAMES, METADATA, ChunkedTensor, ChunkFolder
from .megatron_config import describe_for_megatron
from .megatron_names import EMBEDDING, POSITIONS, VOCABULARY, Naming, link_megatron
from .records import read_json, write_json
from .source import READABLE_DTYPES, LinkedSource, ModelSource, fetch_linked

CONFIG = "metadata.json"
COMMON = "common.pt"
MODEL = "harness_model.json"
TRACKER = "latest_checkpointed_iteration.txt"
TOKENIZER = "tokenizer"
_TOLD = (
    "given by --model, and not confirmed by any comparison where shapes do not tell: heads, rope_theta, rope_scaling, "
    "norm_epsilon"
)
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NO_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of which Megatron-core asks for an extra state, which is empty but in 8-bit training."""


def is_megatron(path: Path) -> bool:
    """Whether a folder is a checkpoint of Megatron-core's, or has checkpoints of Megatron's below it."""
    if (path / TRACKER).is_file():
        return True
    return (path / CONFIG).is_file() and "sharded_backend" in read_json(path / CONFIG)


class MegatronSource(LinkedSource):
    """The model in a checkpoint, or in the latest one below a folder.

    Nothing in a checkpoint says how many heads a model has, among other things: that is said by `section`, or by the
    file harness_model.json in a folder that was written here. Padding rows of the vocabulary, states of an optimizer
    and what is no tensor are left out. Raises HarnessError, naming file or tensor, where it is not such a model.

    Some settings of Megatron's leave no trace in the tensors: trained with layernorm_zero_centered_gamma,
    rotary_interleaved, a rotary_percent below 1, exact GELU or squared ReLU, a model is not the one that is read here.
    """

    format = "Megatron-core"

    def __init__(self, path: Path, section: ModelSection | None = None) -> None:
        self.path, self._is_told = path, section is not None
        self.folder = _find_checkpoint(path)
        backend = read_json(self.folder / CONFIG)
        for key in ("sharded_backend", "sharded_backend_version"):
            if backend.get(key) != BACKEND[key]:
                raise HarnessError(
                    f"{self.folder / CONFIG}: {key} is {backend.get(key)!r}, and only {BACKEND[key]!r} can be read; "
                    f"save it as torch_dist with Megatron"
                )
        self._chunks = ChunkFolder(self.folder, _is_weight)
        tensors = self._chunks.tensors
        naming = Naming.of(tensors.keys())
        self._vocabulary = {naming.prefix + name for name in VOCABULARY}
        self.section = self._resolve(section, naming)
        self.links = link_megatron(self.section, naming)
        self.files = dict.fromkeys(tensors, self.folder / METADATA)
        self.check_entries({name: self._entry(name, tensor) for name, tensor in tensors.items()})
        dtypes = {getattr(torch, tensor.dtype) for tensor in tensors.values()}
        self.dtype = next(one for one in READABLE_DTYPES if one in dtypes)
        self.padding_rows = tensors[naming.prefix + EMBEDDING].shape[0] - (self.section.vocab_size or 0)

    def read(self, fragments: Sequence[Fragment]) -> None:
        for name, parts in self.find(fragments).items():
            self._chunks.read(name, parts)

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        return self._chunks.verify(share)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def details(self) -> dict[str, Any]:
        return {
            **super().details,
            "checkpoint": self.folder.name,
            "vocabulary_padding_rows_left_out": self.padding_rows,
            **({"model_section": _TOLD} if self._is_told else {}),
        }

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        folder = self.folder / TOKENIZER
        return load_tokenizer(folder) if folder.is_dir() else None

    def _resolve(self, section: ModelSection | None, naming: Naming) -> ModelSection:
        tensors, prefix = self._chunks.tensors, naming.prefix
        file = self.folder / MODEL
        if section is None and file.is_file():
            values = read_json(file).get("model")
            if not isinstance(values, dict):
                raise HarnessError(f"{file}: model is not there, or no mapping of keys to values")
            section = validate(ModelSection, values, f"{file}: model")
        if section is None:
            raise HarnessError(
                f"{self.folder}: {MODEL} is not there, and without it nothing says how many heads the model has: "
                f"`harness convert {self.path} NEW --model FILE.yaml` makes a checkpoint of it with FILE's "
                f"model section{_shown(tensors, prefix)}"
            )
        if section.vocab_size is None:
            raise HarnessError(
                f"{self.folder}: model.vocab_size is not said, and of the rows of {EMBEDDING} some may be padding: "
                f"say it{_shown(tensors, prefix)}"
            )
        if section.positions == "learned" and section.max_positions is None and prefix + POSITIONS in tensors:
            section = section.model_copy(update={"max_positions": tensors[prefix + POSITIONS].shape[0]})
        if section.positions == "learned" and section.max_positions is None:
            raise HarnessError(f"{self.folder}: tensor {prefix + POSITIONS}: not there, and positions are learned")
        return section

    def _entry(self, name: str, tensor: ChunkedTensor) -> TensorEntry:
        shape, wanted = tensor.shape, self.links.their_shapes.get(name)
        if name in self._vocabulary and wanted is not None and shape[0] > wanted[0]:
            shape = (wanted[0], *shape[1:])
        return TensorEntry(FORMAT_NAMES.get(tensor.dtype, tensor.dtype), shape, 0)


def _is_weight(name: str) -> bool:
    return not name.startswith(_NO_WEIGHTS) and "._extra_state" not in name


def _find_checkpoint(path: Path) -> Path:
    if (path / CONFIG).is_file():
        return path
    try:
        said = (path / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise HarnessError(f"{path / TRACKER}: cannot be read: {error}") from None
    if said != "release" and not (said.isascii() and said.isdigit()):
        raise HarnessError(f"{path / TRACKER}: says {said[:80]!r}, and not an iteration or release")
    folder = path / (said if said == "release" else f"iter_{int(said):07d}")
    if not (folder / CONFIG).is_file():
        old = any(folder.glob("mp_rank_*"))
        why = "an old checkpoint, whose weights are pickled, and not read: save it as torch_dist with Megatron"
        raise HarnessError(f"{folder}: " + (why if old else f"has no {CONFIG}, which torch_dist checkpoints have"))
    return folder


def _shown(tensors: Mapping[str, ChunkedTensor], prefix: str) -> str:
    """What the shapes do say, for the one who has to write a model section."""
    if prefix + EMBEDDING not in tensors:
        return ""
    rows, hidden = tensors[prefix + EMBEDDING].shape
    return f" (the tensors have hidden_size {hidden} and {rows} rows of tokens, padding included)"


def write_megatron(folder: Path, source: ModelSource, dtype: torch.dtype) -> dict[str, StoredFile]:
    """Write the model of `source` into `folder`, which is there and empty; sizes and digests of the weights' files.

    What has to be told Megatron-core, and our model section, stand in harness_model.json. Raises HarnessError where
    Megatron-core cannot express the model.
    """
    from .megatron_writer import Piece, saved, write_chunks  # torch.distributed.checkpoint, which takes its time

    section, tokenizer = source.section, source.tokenizer
    described = describe_for_megatron(section)
    stacked, single = (link_megatron(section, Naming(stacked=flag)) for flag in (True, False))
    pieces = [
        Piece(name, shape, box, partial(fetch_linked, source, single, dtype, alone))
        for alone, name, shape, box in _pieces(stacked, single)
    ]
    states = {
        f"decoder.layers.{module}._extra_state/shard_{number}_{section.layers}": [None]
        for number in range(section.layers)
        for module in _STATEFUL
    }
    files = write_chunks(folder, pieces, states, dtype)
    write_synced(folder / COMMON, saved({}))  # its entries would come back beside the weights, as if they were some
    write_json(folder / MODEL, {"model": plain(section), **described})
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    write_json(folder / CONFIG, BACKEND)
    return files


def _pieces(stacked: Links, single: Links) -> list[tuple[str, str, tuple[int, ...], Box]]:
    """Of each tensor of one layer, or of none: its name, and where it lies in which stacked tensor."""
    found = []
    for name, links in single.by_theirs.items():
        first = links[0]
        same = next(one for one in stacked.by_ours[first.ours] if one.our_box == first.our_box)
        shape = single.their_shapes[name]
        layer = same.their_box.offsets[: len(same.their_box.shape) - len(shape)]
        box = Box((*layer, *(0 for _ in shape)), (*(1 for _ in layer), *shape))
        found.append((name, same.theirs, stacked.their_shapes[same.theirs], box))
    return found
