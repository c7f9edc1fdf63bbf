"""How many directions of an activation a model needs: splice in its projection on the first principal components.

python tools/splice_pca.py runs/NAME layers.3.residual_after pca.json --ranks 1 8 64

Components are fitted on windows of the training split, and spliced in on windows of the validation split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.cli import load_trained
from harness.config import HarnessError
from harness.data import IGNORED, Batch, EvaluationWindows, prepare_for_training
from harness.evaluate import restore, splice
from harness.model import Decoder, spliced, tap_sites
from harness.parallel import ParallelLayout


class Components:
    """The principal components of the activations at a site, heads side by side, on a model that is not divided."""

    def __init__(self, model: Decoder, site: str, batches: Iterable[Batch]) -> None:
        """Fitted on the tokens that have a target, in fp64. Raises HarnessError where there are fewer than two."""
        self.tokens = 0
        total: Any = 0.0
        products: Any = 0.0

        def add(x: Tensor) -> Tensor:
            nonlocal total, products
            rows = x.flatten(2)[batch.targets != IGNORED].double()
            total, products = total + rows.sum(0), products + rows.T @ rows
            self.tokens += len(rows)
            return x

        if site not in tap_sites(model):
            splice(model, {site: add}, [])  # says which sites there are
        with torch.no_grad(), spliced(model, {site: add}):
            for batch in batches:
                model.hidden_states(batch.tokens, batch.positions, batch.document_ids)
        if self.tokens < 2:
            raise HarnessError(f"{site}: {self.tokens} tokens are too few to fit components on; take more windows")
        mean = total / self.tokens
        values, vectors = torch.linalg.eigh(products / self.tokens - torch.outer(mean, mean))
        self.variances = values.flip(0).clamp(min=0.0)
        """Of each component, the largest first, fp64 (width,)."""
        self._mean, self._vectors = mean.float(), vectors.flip(1).float()

    @property
    def width(self) -> int:
        return len(self.variances)

    def explained(self, rank: int) -> float:
        """The share of the variance that the first `rank` components have."""
        return float(self.variances[:rank].sum() / self.variances.sum())

    def projection(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Keeps the mean and the first `rank` components of (batch, sequence, ...)."""
        return partial(_project, self._mean, self._vectors[:, :rank])


def _project(mean: Tensor, basis: Tensor, x: Tensor) -> Tensor:
    rows = x.flatten(2).float() - mean
    return (mean + (rows @ basis) @ basis.T).view(x.shape).to(x.dtype)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, splice, print the table; what goes into the file."""
    folder, settings = load_trained(str(arguments.run), arguments.overrides)
    if settings.data is None:
        raise HarnessError(f"{arguments.run}: has no data section; say data.corpora=... and data.folder=...")
    data = settings.data
    with ParallelLayout(settings.parallel.on_one_process()) as layout:
        restored = restore(folder, device=layout.device)
        prepared = prepare_for_training(data)
        if prepared.tokenizer.fingerprint != restored.tokenizer.fingerprint:
            raise HarnessError(f"{prepared.folder}: tokenized with another tokenizer than {restored.folder} has")

        def windows(split: str, count: int) -> EvaluationWindows:
            return EvaluationWindows(prepared, data, split, arguments.batch_size, limit_samples=count)

        fitted = (batch.to(layout.device) for _, batch in windows("train", arguments.fit_windows))
        components = Components(restored.model, arguments.site, fitted)
        ranks = arguments.ranks or [2**power for power in range(0, components.width.bit_length(), 2)]
        wrong = [rank for rank in ranks if not 0 < rank <= components.width]
        if wrong:
            raise HarnessError(f"--ranks: {wrong[0]} is not between 1 and {components.width}, the width of this site")
        result = splice(
            restored.model,
            {f"rank {rank}": {arguments.site: components.projection(rank)} for rank in ranks},
            windows("validation", arguments.windows),
            skip_first=arguments.skip_first,
            skip_last=arguments.skip_last,
        )
    explained = {f"rank {rank}": components.explained(rank) for rank in ranks}
    shares = ", ".join(f"{name} {share:.2%}" for name, share in explained.items())
    print(f"{arguments.site}: components of {components.tokens:,} training tokens; variance explained: {shares}")
    print("\n".join(result.table()))
    return {
        "run": str(restored.folder),
        "step": restored.step,
        "site": arguments.site,
        "width": components.width,
        "fitted_tokens": components.tokens,
        "explained": explained,
        "splice": result.as_json(),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Exit status 1, and one line, for what cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, or another model's with a data section in the overrides")
    parser.add_argument("site", help="for example layers.0.mlp_out; a wrong name lists them")
    parser.add_argument("json", type=Path, help="the file to write")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="K", help="default: 1, 4, 16, ... up to the width")
    parser.add_argument("--fit-windows", type=int, default=512, metavar="N", help="a corpus, spread over the split")
    parser.add_argument("--windows", type=int, default=512, metavar="N", help="a corpus, to splice on")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--skip-first", type=int, default=0, metavar="N", help="tokens of a window that are not scored")
    parser.add_argument("--skip-last", type=int, default=0, metavar="N")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value")
    arguments = parser.parse_args(words)
    try:
        if not arguments.json.resolve().parent.is_dir():
            raise HarnessError(f"{arguments.json}: lies in no folder that exists; make it first")
        found = run(arguments)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 1
    arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
