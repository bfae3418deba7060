"""The command line: its options, exit statuses and messages; ``fusionsum info``, also ``python -m fusionsum``.

What lives elsewhere: what the pipeline's verbs do (``pipeline/verbs.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import logging
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import numpy as np

from . import __version__, backends, get_num_threads, selftest
from .backend import native

INTERRUPTED, BROKEN_PIPE = 130, 141  # exit statuses, by the convention of shells: 128 and the signal
RANKED = ("train", "evaluate", "predict", "retrieve")  # the verbs that several processes share


def _ranks() -> tuple[int, int]:
    """Return this process's number and how many torchrun started."""
    number, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(number), int(count)) if number.isdecimal() and count.isdecimal() else (0, 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> int:
    """Print versions, backends (why one is not usable), threads and the self-test's result; return 1 if it fails."""
    print(f"fusionsum {__version__}, Python {platform.python_version()}, {platform.machine()}, {platform.platform()}")
    print(f"numpy {np.__version__}, torch {_version('torch')}")
    for name, state in backends().items():
        print(f"  {name:6} {state}")
    if native is not None:
        compiled = native.isas()
        print(f"instruction sets compiled: {', '.join(name for name, _ in compiled)}")
        print(f"  of these on this machine: {', '.join(name for name, supported in compiled if supported)}")
        print(f"  in use: {native.isa()}")
        print(f"threads: {get_num_threads()}, {native.thread_backend()} pool")
    failures = selftest.run()
    if native is not None and "torch" in failures:
        print(f"  with torch imported: {get_num_threads()}, {native.thread_backend()} pool")
    cases = len(selftest.FORMS) * len(selftest.DTYPES) * len(selftest.ACTIVATIONS)
    for framework, failed in failures.items():
        print(f"self-test, {framework}: {cases - len(failed)} of {cases} passed")
        for case in failed:
            print(f"  FAILED: {case}")
    return int(any(failures.values()))


def _reported(verb: str, argv: Sequence[str], verbosity: int, **arguments: object) -> int:
    """Call a verb of the pipeline; return the exit status, with the message alone, without a traceback, for bad input."""
    try:
        from .pipeline import ERRORS, verbs
        from .pipeline.processes import joined
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    rank, count = _ranks()
    if "progress" in inspect.signature(getattr(verbs, verb)).parameters:
        # In a file, bars are thousands of lines.
        arguments["progress"] = verbosity >= 0 and not rank and sys.stderr.isatty()
    said = logging.StreamHandler()
    said.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("fusionsum")
    before = log.level
    log.setLevel(logging.ERROR if rank else {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity])
    log.addHandler(said)
    try:
        with (
            joined() if verb in RANKED else contextlib.nullcontext(),
            contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext(),
        ):
            getattr(verbs, verb)(**arguments)
    except ERRORS as error:
        if str(error):  # else another rank says it
            print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = [*argv, *(["--resume"] if verb == "train" and "--resume" not in argv else [])]
        again = [word for word in again if word != "--overwrite"]
        of_machine = os.environ.get("LOCAL_WORLD_SIZE", str(count))
        start = ["fusionsum"] if count == 1 else ["torchrun", "--nproc-per-node", of_machine, "-m", "fusionsum"]
        hint = f": continue with\n{shlex.join([*start, *again])}" if verb == "train" else ""
        if not rank:
            print(f"\ninterrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    finally:
        log.removeHandler(said)
        log.setLevel(before)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive integer"  # the type's name in argparse's error


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with what the pipeline knows: it is imported only if it is asked for help."""

    of_data_sets = False

    def format_help(self) -> str:
        """Return the help, and the names of the data sets."""
        if self.of_data_sets:
            try:
                from .pipeline.verbs import data_sets
            except ModuleNotFoundError as error:
                self.epilog = str(error)
            else:
                self.epilog = data_sets()
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionsum", description="Multiplicative fusion of modalities.")
    parser.add_argument("--version", action="version", version=f"fusionsum {__version__}")
    names = "{info,demo,prepare,init,train,evaluate,predict,retrieve,export,cache}"
    commands = parser.add_subparsers(dest="command", metavar=names, parser_class=_Parser)

    def add(name: str, about: str, *common: str) -> argparse.ArgumentParser:
        verb = commands.add_parser(
            name, help=about, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if "run" in common:
            verb.add_argument("run", type=Path, help="folder of the run")
            verb.add_argument(
                "--trust-encoder", action="store_true", help="import the modules that the run names as encoders"
            )
        if "model" in common:
            verb.add_argument("--model", default="fused", help="a model of the run, or 'best' (%(default)s)")
            verb.add_argument("--seed", type=int, help="of the model (the one of the least validation loss)")
        if "overwrite" in common:
            verb.add_argument("--overwrite", action="store_true", help="replace what is there")
        if "said" in common:
            group = verb.add_mutually_exclusive_group()
            group.add_argument(
                *("-q", "--quiet"), action="store_const", const=-1, dest="verbosity", help="results and errors only"
            )
            group.add_argument(
                *("-v", "--verbose"), action="store_const", const=1, dest="verbosity", help="a line for each epoch"
            )
        return verb

    add("info", "what is installed, usable and in use, and a self-test (the default)")
    verb = add("demo", "train and compare fusion models on digits and number words")
    verb.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report (%(default)s)")
    verb.add_argument("--seeds", type=_positive, help="repetitions (3)")
    verb.add_argument("--steps", type=_positive, help="training steps of each model (800)")
    verb.add_argument("--quick", action="store_true", help="1 seed and 60 steps, unless given: too few to learn")
    verb = add("prepare", "make a data set, whose name --help tells")
    assert isinstance(verb, _Parser)
    verb.of_data_sets = True
    verb.add_argument("name", help="the data set")
    verb.add_argument("--out", type=Path, help="its folder (data/NAME)")
    verb.add_argument(
        "--from", type=Path, dest="source", help="folder of Debian packages, .deb or unpacked (apt-get download)"
    )
    verb = add("init", "write a configuration for a manifest, to be edited: what its columns tell", "overwrite")
    verb.add_argument("manifest", type=Path, help="a CSV or JSONL file")
    verb.add_argument("--out", type=Path, help="a YAML file (beside the manifest, MANIFEST.yaml)")
    verb = add("train", "train the models that a configuration describes", "overwrite", "said")
    verb.add_argument("config", type=Path, help="a YAML file")
    verb.add_argument("--out", type=Path, help="folder of the run (runs/CONFIG)")
    verb.add_argument("--manifest", type=Path, help="instead of the configuration's")
    verb.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key")
    verb.add_argument(
        "--on-error", choices=["raise", "skip"], help="stop at unreadable items, or leave out their rows (raise)"
    )
    verb.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training, to the same weights; train further, with more epochs or seeds",
    )
    verb = add("evaluate", "measure a run's models, write its report", "run", "said")
    verb.add_argument("--manifest", type=Path, help="evaluate on these rows instead of the run's test splits")
    verb.add_argument(
        "--out", type=Path, help="folder of the report (the run's; of other rows, one in its evaluations)"
    )
    verb = add("predict", "predict with a run's model", "run", "model", "overwrite", "said")
    verb.add_argument("--manifest", type=Path, required=True, help="the rows; they need no labels")
    verb.add_argument("--out", type=Path, help="a CSV file (RUN/predictions.csv)")
    verb.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="stop at unreadable items, or leave their rows' predictions empty (%(default)s)",
    )
    verb = add("retrieve", "find a gallery's items for queries with a run's fused model", "run", "said")
    verb.add_argument("--queries", type=Path, required=True, help="the manifest of the rows to ask with")
    verb.add_argument("--gallery", type=Path, required=True, help="the manifest of the rows to find")
    verb.add_argument("-k", type=_positive, default=10, help="how many to find for each query (%(default)s)")
    verb.add_argument("--out", type=Path, help="folder of retrieved.csv and retrieved.html (the run's)")
    verb = add(
        "export", "write a run's model for other programs, its preprocessing described beside it", "run", "model"
    )
    verb.add_argument("--out", type=Path, required=True, help="folder of the files")
    verb.add_argument("--format", choices=["onnx", "torch"], default="onnx", dest="form", help="(%(default)s)")
    verb = add("cache", "show what a cache of decoded items holds, clear it or make it smaller")
    verb.add_argument("folder", type=Path, nargs="?", default=Path(".fusionsum-cache"), help="(%(default)s)")
    verb.add_argument("--clear", action="store_true", help="delete it: everything is decoded again")
    verb.add_argument("--limit", type=float, metavar="GB", help="delete what was not used for longest, down to this")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Call the command that the arguments name and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    rank, count = _ranks()
    with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
        args = _parser().parse_args(argv)
    options = vars(args)
    command = options.pop("command")
    verbosity = options.pop("verbosity", None) or 0
    if command == "demo":
        quick = options.pop("quick")
        options["seeds"] = args.seeds or (1 if quick else 3)
        options["steps"] = args.steps or (60 if quick else 800)
    if command == "train":
        if on_error := options.pop("on_error"):
            options["overrides"] = [*args.overrides, f"data.on_error={on_error}"]
        if args.resume and args.overwrite:
            if not rank:
                print("--resume and --overwrite exclude each other", file=sys.stderr)
            return 2
    if count > 1 and command not in RANKED:
        if rank:
            return 0
        print(f"fusionsum {command or 'info'}: one process does it, the first of {count}", file=sys.stderr)
    return info() if command in (None, "info") else _reported(command, argv, verbosity, **options)


def console() -> NoReturn:
    """Call `main` as a process: end quietly where the reader of its output has gone, and at once by a second Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        status = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on Ctrl-C ends the process, with its own status
    sys.exit(status)


if __name__ == "__main__":
    console()
