"""`harness VERB CONFIG [section.key=value ...]`. Each verb is an importable function; nothing heavy is imported for
--help."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from harness import __version__
from harness.config.errors import ConfigError, HarnessError

if TYPE_CHECKING:
    from harness.settings import Settings

Verb = Callable[[str, Sequence[str]], None]


def config(target: str, overrides: Sequence[str]) -> None:
    """print the resolved configuration, every key under its documentation"""
    from harness.config import dump_yaml

    print(dump_yaml(load_settings(target, overrides)), end="")


def tokenize(target: str, overrides: Sequence[str]) -> None:
    """turn the configured text into .bin/.idx files"""
    from harness.data import prepare
    from harness.runs import configure_logging

    settings = load_settings(target, overrides)
    configure_logging()
    print("\n".join(prepare(settings.data).summary()))


def train(target: str, overrides: Sequence[str]) -> None:
    """train, or go on training, a model"""
    from harness.train import train as run

    if Path(target).parent.name == "checkpoints":
        raise ConfigError(
            f"{target}: a run goes on from its newest checkpoint; give the run folder, {Path(target).parents[1]}"
        )
    run(load_settings(target, overrides))


def evaluate(target: str, overrides: Sequence[str]) -> None:
    """loss and bits per byte of a run's checkpoint on held-out text, as JSON"""
    from harness.evaluate import evaluate as run

    settings = load_settings(target, overrides)
    result = run(run_folder(target, settings), settings.evaluate, settings.data, settings.parallel)
    print(json.dumps(result, indent=2))


def generate(target: str, overrides: Sequence[str]) -> None:
    """continue a prompt with a run's checkpoint"""
    from harness.evaluate import generate as run

    settings = load_settings(target, overrides)
    for text in run(run_folder(target, settings), settings.generate, settings.parallel):
        print(settings.generate.prompt + text)


def doctor(target: str, overrides: Sequence[str]) -> None:
    """what this machine has, and what is missing for what"""
    from harness.plan import diagnose

    print(diagnose())


VERBS: dict[str, Verb] = {
    "train": train,
    "tokenize": tokenize,
    "evaluate": evaluate,
    "generate": generate,
    "config": config,
    "doctor": doctor,
}


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
        for folder in (path, path.parent.parent):  # a run folder, or runs/NAME/checkpoints/step-...
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml"
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


def run_folder(target: str, settings: Settings) -> Path:
    """The run or checkpoint folder that a target means: itself if it is a folder, else the one its configuration
    names."""
    return Path(target) if Path(target).is_dir() else Path(settings.run.folder) / settings.run.name


def build_parser() -> argparse.ArgumentParser:
    """The command line: one sub-command a verb."""
    parser = argparse.ArgumentParser(prog="harness", description="Pretrain and study language models.")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip()
        command = verbs.add_parser(name, help=summary, description=summary)
        if verb is doctor:
            continue
        command.add_argument(
            "config", help="a YAML file, a run folder, or the name of an embedded configuration: quickstart"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; bad input is one line on stderr and exit status 2."""
    options = build_parser().parse_args(arguments)
    try:
        if options.verb != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise HarnessError("runs on one process; start it without torchrun, whatever layout trained the model")
        VERBS[options.verb](getattr(options, "config", ""), getattr(options, "overrides", []))
    except HarnessError as error:
        if not said_elsewhere(error):
            print(f"harness {options.verb}: error: {this_rank()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if not said_elsewhere(error):
            print(f"harness {options.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `harness config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        reason = error.strerror or type(error).__name__
        if not said_elsewhere(error):
            print(f"harness {options.verb}: error: {this_rank()}{error.filename}: {reason}", file=sys.stderr)
        return 2
    except Exception as error:
        if said_elsewhere(error):
            return 1
        raise
    return 0


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
