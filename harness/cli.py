"""`harness VERB CONFIG [section.key=value ...]`. Each verb is an importable function; nothing heavy is imported for
--help."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import __version__, cli_study, stop
from harness.config.errors import ConfigError, HarnessError

if TYPE_CHECKING:
    from harness.model_folder import ModelFolderSettings
    from harness.settings import Settings

Verb = Callable[..., int | None]
"""What it returns is the exit status; None is 0."""

CHECKPOINT_ACTIONS = {
    "list": "a line a checkpoint, oldest first: when, how large, by which layout, whole or not",
    "show": "what a checkpoint holds: its state, and a table of its tensors",
    "latest": "the step of the newest good checkpoint, or an empty line",
    "path": "the run folder",
    "verify": "read every byte; exit status 1 where anything is damaged",
    "prune": "delete what checkpoint.keep_last, keep_every_steps and keep_best do not keep; of a run at rest",
}


def config(target: str, overrides: Sequence[str]) -> None:
    """print the resolved configuration, every key documented; of a Hugging Face folder the model section"""
    from harness.config import dump_yaml, load_config, read_yaml

    path = Path(target)
    if path.is_dir() and _configured(path) is None:
        from harness.model_folder import ModelOnly

        if overrides:
            raise ConfigError(f"{target}: is no run, and its model is what it is; leave out {overrides[0]}")
        print(dump_yaml(ModelOnly.of(path), comments=False), end="")
    elif not path.is_dir() and "pool" in read_yaml(config_file(target), target):
        from harness.selection import SelectSettings

        print(dump_yaml(load_config(SelectSettings, config_file(target), overrides, label=target)), end="")
    else:
        print(dump_yaml(load_settings(target, overrides)), end="")


def tokenize(target: str, overrides: Sequence[str]) -> None:
    """turn the configured text into .bin/.idx files"""
    from harness.data import prepare
    from harness.runs import configure_logging

    settings = load_settings(target, overrides)
    configure_logging()
    print("\n".join(prepare(settings.data).summary()))


def select(target: str, overrides: Sequence[str]) -> None:
    """choose training text that is like given targets (ZIP-FIT)"""
    from harness.config import load_config
    from harness.runs import configure_logging
    from harness.selection import SelectSettings
    from harness.selection import select as run

    settings = load_config(SelectSettings, config_file(target), overrides, label=target)
    configure_logging()
    run(settings)


def train(target: str, overrides: Sequence[str]) -> int:
    """train, or go on training, a model"""
    from harness.train import train as run

    if Path(target).parent.name == "checkpoints":
        raise ConfigError(
            f"{target}: a run goes on from its newest checkpoint; give the run folder, {Path(target).parents[1]}"
        )
    return 0 if run(load_settings(target, overrides)).stopped_by is None else stop.EXIT_RESUME


def remove_norms(target: str, overrides: Sequence[str]) -> int:
    """fine-tune a model until it needs no norms, fold what is left of them, and prove it"""
    from harness.remove_norms import remove_norms as run

    return run(load_settings(target, overrides))


def evaluate(target: str, overrides: Sequence[str], *, data_from: str | None = None) -> None:
    """loss and bits per byte of a model on held-out text, as JSON"""
    from harness.evaluate import evaluate as run

    folder, settings = load_trained(target, overrides, data_from)
    if settings.data is None:
        raise ConfigError(
            f"{target}: no run's configuration lies there, so no text to evaluate on: say --data FILE.yaml (its data "
            f"section), or data.corpora=... and data.folder=..."
        )
    print(json.dumps(run(folder, settings.evaluate, settings.data, settings.parallel), indent=2))


def generate(target: str, overrides: Sequence[str]) -> None:
    """continue a prompt with a trained model"""
    from harness.evaluate import generate as run

    folder, settings = load_trained(target, overrides)
    for text in run(folder, settings.generate, settings.parallel):
        print(settings.generate.prompt + text)


def convert(
    source: str,
    target: str,
    *,
    to: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    proof: str = "auto",
    no_proof: bool = False,
    model: str | None = None,
) -> None:
    """a model from one format into another, with a proof that it is the same"""
    from harness.convert import convert as run
    from harness.model_folder import ModelOnly

    method: Any = None if no_proof else proof
    section = None if model is None else ModelOnly.read(config_file(model))
    done = run(Path(source), Path(target), to=to, step=step, dtype=dtype, proof=method, section=section)
    print("\n".join(done.lines()))


def checkpoint(
    action: str,
    target: str,
    overrides: Sequence[str],
    *,
    step: int | None = None,
    as_json: bool = False,
    dry_run: bool = False,
) -> int:
    """list, show, verify or prune a run's checkpoints"""
    from harness.checkpoint import CheckpointStore, Retention, inspection
    from harness.runs import RunFolder

    folder, named = checkpoints_folder(target, overrides)
    store, step = CheckpointStore(folder), named if step is None else step
    good = True
    if action == "path":
        print(folder.parent)
    elif action == "latest":
        newest = store.latest_good()
        print("" if newest is None else newest)
    elif action == "list":
        print(inspection.list_steps(store, as_json=as_json))
    elif action == "show":
        print(inspection.show_step(store, step, as_json=as_json))
    elif action == "verify":
        for line, whole in inspection.verify_steps(store, step):
            print(line, flush=True)
            good = good and whole
    else:
        if not folder.is_dir():
            raise HarnessError(f"{folder}: no such folder, so nothing to prune; give a run that has checkpoints")
        section = load_settings(str(folder.parent) if Path(target).is_dir() else target, overrides).checkpoint
        retention = Retention(section.keep_last, section.keep_every_steps, section.keep_best)
        # Refused while a run is writing there.
        with nullcontext() if dry_run else RunFolder(folder.parent, tensorboard=False):
            text, good = inspection.prune_steps(store, retention, dry_run=dry_run)
        print(text)
    return 0 if good else 1


def study(action: str, target: str = "", overrides: Sequence[str] = (), **options: Any) -> None:
    """plan, run, look at and report a study: many training runs with one question"""
    from harness import studies
    from harness.runs import configure_logging

    configure_logging()
    if action == "fit":
        cli_study.run_fit(options.pop("law"), options.pop("data"), config_file, **options)
    elif action == "prior":
        from harness.studies import forecasts

        forecasts.prior(**options)
    elif action == "whatif":
        from harness.studies import forecasts

        configured, changed = load_settings(target, []), load_settings(target, overrides)
        forecasts.whatif(Path(target), configured, changed, overrides=overrides, **options)
    else:
        getattr(studies, action)(config_file(target), overrides)


def report(target: str, *, out: Path | None = None) -> None:
    """a page of one run: curves, fit, events, configuration; one file that needs no network"""
    from harness.run_report import write_run_report

    print(write_run_report(Path(target), out))


def doctor() -> None:
    """what this machine has, and what is missing for what"""
    from harness.plan import diagnose

    print(diagnose())


VERBS: dict[str, Verb] = {
    "train": train,
    "select": select,
    "tokenize": tokenize,
    "remove-norms": remove_norms,
    "evaluate": evaluate,
    "generate": generate,
    "convert": convert,
    "checkpoint": checkpoint,
    "study": study,
    "report": report,
    "config": config,
    "doctor": doctor,
}


ON_ALL_RANKS = ("train", "remove-norms")
"""The verbs that torchrun may start."""


def load_settings(target: str, overrides: Sequence[str]) -> Settings:
    """The settings of a YAML file, of a run or checkpoint folder, or of an embedded configuration (`quickstart`).

    A run folder's settings mean that folder, wherever it was moved to.
    """
    from harness.config import load_config
    from harness.settings import Settings

    file = config_file(target)
    if Path(target).is_dir():
        place = file.parent.resolve()
        overrides = [f"run.folder={place.parent}", f"run.name={place.name}", *overrides]
    return load_config(Settings, file, overrides, label=target)


def config_file(target: str) -> Path:
    """Where the YAML that `target` means lies."""
    path = Path(target)
    if path.is_dir():
        file = _configured(path)
        if file is not None:
            return file
        raise ConfigError(f"{target}: a folder without config.yaml; give a YAML file or a run folder")
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    embedded = {Path(str(item)).stem: Path(str(item)) for item in resources.files("harness.configs").iterdir()}
    embedded = {name: file for name, file in sorted(embedded.items()) if file.suffix == ".yaml"}
    if target not in embedded:
        close = difflib.get_close_matches(target, embedded, 1)
        hint = f"did you mean {close[0]}?" if close else f"embedded ones: {', '.join(embedded)}"
        raise ConfigError(f"{target}: no such file, and no embedded configuration of that name; {hint}")
    return embedded[target]


def _configured(folder: Path) -> Path | None:
    """The configuration of a run or checkpoint folder; None where the folder has none."""
    from harness.convert import is_run, locate_run

    if not is_run(folder):
        return None
    place = locate_run(folder)[0]
    return place / "config.yaml" if (place / "config.yaml").is_file() else None


def load_trained(
    target: str, overrides: Sequence[str], data_from: str | None = None
) -> tuple[Path, Settings | ModelFolderSettings]:
    """The folder of a trained model, and its settings: its run's, or where there is none what is said here.

    Raises ConfigError where `data_from` is said of a run, which has a data section.
    """
    path = Path(target)
    if path.is_dir() and _configured(path) is None:
        from harness.model_folder import load_model_folder

        return path, load_model_folder(path, overrides, None if data_from is None else config_file(data_from))
    if data_from is not None:
        raise ConfigError(f"--data {data_from}: {target} has a data section of its own; override its keys")
    settings = load_settings(target, overrides)
    return run_folder(target, settings), settings


def run_folder(target: str, settings: Settings) -> Path:
    """The run or checkpoint folder that a target means: itself if it is a folder, else the one its configuration
    names."""
    return Path(target) if Path(target).is_dir() else Path(settings.run.folder) / settings.run.name


def checkpoints_folder(target: str, overrides: Sequence[str]) -> tuple[Path, int | None]:
    """The folder of the checkpoints that a target means, and the step where it is the folder of one.

    Of a folder no configuration is read, unless there are overrides to check: looking at checkpoints must not need one.
    """
    path = Path(target)
    if not path.is_dir():
        return run_folder(target, load_settings(target, overrides)) / "checkpoints", None
    place = path if path.parent.name else path.resolve()  # ".", or beside what has no name here
    step = re.fullmatch(r"step-(\d{8,})", place.name)
    if step:
        folder = place.parent
    elif place.name == "checkpoints":
        folder = place
    else:
        folder = place / "checkpoints"
        if not folder.is_dir():
            config_file(target)  # refuses what is no run folder; one that has no checkpoints yet is fine
    if overrides:
        load_settings(str(folder.parent), overrides)
    return folder, int(step[1]) if step else None


def build_parser() -> argparse.ArgumentParser:
    """The command line: one sub-command a verb."""
    parser = argparse.ArgumentParser(prog="harness", description="Pretrain and study language models.")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip()
        command = verbs.add_parser(name, help=summary, description=summary)
        if verb is checkpoint:
            _add_checkpoint_actions(command)
        elif verb is convert:
            _add_conversion(command)
        elif verb is study:
            cli_study.add_actions(command, _add_target)
        elif verb is report:
            command.add_argument("target", metavar="run", help="a run folder, finished or still going")
            command.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run folder")
        elif verb is remove_norms:
            _add_target(command, "a YAML file such as those in configs/norm_removal/, or the folder of a removal")
        elif verb is not doctor:
            also = ", a Hugging Face folder" if verb in (evaluate, generate, config) else ""
            example = "selection" if verb is select else "quickstart"
            folders = "" if verb is select else f", a run folder{also}"
            _add_target(command, f"a YAML file{folders}, or the name of an embedded configuration: {example}")
        if verb is evaluate:
            command.add_argument(
                "--data",
                dest="data_from",
                metavar="FILE",
                help="for a folder that is no run's: a YAML file or run folder whose data section is meant",
            )
    return parser


def _add_checkpoint_actions(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, summary in CHECKPOINT_ACTIONS.items():
        parser = actions.add_parser(action, help=summary, description=summary)
        _add_target(parser, "a run folder, the folder of one checkpoint, a YAML file, or an embedded configuration")
        if action in ("list", "show"):
            parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")
        if action in ("show", "verify"):
            which = "the newest good one" if action == "show" else "all"
            parser.add_argument("--step", type=_step_number, metavar="STEP", help=f"which checkpoint; default: {which}")
        if action == "prune":
            parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a run or checkpoint folder, a Hugging Face folder, ...")
    command.add_argument("target", help="the folder to make; it must not be there yet")
    command.add_argument("--to", metavar="FORMAT", help="default: huggingface for a run of harness, else harness")
    command.add_argument("--step", type=_step_number, metavar="STEP", help="which checkpoint; default: the newest")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: float32")
    proof = command.add_mutually_exclusive_group()
    proof.add_argument(
        "--proof",
        choices=("auto", "transformers", "streamed"),
        default="auto",
        help="who computes the logits: harness's decoder part by part, and transformers, which holds the whole model; "
        "auto: both, where transformers is installed and memory allows",
    )
    command.add_argument(
        "--model", metavar="FILE", help="a YAML file or run folder whose model section the source's is, if it says none"
    )
    proof.add_argument("--no-proof", action="store_true", help="compare no logits; the target then says so")


def _add_target(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("target", metavar="config", help=meaning)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")


def _step_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a step")
    return int(text)


def parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """The verb and its arguments, by name. Overrides may also stand behind an option, where argparse sees no place."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    values = vars(options)
    return {**values, "overrides": [*values["overrides"], *rest]} if "overrides" in values else values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; bad input is one line on stderr and exit status 2."""
    if arguments is None:  # this process is ours
        stop.install()
    options = parse(arguments)
    verb = options.pop("verb")
    try:
        if verb not in ON_ALL_RANKS and os.environ.get("WORLD_SIZE", "1") != "1":
            raise HarnessError("runs on one process; start it without torchrun, whatever layout trained the model")
        with nullcontext() if verb in ON_ALL_RANKS else stop.raising():  # training looks after itself
            return VERBS[verb](**options) or 0
    except stop.StopRequested as error:
        if not said_elsewhere(error):
            after = "nothing is left of it" if verb == "convert" else "the same command goes on"
            print(f"harness {verb}: stopped by {this_rank()}{error}; {after}", file=sys.stderr)
        return stop.EXIT_RESUME
    except HarnessError as error:
        if not said_elsewhere(error):
            print(f"harness {verb}: error: {this_rank()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if not said_elsewhere(error):
            print(f"harness {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `harness config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        reason = error.strerror or type(error).__name__
        if not said_elsewhere(error):
            print(f"harness {verb}: error: {this_rank()}{error.filename}: {reason}", file=sys.stderr)
        return 2
    except Exception as error:
        if said_elsewhere(error):
            return 1
        raise
    finally:
        if arguments is None:
            stop.ignore()


def said_elsewhere(error: BaseException) -> bool:
    """Whether another rank of the job is the one to say this error.

    A configuration that is refused before the ranks have met is the same on a machine: its first process says so.
    """
    known: bool | None = getattr(error, "said_elsewhere", None)
    if known is None:
        return isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"
    return known


def this_rank() -> str:
    """What an error line of one of many ranks begins with."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()}: "
