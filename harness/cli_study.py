"""The arguments of `harness study`, and what each action calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.config.errors import ConfigError

ACTIONS = {
    "plan": "what it will train, and what that costs",
    "run": "do what is missing; the same command goes on after a kill, and further ones share the work",
    "status": "how much is done, and about how long the rest takes",
    "report": "tables and plots of what is done so far",
    "fit": "a scaling law to csv or jsonl files or runs; or the laws that a study's runs follow",
    "prior": "of finished runs, what forecasts of others need: how the loss falls, and what annealing gains",
    "whatif": "the final loss of a run, finished or not, under another schedule or an earlier annealing",
}
LAWS = "power, chinchilla, isoflop, overtraining, annealing, encoder-decoder"


def add_actions(command: argparse.ArgumentParser, add_target: Callable[[argparse.ArgumentParser, str], None]) -> None:
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, summary in ACTIONS.items():
        parser = actions.add_parser(action, help=summary, description=summary)
        if action == "fit":
            _add_fit(parser)
        elif action == "prior":
            parser.add_argument(
                "runs", nargs="+", type=Path, metavar="RUN", help="run folders of one model and peak rate"
            )
            parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it (JSON)")
        elif action == "whatif":
            add_target(parser, "a run folder; overrides: keys of schedule, and train.steps")
            _add_whatif(parser)
        else:
            add_target(parser, "a file such as those in configs/studies/")
        if action in ("prior", "whatif"):
            losses = ("auto", "training", "validation")
            parser.add_argument("--loss", dest="kind", choices=losses, default="auto", help="which loss; default: auto")


def _add_whatif(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--anneal-at", type=_whole, metavar="STEP", help="let the rate fall from there ...")
    parser.add_argument("--over", type=_whole, metavar="STEPS", help="... within so many steps")
    parser.add_argument("--prior", dest="prior_file", type=Path, metavar="FILE", help="of `harness study prior`")
    parser.add_argument("--from", dest="earlier", nargs="+", type=Path, default=(), metavar="RUN", help="or these")
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("law", metavar="LAW", help=f"{LAWS}; or a file such as configs/studies/ladder.yaml")
    parser.add_argument(
        "data", nargs="*", metavar="DATA", help="csv or jsonl files, or run folders; of a study: overrides"
    )
    parser.add_argument(
        "--column", dest="columns", action="append", default=[], metavar="NAME=FORMULA",
        help="a column of the law that the data call otherwise, or that is computed: "
        "'tokens={Training FLOP} / (6 * {Model Size})'",
    )  # fmt: skip
    parser.add_argument(
        "--count", choices=("non-embedding", "all", "without-head"), default="non-embedding",
        help="which parameters of run folders; default: non-embedding",
    )  # fmt: skip
    parser.add_argument("--group", metavar="COLUMN", help="rows with one value in it (a run's) are resampled together")
    parser.add_argument("--drop-highest", type=_whole, default=0, metavar="K", help="leave out the K highest losses")
    parser.add_argument("--delta", type=float, default=1e-3, help="of Huber's loss of log losses; default: 1e-3")
    parser.add_argument("--decay", type=float, default=0.999, help="annealing: of the momentum; default: 0.999")
    parser.add_argument("--warmup", metavar="STEPS,PEAK", help="annealing: a linear warm-up before the record begins")
    parser.add_argument(
        "--flops", action="append", type=float, default=[], metavar="C", help="chinchilla: share out this budget"
    )
    parser.add_argument(
        "--given", metavar="A=..,B=..,E=..,alpha=..,beta=..",
        help="chinchilla: no fit, but what these published parameters say of --flops",
    )  # fmt: skip
    parser.add_argument("--no-hold-out", action="store_true", help="do not predict the largest size from the others")
    parser.add_argument("--resamples", type=_whole, default=1000, help="of the bootstrap; default: 1000")
    parser.add_argument("--seed", type=_whole, default=0, help="of the bootstrap; default: 0")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write fit.json and fit.html there")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON, for programs")


def run_fit(
    law: str,
    data: Sequence[str],
    find_file: Callable[[str], Path],
    *,
    given: str | None = None,
    no_hold_out: bool = False,
    out: Path | None = None,
    as_json: bool = False,
    **options: Any,
) -> None:
    """`fit` of a law to data, or of a study."""
    from harness import studies

    if law.endswith((".yaml", ".yml")):
        studies.fit(find_file(law), data)
        return
    from harness.studies import fitting

    if law not in fitting.LAW_NAMES:
        raise ConfigError(f"{law!r} is neither a law ({LAWS}) nor a study's .yaml file")
    if given is not None:
        if law != "chinchilla" or data:
            raise ConfigError("--given: is for the law chinchilla, without data")
        fitting.show_given(given, options["flops"], as_json)
        return
    if not data:
        raise ConfigError(f"no data for the law {law}: give csv or jsonl files, or run folders")
    options["columns"], options["flops"] = tuple(options["columns"]), tuple(options["flops"])
    chosen = fitting.FitOptions(held_out=not no_hold_out, **options)
    fitting.show_fit(law, [Path(path) for path in data], chosen, out, as_json)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
