"""The command line and the self-test.

What lives elsewhere: the demo and the pipeline behind its verbs (``test_pipeline*.py``), the benchmark
(``test_bench.py``).
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fusionsum as fs
import made_up
from conftest import PACKAGE, missing, require_native, run_python
from fusionsum import __main__ as command
from fusionsum import selftest


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info_names_versions_and_backends(arguments, capsys):
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"fusionsum {fs.__version__}" in said
    assert f"numpy {np.__version__}" in said
    assert all(f"  {name:6} {state}\n" in said for name, state in fs.backends().items())
    assert "self-test, numpy: 36 of 36 passed" in said


def test_info_names_instruction_sets_and_threads(capsys):
    native = require_native()
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert f"instruction sets compiled: {', '.join(name for name, _ in native.isas())}\n" in said
    assert f"  in use: {native.isa()}\n" in said
    assert f"threads: {fs.get_num_threads()}, " in said


def test_info_says_why_native_is_missing():
    code = "from fusionsum.__main__ import main; assert main([]) == 0"
    said = run_python(code, FUSIONSUM_BACKEND="numpy", FUSIONSUM_REQUIRE_NATIVE="")
    assert "not usable: FUSIONSUM_BACKEND=numpy is set" in said
    assert "instruction sets" not in said


def test_module_runs_without_torch():
    code = """
import sys, importlib.abc
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else real(name, *a)
sys.meta_path.insert(0, NoTorch())
from fusionsum.__main__ import main
assert main([]) == 0
"""
    assert "self-test, torch" not in run_python(code)


@pytest.mark.parametrize("wrong", ["value", "nan", "gradient", "dtype"])
def test_a_wrong_result_fails_the_self_test_and_the_exit_code(wrong, monkeypatch, capsys):
    """One element, a hundred bounds away, in one form."""

    def spoil(result):
        if wrong == "dtype":
            return result.astype(np.float32) if result.dtype == np.float64 else result
        result = result.copy()
        result.flat[-1] = np.nan if wrong == "nan" else result.flat[-1] * 1.1 + 0.1
        return result

    def spoilt_sum(*arguments, **options):
        result = fs.fusion_sum(*arguments, **options)
        return result if wrong == "gradient" or result.shape != (5, 9) else spoil(result)

    def spoilt_grad(*arguments, **options):
        *grads, last = fs.fusion_sum_grad(*arguments, **options)
        return (*grads, spoil(last) if wrong == "gradient" and last.shape == (9, 67) else last)

    monkeypatch.setattr(selftest, "fusion_sum", spoilt_sum)
    monkeypatch.setattr(selftest, "fusion_sum_grad", spoilt_grad)
    monkeypatch.setattr(selftest, "find_spec", lambda name: None)
    assert command.main(["info"]) == 1
    failed = capsys.readouterr().out.split("FAILED: ")[1:]
    assert any(case.startswith("all pairs, float64") for case in failed)
    assert not any(case.startswith("paired") for case in failed)


def test_self_test_runs_the_backend_in_use(both_backends):
    assert not any(selftest.run().values())
    assert (fs.api.native is None) == (both_backends == "numpy")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "--seeds", "0"], "argument --seeds: invalid positive integer value: '0'"),
        (["demo", "--steps", "many"], "argument --steps: invalid positive integer value: 'many'"),
        (["demo", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["bench"], "invalid choice: 'bench'"),  # the repository's, not the package's: python -m bench
        (["train"], "the following arguments are required: config"),
        (["train", "x.yaml", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["train", "x.yaml", "-q", "-v"], "not allowed with argument -q"),
        (["predict", "x"], "the following arguments are required: --manifest"),
        (["retrieve", "x", "--queries", "y"], "the following arguments are required: --gallery"),
        (
            ["retrieve", "x", "--queries", "y", "--gallery", "z", "-k", "0"],
            "argument -k: invalid positive integer value",
        ),
        (["train", "x.yaml", "--out", "y", "--on-error", "skp"], "argument --on-error: invalid choice: 'skp'"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    try:
        status = command.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, wanted",
    [
        ([], ("demo-report", 3, 800)),
        (["--quick"], ("demo-report", 1, 60)),
        (["--quick", "--steps", "7", "--out", "x"], ("x", 1, 7)),
        (["--seeds", "2"], ("demo-report", 2, 800)),
    ],
)
def test_demo_options(options, wanted, monkeypatch):
    called = []
    monkeypatch.setattr(
        command, "_reported", lambda *a, out, seeds, steps: called.append((str(out), seeds, steps)) or 0
    )
    assert command.main(["demo", *options]) == 0
    assert called == [wanted]


def test_the_verbs_from_files_to_predictions(tmp_path, capsys):
    try:
        import yaml

        import fusionsum.pipeline  # noqa: F401
    except ModuleNotFoundError as error:
        missing(str(error))
    made_up.write(tmp_path / "classification.csv", made_up.rows(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(made_up.config(tmp_path, baselines=["score-sum", "alone"])))
    run = tmp_path / "run"
    train = ["train", str(config), "--out", str(run), "--set", "train.seeds=1", "--set", "train.epochs=1"]
    assert command.main(train) == 0
    assert f"fusionsum evaluate {run}" in capsys.readouterr().out
    assert command.main(["evaluate", str(run)]) == 0
    assert "has the best accuracy" in capsys.readouterr().out
    assert {"config.yaml", "log.csv", "metrics.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert "  seeds:\n  - 0\n" in (run / "config.yaml").read_text()
    assert command.main(["predict", str(run), "--manifest", str(tmp_path / "classification.csv")]) == 0
    assert len((run / "predictions.csv").read_text().splitlines()) == 1 + made_up.ROWS
    asked = ["--queries", str(tmp_path / "classification.csv"), "--gallery", str(tmp_path / "classification.csv")]
    assert command.main(["retrieve", str(run), *asked]) == 1
    assert "task.kind: expected 'retrieval', got 'classification'" in capsys.readouterr().err
    assert command.main(train) == 1
    assert "is a run already" in capsys.readouterr().err
    assert command.main([*train, "--resume"]) == 0


def test_retrieve_writes_a_table_and_a_page_that_a_new_run_does_not_keep(tmp_path, capsys):
    try:
        import yaml

        from fusionsum.pipeline.run import Run
    except ModuleNotFoundError as error:
        missing(str(error))
    folder, run = made_up.folder(tmp_path), tmp_path / "run"
    given = made_up.config(folder, **made_up.TASKS["retrieval"], baselines=[], train={"seeds": 1, "epochs": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    manifest = str(folder / "retrieval.csv")
    assert command.main(["train", str(tmp_path / "config.yaml"), "--out", str(run), "--manifest", manifest]) == 0
    capsys.readouterr()
    asked = ["retrieve", str(run), "--queries", manifest, "--gallery", manifest]
    for place, options in ((run, []), (tmp_path / "found", ["-k", "3", "--out", str(tmp_path / "found")])):
        assert command.main([*asked, *options]) == 0
        assert str(place / "retrieved.html") in capsys.readouterr().out
        with (place / "retrieved.csv").open(encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert (header[-1], len(rows)) == ("score_3" if options else "score_10", made_up.ROWS)
        assert (place / "retrieved.html").exists()
    assert command.main(["evaluate", str(run)]) == 0
    assert command.main(["predict", str(run), "--manifest", manifest]) == 0
    Run(run).clear()  # as --overwrite does
    assert not list(run.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prepare", "digit-sum"], "unknown data set 'digit-sum'; did you mean 'digits-sum'?"),
        (["init", "none.csv"], "none.csv"),
        (["init", "manifest.csv", "--out", "manifest.csv"], "--out: manifest.csv is the manifest"),
        (["train", "none.yaml", "--out", "run"], "none.yaml"),
        (["train", "config.yaml", "--out", "run", "--set", "train.seed=3"], "did you mean 'seeds'?"),
        (["train", "config.yaml", "--out", "run"], "column 'image': no such file: 0.png"),
        (["train", "config.yaml", "--out", "run", "--on-error", "skip"], "no such file"),
        (["train", "config.yaml", "--out", "run", "--set", "fusion=MLB"], "fusion: expected a mapping"),
        (["train", "config.yaml", "--out", "run", "--set", "train.weight_decay=-1"], "train.weight_decay: expected"),
        (["train", "config.yaml", "--out", "run", "--set", "train.epochs=["], "--set train.epochs: '[' is no YAML"),
        (["train", "config.yaml", "--out", "run", "--set", "train.learning_rate=nan"], "learning_rate: expected more"),
        (["train", "config.yaml", "--out", "manifest.csv"], "manifest.csv: is a file: a run needs a folder"),
        (["train", "config.yaml", "--out", "manifest.csv/run"], "manifest.csv/run: Not a directory"),
        (["evaluate", "none"], "none: is no run: it has no config.yaml"),
        (["predict", "none", "--manifest", "manifest.csv", "--out", "no/such/p.csv"], "--out: expected a file's name"),
        (["predict", "none", "--manifest", "manifest.csv", "--out", "manifest.csv"], "manifest.csv is the manifest"),
        (["predict", "none", "--manifest", "none.csv", "--out", "config.yaml"], "config.yaml is there already"),
    ],
)
def test_bad_input_is_one_message_and_status_1(arguments, message, tmp_path, monkeypatch, capsys):
    try:
        import fusionsum.pipeline  # noqa: F401
    except ModuleNotFoundError as error:
        missing(str(error))
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "split": "train", "label": "x", "image": "0.png"}
    made_up.write(tmp_path / "manifest.csv", [row])
    (tmp_path / "config.yaml").write_text("modalities: {image: {kind: image}}")
    assert command.main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path):
    """Made-up rows and their configuration, in files."""
    try:
        import yaml

        import fusionsum.pipeline  # noqa: F401
    except ModuleNotFoundError as error:
        missing(str(error))
    made_up.folder(tmp_path)
    text = made_up.MODALITIES["text"] | {"length": 16}  # which cuts none
    given = made_up.config(tmp_path, baselines=[], train={"seeds": 1, "epochs": 2}, modalities={"text": text})
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(given))
    return tmp_path


def test_evaluation_on_other_rows_leaves_the_runs_own_report(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert command.main(["train", "colours.yaml"]) == 0
    run = folder / "runs" / "colours"  # where no --out is given
    assert "fusionsum evaluate runs/colours" in capsys.readouterr().out
    assert command.main(["evaluate", str(run)]) == 0
    before = (run / "metrics.json").read_text()
    made_up.write(folder / "other.csv", made_up.rows(folder, 6))
    assert command.main(["evaluate", str(run), "--manifest", "other.csv"]) == 0
    assert (run / "metrics.json").read_text() == before
    (place,) = (run / "evaluations").iterdir()
    assert place.name.startswith("other-") and (place / "report.html").exists()
    assert str(place / "report.html") in capsys.readouterr().out
    with (folder / "classification.csv").open("a") as file:
        file.write("\n")
    assert command.main(["evaluate", str(run)]) == 1
    assert "classification.csv: has changed since the training" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, split, label",
    [
        ("classification", "manifest", lambda row: row["label"]),
        ("multilabel", "by-seed", lambda row: f"{row['label']}|thing"),
        ("regression", "manifest", lambda row: row["value"]),
        ("retrieval", "by-seed", None),
    ],
)
def test_init_writes_a_configuration_that_trains_as_it_is(folder, monkeypatch, capsys, kind, split, label):
    from fusionsum.pipeline.config import load

    monkeypatch.chdir(folder)
    rows = [
        {"id": row["id"], "image": row["image"], "text": row["text"] or f"thing {row['id']}", "height": row["height"]}
        | ({"split": row["split"]} if split == "manifest" else {})
        | ({"label": label(row)} if label else {})
        for row in made_up.rows(folder)
    ]
    made_up.write(folder / "things.csv", rows)
    (folder / "configurations").mkdir()
    for place, options in (("things.yaml", []), ("configurations/c.yaml", ["--out", "configurations/c.yaml"])):
        given, place = ["init", "things.csv", *options], Path(place)
        assert command.main(given) == 0
        assert f"fusionsum train {place}\n" in capsys.readouterr().out
        assert command.main(given) == 1
        assert f"{place} is there already: replace it (--overwrite)" in capsys.readouterr().err
        assert command.main([*given, "--overwrite"]) == 0
        made = load(place)
        assert [modality.kind for modality in made.modalities.values()] == ["image", "text", "table"]
        assert (made.task.kind, made.task.target) == (kind, ("text",) if kind == "retrieval" else ())
        assert (made.title, made.data.split) == ("things", split)
        assert os.path.samefile(made.data.manifest, folder / "things.csv")
    sets = ["--set", "train.epochs=1", "--set", "train.seeds=1", "--set", "baselines=[]"]
    assert command.main(["train", "things.yaml", "--out", "run", *sets]) == 0


@pytest.mark.parametrize("options, lines", [([], 1), (["-q"], 0), (["-v"], 3)])
def test_a_log_holds_a_line_for_each_model_and_no_bars(folder, options, lines, capsys):
    """Neither stream is a terminal here."""
    assert command.main(["train", str(folder / "colours.yaml"), "--out", str(folder / "run"), *options]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    if lines:
        assert said[-1].startswith("seed 0, fused: 2 epochs, train loss ")


def test_an_interrupted_training_says_how_to_go_on(folder, monkeypatch, capsys):
    from fusionsum.pipeline import train as step4

    train = ["train", str(folder / "colours.yaml"), "--out", str(folder / "a run"), "--overwrite"]
    with made_up.interrupted(monkeypatch, step4, 4):  # in the second epoch
        assert command.main(train) == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"fusionsum train {folder}/colours.yaml --out '{folder}/a run' --resume" in said.splitlines()
    assert command.main([*train[:-1], "--resume"]) == 0


def test_a_training_that_fails_leaves_no_run(folder, capsys):
    train = ["train", str(folder / "colours.yaml"), "--out", str(folder / "run")]
    assert command.main([*train, "--set", "train.learning_rate=1e30"]) == 1
    assert "seed 0, fused: epoch 1: the loss is not finite; try a lower" in capsys.readouterr().err
    assert command.main(["evaluate", str(folder / "run")]) == 1
    assert "is no run, for its training failed: seed 0, fused" in capsys.readouterr().err
    assert command.main(train) == 0
    assert command.main(train) == 1
    assert "replace it (--overwrite)" in capsys.readouterr().err
    assert command.main([*train, "--overwrite", "--set", "train.epochs=1"]) == 0
    assert command.main([*train, "--resume", "--set", "train.epochs=3", "--set", "train.seeds=[0, 7]"]) == 0
    with (folder / "run" / "log.csv").open() as file:
        assert [(row["seed"], row["epoch"]) for row in csv.DictReader(file)] == [(s, e) for s in "07" for e in "123"]


@pytest.mark.parametrize("number, reason", [(28, "No space left on device"), (30, "Read-only file system")])
def test_a_disk_that_is_full_or_read_only_is_one_message(folder, number, reason, monkeypatch, capsys):
    from fusionsum.pipeline import checkpoint

    def full(source, target):
        raise OSError(number, reason, str(target))

    monkeypatch.setattr(checkpoint, "os", types.SimpleNamespace(replace=full))
    assert command.main(["train", str(folder / "colours.yaml"), "--out", str(folder / "run")]) == 1
    said = capsys.readouterr().err
    assert reason in said and str(folder / "run") in said and "Traceback" not in said


def test_a_received_run_imports_nothing_unless_it_is_trusted(folder, monkeypatch, capsys):
    code = f"""
import torch
open({str(folder / "executed")!r}, "w").close()
class Encoder(torch.nn.Linear):
    def __init__(self, fitted, features):
        super().__init__(features, features)
"""
    (folder / "received.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    run = folder / "run"
    assert command.main(["train", str(folder / "colours.yaml"), "--out", str(run)]) == 0
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("encoder: cnn", "encoder: received:Encoder", 1))
    for verb in (["evaluate", str(run)], ["predict", str(run), "--manifest", str(folder / "classification.csv")]):
        assert command.main(verb) == 1
        assert "asks to import 'received:Encoder'" in capsys.readouterr().err
        assert not (folder / "executed").exists()
    assert command.main(["evaluate", str(run), "--trust-encoder"]) == 1
    assert (folder / "executed").exists()


def test_help_of_prepare_names_the_sets(capsys):
    try:
        import fusionsum.pipeline  # noqa: F401
    except ModuleNotFoundError as error:
        missing(str(error))
    with pytest.raises(SystemExit):
        command.main(["prepare", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("digits-sum", "openclipart", "tuxpaint"))


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fusionsum {fs.__version__}\n"


def process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fusionsum", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        **options,
    )


def test_a_reader_that_goes_ends_the_process_quietly():
    with process("info") as running:
        running.stdout.close()  # as head -1 does
        said = running.stderr.read()
    assert (running.returncode, said) == (141, "")


def test_ctrl_c_ends_a_process_with_its_status(folder):
    """While it trains, or, had it been slow to start, while it imports."""
    endless = ["--set", "train.epochs=100000", "--set", "train.patience=0"]
    train = ["train", str(folder / "colours.yaml"), "--out", str(folder / "run"), *endless, "-v"]
    with process(*train) as running:
        line = running.stderr.readline()
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
    assert line.startswith("epoch 1: train loss ")
    assert running.returncode == 130
    assert "--resume" in said and "Traceback" not in said


def test_exit_status_of_the_process():
    done = subprocess.run([sys.executable, "-m", "fusionsum", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: fusionsum" in done.stderr
