"""The five steps in a row: what ``fusionsum demo`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import evaluate, fuse, preprocess, train


def run(out: Path, seeds: int = 3, steps: int = 800, timed_pairs: int = 60) -> dict[str, evaluate.Result]:
    """Train and compare every model; write ``report.md`` and ``demo.png`` to a folder.

    Parameters
    ----------
    out : pathlib.Path
        The folder, made if it does not exist.
    seeds : int, optional
        How often to repeat everything, each time with another split and another initialisation.
    steps : int, optional
        Of training, for each model.
    timed_pairs : int, optional
        How many pairs of training steps to time, ours and the naive one.

    Returns
    -------
    dict of str to evaluate.Result
        By the names in `fuse.MODELS`.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, evaluate.Result] = {}
    threads = torch.get_num_threads()
    # A second thread saves nothing on batches this small, and costs tenfold where another process wants its core.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), tqdm(total=seeds * len(fuse.MODELS) * steps, unit="step") as bar:
            for seed in range(seeds):
                task = preprocess.load(seed)
                trained, *tests = task.splits
                for name in fuse.MODELS:
                    bar.set_description(f"seed {seed}, {name}")
                    torch.manual_seed(seed)
                    model = fuse.build(name, task.vocabulary)
                    result = results.setdefault(name, evaluate.Result(fuse.parameter_count(model)))
                    result.losses.append(train.train(model, task.splits[trained], steps, seed, bar))
                    for test in tests:
                        score = evaluate.accuracy(model, task.splits[test])
                        result.accuracy.setdefault(test, []).append(score)
        times = evaluate.step_times(model, task.splits[trained], timed_pairs)  # the last of MODELS is the fused one
    finally:
        torch.set_num_threads(threads)
    evaluate.plot(results, out / "demo.png")
    text = evaluate.report(results, times, steps, time.perf_counter() - start)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nWritten to {out / 'report.md'} and {out / 'demo.png'}.")
    return results
