"""Folders as `transformers` writes and reads them: config.json, safetensors, a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.checkpoint import Box, StoredFile, TensorEntry, TensorFile, write_tensor_file
from harness.config import HarnessError
from harness.data import Tokenizer
from harness.model import ModelSection
from harness.parallel import Fragment

from .hf_config import read_config, write_config
from .records import read_json, verify_record, write_json
from .rules import link_names
from .source import READABLE_DTYPES, LinkedSource, ModelSource, decoder_shapes, fetch_linked
from .stand_ins import StandIns, epsilon_for
from .tokenizers import export_tokenizer, import_tokenizer

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000
_PICKLED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.ckpt",
    "consolidated.00.pth",
    "flax_model.msgpack",
)
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that old versions of transformers saved as if they were weights."""


def is_huggingface(path: Path) -> bool:
    """Whether a folder says that it is one: by a config.json with an architecture or a model type."""
    if not (path / CONFIG).is_file():
        return False
    return not {"architectures", "model_type"}.isdisjoint(read_json(path / CONFIG))


class HuggingFaceSource(LinkedSource):
    """The model in a folder. Raises HarnessError, naming file and key or tensor, where it is not one of ours."""

    format = "Hugging Face"

    def __init__(self, path: Path) -> None:
        self.config = read_json(path / CONFIG)
        architecture, section = read_config(self.config, str(path / CONFIG))
        self._stand_ins: StandIns | None = None
        if section.norm_free:
            self._stand_ins = StandIns.of(architecture.rows, section, section.norm_epsilon)
            section = section.model_copy(update={"norm_epsilon": ModelSection.model_fields["norm_epsilon"].default})
        links = link_names(architecture.rows, section, decoder_shapes(section))
        files = _find_tensors(path)
        # The first releases of GPT-2's weights have no prefix.
        prefix = next((row.theirs.partition(".")[0] + "." for row in architecture.rows), "")
        if not any(name.startswith(prefix) for name in files):
            links = links.renamed(lambda name: name.removeprefix(prefix))
            self._stand_ins = None if self._stand_ins is None else self._stand_ins.renamed(prefix)
        self._tokenizer: Tokenizer | None = None
        super().__init__(path, section, links, files)

    def check_entries(self, entries: Mapping[str, TensorEntry]) -> None:
        kept = {name: entry for name, entry in entries.items() if not name.endswith(_BUFFERS)}
        if self.section.tied_head and "lm_head.weight" in kept:
            self._check_copy(kept, "lm_head.weight", self.links.by_ours["token_embedding.weight"][0].theirs)
            del kept["lm_head.weight"]
        if self._stand_ins is not None:
            self._check_stand_ins(self._stand_ins, kept)
            kept = {name: entry for name, entry in kept.items() if name not in self._stand_ins.constants}
        super().check_entries(kept)

    def read(self, fragments: Sequence[Fragment]) -> None:
        super().read(fragments)
        for fragment in fragments:
            if self._stand_ins is not None and fragment.name == "final_norm.weight":
                fragment.tensor.detach().div_(self._stand_ins.scale)

    def _check_stand_ins(self, stand_ins: StandIns, entries: Mapping[str, TensorEntry]) -> None:
        """That what its epsilon says holds: that its norms are there for show."""
        for name, (value, shape) in stand_ins.constants.items():
            entry = entries.get(name)
            found = None
            if entry is not None and entry.shape == shape and entry.dtype in READABLE_DTYPES:
                found = torch.empty(shape)
                with TensorFile(self.files[name]) as file:
                    file.read(name, [(Box((0,), shape), found)])
            if found is None or not bool((found == value).all()):
                raise HarnessError(
                    f"{self.path}: tensor {name}: an epsilon of {stand_ins.epsilon:.0f} in {CONFIG} means a model "
                    f"without norms, and this must then be {value:.0f} all over"
                )

    def _check_copy(self, entries: Mapping[str, TensorEntry], copy: str, original: str) -> None:
        """Some writers save a tied head a second time; then it must be the embedding."""
        if original not in self.files:
            return  # which is said of it
        if (entries[copy].dtype, entries[copy].shape) != (entries[original].dtype, entries[original].shape):
            kinds = [f"{entries[name].format_name} {entries[name].shape}" for name in (copy, original)]
            raise HarnessError(
                f"{self.files[copy]}: tensor {copy} is {kinds[0]} and {original} {kinds[1]}, although {CONFIG} says "
                f"tie_word_embeddings, so that transformers reads the latter for both; remove the former"
            )
        digests = []
        for name in (copy, original) if entries[copy].dtype in READABLE_DTYPES else ():
            with TensorFile(self.files[name]) as file:
                digests.append(file.digest(name))
        if len(set(digests)) > 1:
            raise HarnessError(
                f"{self.files[copy]}: tensor {copy} is not {original}, although {CONFIG} says tie_word_embeddings: "
                f"set it to false there, or remove the tensor"
            )

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        return verify_record(self.path, share)

    @property
    def tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None:
            self._tokenizer = import_tokenizer(self.path, self.config)
        return self._tokenizer


def _find_tensors(path: Path) -> dict[str, Path]:
    """The file of every tensor, by the index where there are several files. Raises HarnessError.

    Where there is both an index and a single file, transformers reads the latter.
    """
    if (path / SINGLE).is_file():
        with TensorFile(path / SINGLE) as opened:
            return dict.fromkeys(opened.entries, path / SINGLE)
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        try:
            files = {str(name): path / str(file) for name, file in index["weight_map"].items()}
        except (TypeError, KeyError, AttributeError):
            raise HarnessError(f"{path / INDEX}: has no weight_map of tensors to files") from None
        for name, file in files.items():
            if file.parent != path or not file.name.endswith(".safetensors"):
                raise HarnessError(
                    f"{path / INDEX}: {name} lies in {file.name!r}, which is no safetensors file beside it"
                )
            if not file.is_file():
                raise HarnessError(f"{file}: no such file, and {INDEX} says that it holds {name}")
        for file in sorted(set(files.values())):
            with TensorFile(file) as opened:
                for name in opened.entries:
                    if files.setdefault(name, file) != file:
                        raise HarnessError(f"{file}: tensor {name} lies in {files[name].name} too, by {INDEX}")
                for name in (name for name, place in files.items() if place == file and name not in opened.entries):
                    raise HarnessError(f"{file}: has no tensor {name}, which {INDEX} places there")
        return files
    pickled = next((name for name in _PICKLED if (path / name).exists()), None)
    if pickled is not None:
        raise HarnessError(
            f"{path / pickled}: pickled weights can run any code when they are read, and are not; save them as "
            f"safetensors (in transformers: model.save_pretrained(folder))"
        )
    raise HarnessError(f"{path}: has neither {SINGLE} nor {INDEX}")


def write_huggingface(
    folder: Path, source: ModelSource, dtype: torch.dtype, *, max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, StoredFile]:
    """Write the model of `source` into `folder`, which is there and empty; sizes and digests of the weights' files.

    Raises HarnessError where transformers cannot express the model.
    """
    section, tokenizer = source.section.model_copy(update={"max_positions": source.longest}), source.tokenizer
    eod = None if tokenizer is None else tokenizer.eod
    if section.norm_free:
        section = section.model_copy(update={"norm_epsilon": epsilon_for(section, dtype)})
    architecture, config = write_config(section, str(dtype).removeprefix("torch."), eod)
    links = link_names(architecture.rows, section, decoder_shapes(section))
    stand_ins = StandIns.of(architecture.rows, section, section.norm_epsilon) if section.norm_free else None

    def fetch(name: str) -> Tensor:
        if stand_ins is not None and name in stand_ins.constants:
            return stand_ins.constant(name, dtype)
        tensor = fetch_linked(source, links, dtype, name)
        return tensor if stand_ins is None or name != stand_ins.final else stand_ins.scaled(tensor)

    shapes = links.their_shapes | ({} if stand_ins is None else stand_ins.shapes)
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in sizes.items():
        if groups[-1] and sum(other.nbytes for other in groups[-1].values()) + tensor.nbytes > max_file_bytes:
            groups.append({})
        groups[-1][name] = tensor
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE]
    written = {
        name: write_tensor_file(folder / name, group, fetch=fetch, metadata={"format": "pt"})
        for name, group in zip(names, groups, strict=True)
    }
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in sizes.values())
        places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    write_json(folder / CONFIG, config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder, max_length=section.max_positions)
    return written
