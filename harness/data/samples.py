"""One corpus as an endless, shuffled series of samples, through megatron-core's GPTDataset."""

from __future__ import annotations

from typing import Any

import torch

from harness.config import HarnessError
from harness.parallel import derive_seed

from .megatron import import_gpt_dataset, quiet_megatron
from .prepared import PreparedSplit
from .tokenizer import Tokenizer


class CorpusSamples:
    """Epoch after epoch of one corpus's training split.

    Each epoch is a GPTDataset over all documents, shuffled by a seed of its own that comes from (seed, corpus, epoch).
    So sample n is a function of these and of n, whatever was read before and however long the run is. An epoch has
    (tokens - 1) // sequence_length samples; the few tokens that are left over differ from epoch to epoch.
    """

    def __init__(self, split: PreparedSplit, tokenizer: Tokenizer, sequence_length: int, seed: int) -> None:
        """`split` holds more than `sequence_length` tokens."""
        self.samples_per_epoch = (split.tokens - 1) // sequence_length
        self._split = split
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._seed = seed
        self._epoch = -1
        self._dataset: Any = None

    def read(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of sample `number`, int64 [S] each. HarnessError for an id outside the vocabulary."""
        epoch, place = divmod(number, self.samples_per_epoch)
        if epoch != self._epoch:
            self._dataset = self._build(epoch)
            self._epoch = epoch
        sample = self._dataset[place]
        tokens, targets = sample["tokens"], sample["labels"]
        highest = max(int(tokens.max()), int(targets[-1]))
        if highest >= self._tokenizer.vocab_size:
            raise HarnessError(
                f"corpus {self._split.corpus!r}: {self._split.prefix}.bin holds token id {highest}, the tokenizer has "
                f"{self._tokenizer.vocab_size} ids; set data.tokenizer to the one it was made with"
            )
        return tokens, targets

    def _build(self, epoch: int) -> Any:
        module = import_gpt_dataset()
        split = self._split
        config = module.GPTDatasetConfig(
            random_seed=derive_seed(self._seed, "data", split.corpus, epoch)
            % 2**32,  # numpy's RandomState takes 32 bits
            sequence_length=self._sequence_length,
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sequences = split.indexed.sequences(split.first_document, split.first_document + split.documents)
        train = module.Split.train
        with quiet_megatron():
            # Without a cache path every rank builds the same small index in memory, so none waits for another.
            dataset = module.GPTDataset(split.indexed.dataset, None, sequences, None, train, config)
        assert len(dataset) == self.samples_per_epoch
        return dataset
