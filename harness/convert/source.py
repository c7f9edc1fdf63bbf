"""A trained model wherever it lies: what kind of decoder it is, and its weights, any part of them, under our names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import Box, TensorEntry, TensorFile
from harness.config import HarnessError
from harness.data import Tokenizer
from harness.model import Decoder, LossSection, ModelSection, SiteState, norm_sites
from harness.parallel import Fragment

from .links import Links

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What becomes an fp32 master weight without rounding."""
UNLIMITED_POSITIONS = 2048
"""Of a model whose limit nothing says."""


class ModelSource(ABC):
    """A model to read. `read` takes fragments of kind "master", of our names and global shapes, on any layout."""

    format: str
    """What people call the format: "Hugging Face"."""
    path: Path
    """What messages name."""
    section: ModelSection
    """With vocab_size and, for learned positions, max_positions resolved."""
    dtype: torch.dtype = torch.float32
    """What its weights are stored in."""
    sequence_length: int | None = None
    """Of its training, where that is known."""
    norm_states: Mapping[str, SiteState] = {}
    """Of norm sites that are not real: without these, the weights say another model."""

    @abstractmethod
    def read(self, fragments: Sequence[Fragment]) -> None:
        """Fill the fragments' tensors. Raises HarnessError where the source is damaged."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies beside the weights; None where there is none. Raises HarnessError where it is no
        good."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, for formats that must name one: where the model has no limit, what it was
        trained with."""
        return self.section.max_positions or self.sequence_length or UNLIMITED_POSITIONS

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's file lies."""
        return self.path

    @property
    def details(self) -> dict[str, Any]:
        """What a record of the conversion says of the source, as JSON."""
        return {"format": self.format, "path": str(self.path)}

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        """What is wrong with the bytes of the (`share[0]` of `share[1]` shares of the) source, a line each."""
        return []


class LinkedSource(ModelSource):
    """A source of safetensors files with names of its own, which `links` say in terms of ours."""

    def __init__(self, path: Path, section: ModelSection, links: Links, files: Mapping[str, Path]) -> None:
        """`files`: of each of their tensors, the file. Raises HarnessError where names, shapes or dtypes are not those
        that the links have; a file that is no good is a HarnessError as well."""
        self.path, self.section, self.links, self.files = path, section, links, files
        entries: dict[str, TensorEntry] = {}
        for file in sorted(set(files.values())):
            with TensorFile(file) as opened:
                entries |= {name: entry for name, entry in opened.entries.items() if files.get(name) == file}
        self.check_entries(entries)
        dtypes = {entries[name].dtype for name in links.their_shapes}
        self.dtype = next(one for one in READABLE_DTYPES if one in dtypes)

    def check_entries(self, entries: Mapping[str, TensorEntry]) -> None:
        wanted = self.links.their_shapes
        missing = sorted(wanted.keys() - entries.keys())
        extra = sorted(entries.keys() - wanted.keys())
        for names, problem in (
            (missing, "not there, and the model that its configuration describes has"),
            (extra, "there, and the model that its configuration describes has no"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise HarnessError(f"{self.path}: tensor {names[0]}{more}: {problem} such tensors")
        for name, shape in wanted.items():
            entry = entries[name]
            if entry.shape != shape:
                raise HarnessError(
                    f"{self.files[name]}: tensor {name} has shape {entry.shape}, and {shape} by the configuration"
                )
            if entry.dtype not in READABLE_DTYPES:
                raise HarnessError(
                    f"{self.files[name]}: tensor {name} is {entry.format_name}, and only F32, BF16 and F16 can be read"
                )

    def read(self, fragments: Sequence[Fragment]) -> None:
        wanted = self.find(fragments)
        with ExitStack() as stack:
            files = {file: stack.enter_context(TensorFile(file)) for file in {self.files[name] for name in wanted}}
            for name, parts in wanted.items():
                files[self.files[name]].read(name, parts)

    def find(self, fragments: Sequence[Fragment]) -> dict[str, list[tuple[Box, Tensor]]]:
        """Of which boxes of their tensors the fragments are made, each with the view that it goes into."""
        wanted: dict[str, list[tuple[Box, Tensor]]] = defaultdict(list)
        for fragment in fragments:
            box = Box(tuple(fragment.offsets), tuple(fragment.tensor.shape))
            self._check_shape(fragment)
            for link in self.links.by_ours[fragment.name]:
                common = link.our_box.intersect(box)
                if common is not None:
                    target = fragment.tensor.detach()[common.slices_in(box)]
                    wanted[link.theirs].append((link.translate(common), link.as_theirs(target)))
        return wanted

    def _check_shape(self, fragment: Fragment) -> None:
        shape = self.links.our_shapes.get(fragment.name)
        if shape != tuple(fragment.global_shape):
            there = "no such tensor" if shape is None else str(shape)
            raise HarnessError(f"{self.path}: {fragment.name} is {tuple(fragment.global_shape)} here and {there} there")


def fetch_linked(source: ModelSource, links: Links, dtype: torch.dtype, name: str) -> Tensor:
    """One tensor of the format that `links` describe, made of a source of any format; no other is held."""
    tensor = torch.empty(links.their_shapes[name], dtype=torch.float32)
    source.read(
        [
            Fragment(
                link.ours,
                "master",
                links.our_shapes[link.ours],
                link.our_box.offsets,
                link.as_ours(tensor[link.their_box.slices]),
            )
            for link in links.by_theirs[name]
        ]
    )
    return tensor.to(dtype)


def refuse_frozen(source: ModelSource) -> None:
    """Raises HarnessError where a source's norms are not those that its section and weights say."""
    if source.norm_states:
        count = len(norm_sites(source.section))
        raise HarnessError(
            f"{source.path}: norm removal has changed {len(source.norm_states)} of its {count} norm sites, which its "
            f"weights do not say: fold it first, once all are frozen, or take an earlier checkpoint"
        )


def decoder_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """The global shape of every parameter, without padding rows; a tied head has none of its own."""
    with torch.device("meta"):
        model = Decoder(section, LossSection())
    return {name: place.global_shape for name, place in model.placements().items()}
