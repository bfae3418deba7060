"""The command line: ``fusionsum info`` (also ``python -m fusionsum``), the demo, the pipeline's verbs."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from . import __version__, backends, get_num_threads, selftest
from .backend import native


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


def demo(out: Path, seeds: int, steps: int) -> None:
    """Take the five steps on digits-sum; write the report."""
    from .pipeline.demo import demonstrate

    demonstrate(out, seeds, steps)


def prepare(name: str, out: Path | None, source: Path | None) -> None:
    """Make a data set's folder and say how to train on it."""
    from .pipeline.datasets import prepare

    for config in prepare(name, out or Path("data", name), source):
        print(f"fusionsum train {config} --out {Path('runs', f'{name}-{config.stem}')}")


def train(config: Path, out: Path, manifest: Path | None, overrides: list[str], resume: bool) -> None:
    """Train all models that a configuration names, into a run's folder."""
    from .pipeline import MultimodalPredictor
    from .pipeline.config import load

    MultimodalPredictor(load(config, overrides)).fit(manifest, out, resume)
    print(f"fusionsum evaluate {out}")


def evaluate(run: Path, manifest: Path | None, out: Path | None) -> None:
    """Measure a run's models; write metrics, plots and the report."""
    from .pipeline import MultimodalPredictor
    from .pipeline.report import verdicts, write_report

    evaluation = MultimodalPredictor.load(run).evaluate(manifest)
    write_report(out or run, evaluation)
    print("\n".join(verdicts(evaluation)))
    print(f"Written to {(out or run) / 'report.html'}.")


def predict(run: Path, manifest: Path, out: Path | None) -> None:
    """Write the predictions of a run's fused model for a manifest's rows."""
    from .pipeline import MultimodalPredictor

    place = out or run / "predictions.csv"
    predictions = MultimodalPredictor.load(run).predict(manifest, place)
    print(f"{len(predictions)} predictions written to {place}.")


def retrieve(run: Path, queries: Path, gallery: Path, k: int, out: Path | None) -> None:
    """Write what a run's fused model finds in a gallery for queries: a table, and a page that shows both."""
    from .pipeline import MultimodalPredictor
    from .pipeline.retrieve import write_retrieved

    place = out or run
    write_retrieved(place, MultimodalPredictor.load(run).retrieve(queries, gallery, k))
    print(f"Written to {place / 'retrieved.csv'} and {place / 'retrieved.html'}.")


def _reported(verb: Callable[..., None], **arguments: object) -> int:
    """Call a verb of the pipeline; return 1, with the message alone, for bad input and for packages that are missing."""
    try:
        from .pipeline import ERRORS
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        verb(**arguments)
    except ERRORS as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive integer"  # the type's name in argparse's error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusionsum", description="Multiplicative fusion of modalities.")
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,prepare,train,evaluate,predict,retrieve}")
    commands.add_parser("info", help="what is installed, usable and in use, and a self-test (the default)")
    verb = commands.add_parser("demo", help="train and compare fusion models on digits and number words")
    verb.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report (%(default)s)")
    verb.add_argument("--seeds", type=_positive, help="repetitions (3)")
    verb.add_argument("--steps", type=_positive, help="training steps of each model (800)")
    verb.add_argument("--quick", action="store_true", help="1 seed and 60 steps, unless given: too few to learn")
    verb = commands.add_parser("prepare", help="make a data set: digits-sum, openclipart or tuxpaint")
    verb.add_argument("name", help="the data set")
    verb.add_argument("--out", type=Path, help="its folder (data/NAME)")
    verb.add_argument(
        "--from", type=Path, dest="source", help="folder of Debian packages, .deb or unpacked (apt-get download)"
    )
    verb = commands.add_parser("train", help="train the models that a configuration describes")
    verb.add_argument("config", type=Path, help="a YAML file")
    verb.add_argument("--out", type=Path, required=True, help="folder of the run")
    verb.add_argument("--manifest", type=Path, help="instead of the configuration's")
    verb.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key")
    verb.add_argument(
        "--on-error", choices=["raise", "skip"], help="stop at unreadable items, or leave out their rows (raise)"
    )
    verb.add_argument("--resume", action="store_true", help="continue an interrupted training, to the same weights")
    verb = commands.add_parser("evaluate", help="measure a run's models, write its report")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--manifest", type=Path, help="evaluate on these rows instead of the run's test splits")
    verb.add_argument("--out", type=Path, help="folder of the report (the run's)")
    verb = commands.add_parser("predict", help="predict with a run's fused model")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--manifest", type=Path, required=True, help="the rows; they need no labels")
    verb.add_argument("--out", type=Path, help="a CSV file (RUN/predictions.csv)")
    verb = commands.add_parser("retrieve", help="find a gallery's items for queries with a run's fused model")
    verb.add_argument("run", type=Path, help="folder of the run, whose task is retrieval")
    verb.add_argument("--queries", type=Path, required=True, help="the manifest of the rows to ask with")
    verb.add_argument("--gallery", type=Path, required=True, help="the manifest of the rows to find")
    verb.add_argument("-k", type=_positive, default=10, help="how many to find for each query (%(default)s)")
    verb.add_argument("--out", type=Path, help="folder of retrieved.csv and retrieved.html (the run's)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Call the command that the arguments name and return the exit status."""
    args = _parser().parse_args(argv)
    options = vars(args)
    command = options.pop("command")
    if command == "demo":
        quick = options.pop("quick")
        options["seeds"] = args.seeds or (1 if quick else 3)
        options["steps"] = args.steps or (60 if quick else 800)
    if command == "train" and (on_error := options.pop("on_error")):
        options["overrides"] = [*args.overrides, f"data.on_error={on_error}"]
    verbs: dict[str, Callable[..., None]] = {
        "demo": demo,
        "prepare": prepare,
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "retrieve": retrieve,
    }
    return _reported(verbs[command], **options) if command in verbs else info()


if __name__ == "__main__":
    sys.exit(main())
