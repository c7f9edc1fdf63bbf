"""tools/splice_pca.py: its components beside numpy's SVD, and a full basis beside the identity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.data import EvaluationWindows, prepare
from harness.evaluate import restore
from harness.model import spliced
from harness.settings import Settings
from harness.train import train
from tests.small_run import small_settings

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import splice_pca


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    settings = small_settings(tmp_path_factory.mktemp("pca"), data={"mask_after_end_of_text": True})
    return train(settings).folder, settings


@pytest.mark.parametrize("site", ["layers.0.residual_after", "layers.1.v"])
def test_components_are_those_of_the_svd(run: tuple[Path, Settings], site: str) -> None:
    folder, settings = run
    model = restore(folder).model
    batches = [b for _, b in EvaluationWindows(prepare(settings.data), settings.data, "train", 3, limit_samples=7)]
    components = splice_pca.Components(model, site, batches)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), spliced(model, {site: lambda x: seen.append(x) or x}):
        for batch in batches:
            model.logits(batch.tokens)
    rows = np.concatenate([x.flatten(2)[b.targets >= 0].numpy() for x, b in zip(seen, batches, strict=True)])
    rows = rows.astype(np.float64)
    mean = rows.mean(0)
    _, scales, directions = np.linalg.svd(rows - mean, full_matrices=False)
    assert components.tokens == len(rows)
    assert components.variances.numpy() == pytest.approx(scales**2 / len(rows), rel=1e-6, abs=1e-12)
    assert components.explained(5) == pytest.approx((scales[:5] ** 2).sum() / (scales**2).sum(), rel=1e-6)
    some = torch.randn_like(seen[0])
    flat = some.flatten(2).double().numpy() - mean
    expected = mean + flat @ directions[:5].T @ directions[:5]
    found = components.projection(5)(some)
    assert (found.shape, found.dtype) == (some.shape, some.dtype)
    assert found.flatten(2).numpy() == pytest.approx(expected, abs=2e-5)


def test_a_full_basis_changes_next_to_nothing(
    run: tuple[Path, Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = run
    capsys.readouterr()
    words = [
        str(folder),
        "layers.1.residual_before",
        str(tmp_path / "pca.json"),
        "--ranks",
        "1",
        "32",
        "--windows",
        "6",
    ]
    assert splice_pca.main([*words, "--skip-first", "2", "--skip-last", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    saved = json.loads((tmp_path / "pca.json").read_text())
    arms = saved["splice"]["arms"]
    assert [line.split("  ")[0] for line in out[-5:]] == ["rank 1", "rank 32", "identity", "zero", "mean"] == list(arms)
    assert abs(arms["rank 32"]["delta"]) < 1e-5 < 1e-3 < abs(arms["rank 1"]["delta"])
    assert saved["explained"]["rank 32"] == pytest.approx(1.0)
    assert arms["identity"]["delta"] == 0.0
    assert saved["splice"]["tokens"] <= 6 * 2 * (settings.data.sequence_length - 3)
    assert (saved["width"], saved["step"], saved["run"]) == (32, 8, str(folder))


def test_what_cannot_be_done_is_one_line(
    run: tuple[Path, Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = str(run[0]), str(tmp_path / "x.json")
    for words, said in [
        ([folder, "layers.7.v", file], "'layers.7.v' is no site of this model; sites are layers.0 to layers.1"),
        ([folder, "layers.0.v", file, "--ranks", "33"], "--ranks: 33 is not between 1 and 32"),
        ([folder, "layers.0.v", str(tmp_path / "no" / "x.json")], "lies in no folder that exists"),
    ]:
        capsys.readouterr()
        assert splice_pca.main(words) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
        assert len(lines) == 1
    assert not Path(file).exists()
