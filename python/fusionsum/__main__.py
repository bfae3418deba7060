"""The command line: ``fusionsum info`` (also ``python -m fusionsum``), ``fusionsum demo``, ``fusionsum bench``."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
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
    """Print what is installed, what is usable and why not, and run the self-test; return 1 if it fails."""
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


def demo(out: Path, seeds: int, steps: int) -> int:
    """Run the five-step pipeline; return 1 if a package it needs is missing."""
    try:
        from .pipeline.demo import run
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    run(out, seeds, steps)
    return 0


def bench(arguments: list[str]) -> int:
    """Run the repository's benchmark with these arguments; return its exit status, or 1 outside the repository."""
    if not Path("bench", "__main__.py").is_file():
        print("the benchmark is not in the package: run this in the root of fusionsum's repository", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "bench", *arguments], check=False).returncode


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive integer"  # what argparse calls the type in its error


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="fusionsum", description="Multiplicative fusion of modalities.")
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,bench}")
    commands.add_parser("info", help="what is installed, usable and in use, and a self-test (the default)")
    demo_parser = commands.add_parser("demo", help="train and compare fusion models on digits and number words")
    demo_parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report (%(default)s)")
    demo_parser.add_argument("--seeds", type=_positive, help="repetitions (3)")
    demo_parser.add_argument("--steps", type=_positive, help="training steps of each model (800)")
    demo_parser.add_argument("--quick", action="store_true", help="1 seed and 60 steps, unless given: too few to learn")
    commands.add_parser("bench", add_help=False, help="the repository's benchmark; its options follow")
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "demo":
        return demo(args.out, args.seeds or (1 if args.quick else 3), args.steps or (60 if args.quick else 800))
    return info()


if __name__ == "__main__":
    sys.exit(main())
