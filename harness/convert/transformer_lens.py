"""The state of TransformerLens's HookedTransformer, in a folder: its tensors as safetensors, its configuration as JSON.

With TransformerLens up to 3:

    cfg = HookedTransformerConfig.from_dict(json.load(open("hooked_transformer_config.json")))
    model = HookedTransformer(cfg)
    model.load_state_dict(load_file("model.safetensors"), strict=False)

Every parameter is there, norms not folded (a model without norms: transformer_lens_free.py). What `strict=False` leaves
as it is are buffers that the model has made of its configuration (masks, rotary tables), whose shapes differ between
releases. load_and_process_state_dict, which folds and centres, takes the same file. TransformerLens 4 has no
HookedTransformer: it takes models with learned positions by boot_native and convert_tl_checkpoint, and others as
Hugging Face folders, by boot_transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from harness.checkpoint import Box, StoredFile, TensorEntry, TensorFile, write_tensor_file
from harness.config import HarnessError
from harness.data import Tokenizer
from harness.model import ModelSection

from .links import Link, Links
from .records import read_json, verify_record, write_json
from .rules import Row, Rule, Share, heads, link_names, transposed, whole
from .source import READABLE_DTYPES, LinkedSource, ModelSource, decoder_shapes, fetch_linked
from .tokenizers import export_tokenizer, import_tokenizer
from .transformer_lens_config import as_section, read_config, write_config
from .transformer_lens_free import B_U, W_U, check_unembed, free_rows, make_unembed, unembed_shapes

CONFIG = "hooked_transformer_config.json"
TENSORS = "model.safetensors"
_BUFFERS = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos")
_SAID = "model."
"""What keys of the metadata begin with: they are those of our section."""
_BLOCK_ELEMENTS = 2 << 20


def _by_head(part: str) -> Rule:
    """One (hidden, width) matrix, or bias of that width, for each query, key or value head."""

    def rule(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
        width, rest = section.head_width, shape[1:]
        for ours, theirs, _ in heads(part)(section, shape):
            for row in range(0, ours.shape[0], width):
                head = (theirs.offsets[0] + row) // width
                our_box = Box((ours.offsets[0] + row, *ours.offsets[1:]), (width, *rest))
                yield our_box, Box((head, *ours.offsets[1:], 0), (1, *rest, width)), bool(rest)

    return rule


def _from_heads(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
    """One (width, hidden) matrix for each head, of our (hidden, heads x width)."""
    width, hidden = section.head_width, shape[0]
    for head in range(section.heads):
        yield Box((0, head * width), (hidden, width)), Box((head, 0, 0), (1, width, hidden)), True


NAMES = (
    Row("token_embedding.weight", "embed.W_E"),
    Row("position_embedding.weight", "pos_embed.W_pos"),
    Row("layers.{i}.attention_norm.weight", "blocks.{i}.ln1.w"),
    Row("layers.{i}.attention_norm.bias", "blocks.{i}.ln1.b"),
    *(
        Row(f"layers.{{i}}.attention.qkv.{kind}", f"blocks.{{i}}.attn.{letter}_{part.upper()}", _by_head(part))
        for part in "qkv"
        for kind, letter in (("weight", "W"), ("bias", "b"))
    ),
    Row("layers.{i}.attention.q_norm.weight", "blocks.{i}.attn.q_norm.w"),
    Row("layers.{i}.attention.k_norm.weight", "blocks.{i}.attn.k_norm.w"),
    Row("layers.{i}.attention.output.weight", "blocks.{i}.attn.W_O", _from_heads),
    Row("layers.{i}.attention.output.bias", "blocks.{i}.attn.b_O"),
    Row("layers.{i}.mlp_norm.weight", "blocks.{i}.ln2.w"),
    Row("layers.{i}.mlp_norm.bias", "blocks.{i}.ln2.b"),
    Row("layers.{i}.mlp.gate.weight", "blocks.{i}.mlp.W_gate", transposed),
    Row("layers.{i}.mlp.up.weight", "blocks.{i}.mlp.W_in", transposed),
    Row("layers.{i}.mlp.up.bias", "blocks.{i}.mlp.b_in"),
    Row("layers.{i}.mlp.down.weight", "blocks.{i}.mlp.W_out", transposed),
    Row("layers.{i}.mlp.down.bias", "blocks.{i}.mlp.b_out"),
    Row("final_norm.weight", "ln_final.w"),
    Row("final_norm.bias", "ln_final.b"),
    Row("head.weight", "unembed.W_U", transposed),
)


def link_state(section: ModelSection, *, grouped: bool) -> Links:
    """Their state in terms of our parameters. grouped: their configuration has n_key_value_heads."""
    rows = free_rows(NAMES) if section.norm_free else NAMES
    links = link_names(rows, section, decoder_shapes(section))
    return links.renamed(_grouped_name) if grouped else links


def zero_biases(section: ModelSection, *, grouped: bool) -> dict[str, tuple[int, ...]]:
    """The biases that every HookedTransformer has and this model does not, by name, and their shapes."""
    keys = (section.key_value_heads, section.head_width)
    block: dict[str, tuple[int, ...]] = {}
    if not section.has_qkv_bias:
        block |= {"attn.b_Q": (section.heads, section.head_width), "attn.b_K": keys, "attn.b_V": keys}
    if not section.bias:
        hidden = (section.hidden_size,)
        block |= {"attn.b_O": hidden, "mlp.b_in": (section.mlp_width,), "mlp.b_out": hidden}
    assert section.vocab_size is not None
    biases: dict[str, tuple[int, ...]] = {} if section.norm_free else {"unembed.b_U": (section.vocab_size,)}
    for number in range(section.layers):
        biases |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return {_grouped_name(name): shape for name, shape in biases.items()} if grouped else biases


def _grouped_name(name: str) -> str:
    """GroupedQueryAttention keeps keys and values under names of their own, once a group."""
    return re.sub(r"\.([Wb]_[KV])$", r"._\1", name)


def is_transformer_lens(path: Path) -> bool:
    """Whether a folder has a HookedTransformer's configuration."""
    return (path / CONFIG).is_file()


class TransformerLensSource(LinkedSource):
    """A HookedTransformer's state. Raises HarnessError, naming file and key or tensor, where it is none of ours.

    Biases that the decoder has no place for must be zero. Which it has a place for is said in the tensors' metadata
    where harness wrote them. Where not, an MLP without a gate has them all, as GPT-2 has; one with a gate has none but
    those of queries, keys and values, if one of them is not zero (Qwen 2).
    """

    format = "TransformerLens"

    def __init__(self, path: Path) -> None:
        label = str(path / CONFIG)
        config = read_json(path / CONFIG)
        values = read_config(config, label)
        file = _find_tensors(path)
        with TensorFile(file) as opened:
            names = list(opened.entries)
            said = _said(file) or _guess_biases(opened, gated=values["activation"] == "swiglu")
        if values.get("norm_free") and "norm" not in said:
            raise HarnessError(
                f"{label}: normalization_type is None, and what the final norm was is not in {file.name}: such a model "
                f"can be read where harness wrote it"
            )
        section = as_section(values | said, label)
        self._grouped = config.get("n_key_value_heads") is not None
        self._tokenizer: Tokenizer | None = None
        super().__init__(path, section, link_state(section, grouped=self._grouped), dict.fromkeys(names, file))

    def check_entries(self, entries: Mapping[str, TensorEntry]) -> None:
        zeros = zero_biases(self.section, grouped=self._grouped)
        free = self.section.norm_free
        copied = self.section.tied_head and "unembed.W_U" in entries and not free
        aside = {"unembed.W_U", *zeros} if copied else {*zeros, *(unembed_shapes(self.section) if free else ())}
        super().check_entries(
            {name: entry for name, entry in entries.items() if name not in aside and not name.endswith(_BUFFERS)}
        )
        file = self.path / TENSORS
        with TensorFile(file) as opened:
            for name in sorted(zeros.keys() & entries.keys()):
                if entries[name].shape != zeros[name] or not _is_zero(opened, name):
                    raise HarnessError(
                        f"{file}: tensor {name} must be zeros of shape {zeros[name]}, or left out: the decoder has no "
                        f"such bias in this model"
                    )
            if copied and not _is_transposed(opened, "unembed.W_U", "embed.W_E"):
                raise HarnessError(
                    f"{file}: tensor unembed.W_U is not embed.W_E transposed, although {CONFIG} says "
                    f"tie_word_embeddings: set it to false there"
                )
            dtype = entries["embed.W_E"].dtype
            assert dtype is not None  # by the check above
            wrong = check_unembed(self, opened, dtype) if free else None
            if wrong is not None:
                raise HarnessError(
                    f"{file}: tensor {wrong} is not what the tensors harness.… beside it make: it was changed, and "
                    f"those alone could be read"
                )

    def verify(self, share: tuple[int, int] = (0, 1)) -> list[str]:
        return verify_record(self.path, share)

    @property
    def tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None:
            self._tokenizer = import_tokenizer(self.path, {})
        return self._tokenizer


def _find_tensors(path: Path) -> Path:
    if (path / TENSORS).is_file():
        return path / TENSORS
    pickled = next((file for file in sorted(path.iterdir()) if file.suffix in (".pt", ".pth", ".bin", ".ckpt")), None)
    if pickled is not None:
        raise HarnessError(
            f"{pickled}: pickled weights can run any code when they are read, and are not; save them with "
            f"safetensors.torch.save_file(model.state_dict(), '{TENSORS}')"
        )
    raise HarnessError(f"{path}: has no {TENSORS}")


def _said(file: Path) -> dict[str, Any] | None:
    """What the tensors' metadata says of our section; None where harness did not write them."""
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata() or {}
    keys = ("bias", "qkv_bias")
    if not all(_SAID + key in said for key in keys):
        return None
    norm = {"norm": said[_SAID + "norm"]} if _SAID + "norm" in said else {}
    return {key: said[_SAID + key] == "true" for key in keys} | norm


def _guess_biases(file: TensorFile, *, gated: bool) -> dict[str, bool]:
    qkv = [name for name in file.entries if name.endswith(("b_Q", "b_K", "b_V"))]
    if gated:
        return {"bias": False, "qkv_bias": not all(_is_zero(file, name) for name in qkv)}
    return {"bias": any(name.endswith((".b_O", ".b_in", ".b_out")) for name in file.entries), "qkv_bias": bool(qkv)}


def _is_zero(file: TensorFile, name: str) -> bool:
    entry = file.entries[name]
    if entry.dtype not in READABLE_DTYPES:
        return False
    values = torch.empty(entry.shape, dtype=entry.dtype)
    file.read(name, [(Box((0,) * len(entry.shape), entry.shape), values)])
    return not values.any()


def _is_transposed(file: TensorFile, copy: str, original: str) -> bool:
    """Whether one matrix is the other transposed; they are read in blocks."""
    one, other = file.entries[copy], file.entries[original]
    if one.shape != other.shape[::-1] or not {one.dtype, other.dtype} <= set(READABLE_DTYPES):
        return False
    rows, columns = one.shape
    step = max(_BLOCK_ELEMENTS // columns, 1)
    for start in range(0, rows, step):
        box = Box((start, 0), (min(step, rows - start), columns))
        first, second = torch.empty(box.shape), torch.empty(box.shape)
        file.read(copy, [(box, first)])
        file.read(original, [(Box(box.offsets[::-1], box.shape[::-1]), second.mT)])
        if not torch.equal(first, second):
            return False
    return True


def write_transformer_lens(folder: Path, source: ModelSource, dtype: torch.dtype) -> dict[str, StoredFile]:
    """Write the model of `source` into `folder`, which is there and empty; size and digest of the tensors' file.

    A tied head is written out: their model has a W_U of its own. Raises HarnessError where a HookedTransformer cannot
    express the model.
    """
    section, tokenizer = source.section.model_copy(update={"max_positions": source.longest}), source.tokenizer
    config = write_config(section)
    grouped = config["n_key_value_heads"] is not None
    links, zeros = link_state(section, grouped=grouped), zero_biases(section, grouped=grouped)
    shapes = links.their_shapes | zeros
    copied: dict[str, Links] = {}
    if section.norm_free:
        shapes |= unembed_shapes(section)
    elif section.tied_head:
        box = whole(links.our_shapes["token_embedding.weight"])
        their_box = whole(box.shape[::-1])
        copied["unembed.W_U"] = Links([Link("token_embedding.weight", box, "unembed.W_U", their_box, transposed=True)])
        shapes |= copied["unembed.W_U"].their_shapes

    def fetch(name: str) -> Tensor:
        if name in zeros:
            return torch.zeros(zeros[name], dtype=dtype)
        if section.norm_free and name in (W_U, B_U):
            return make_unembed(source, name, dtype)
        return fetch_linked(source, copied.get(name, links), dtype, name)

    said = {"bias": str(section.bias).lower(), "qkv_bias": str(section.has_qkv_bias).lower()}
    if section.norm_free:
        said["norm"] = section.norm
    written = write_tensor_file(
        folder / TENSORS,
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
        fetch=fetch,
        metadata={"format": "pt", **{_SAID + key: value for key, value in said.items()}},
    )
    write_json(folder / CONFIG, config)
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder, max_length=section.max_positions)
    return {TENSORS: written}
