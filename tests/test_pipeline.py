"""`fusionsum.pipeline`: each step, and the demo in a short form.

What lives elsewhere: the fusion layer (``test_nn.py``), the command line (``test_main.py``).
"""

from __future__ import annotations

import pytest

from conftest import missing, run_python

try:
    import torch
    from tqdm import tqdm

    from fusionsum.pipeline import demo, evaluate, fuse, preprocess, train
except ModuleNotFoundError as error:
    missing(str(error))


@pytest.fixture(scope="module")
def task():
    return preprocess.load(seed=0)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def items(split):
    return {image.numpy().tobytes() for image in split.images}, set(split.words)


def test_train_and_test_share_no_item(task):
    images, words = items(task.splits["train"])
    for test in ("unseen words", "unseen languages"):
        other_images, other_words = items(task.splits[test])
        assert not images & other_images
        assert not words & other_words
    held_out = {preprocess.spell(n, lang) for lang in preprocess.HELD_OUT_LANGUAGES for n in preprocess.NUMBERS}
    assert set(task.splits["unseen languages"].words) == held_out
    assert len(words) > 1000
    assert len(images) > 1000


def test_texts_and_numbers_are_those_of_the_words(task):
    spelt = {
        preprocess.spell(n, lang): n
        for lang in preprocess.LANGUAGES + preprocess.HELD_OUT_LANGUAGES
        for n in preprocess.NUMBERS
    }
    alphabet = "".join(sorted(set("".join(spelt))))
    assert task.vocabulary == len(alphabet) + 1
    for split in task.splits.values():
        assert len(split.texts) == len(split.numbers) == len(split.words)
        for codes, number, word in zip(split.texts.tolist(), split.numbers.tolist(), split.words, strict=True):
            assert "".join(alphabet[code - 1] for code in codes if code) == word
            assert not any(codes[: len(codes) - len(word)])
            assert number % 10 == spelt[word] % 10


def test_no_word_means_two_labels():
    """Languages that spell different numbers alike would make the label a guess."""
    units = {}
    for lang in preprocess.LANGUAGES + preprocess.HELD_OUT_LANGUAGES:
        for n in preprocess.NUMBERS:
            assert units.setdefault(preprocess.spell(n, lang), n % 10) == n % 10, (lang, n)


def test_a_split_depends_on_the_seed_only(task):
    again, other = preprocess.load(seed=0), preprocess.load(seed=1)
    assert again.splits["train"].words == task.splits["train"].words
    assert torch.equal(again.splits["train"].images, task.splits["train"].images)
    assert other.splits["train"].words != task.splits["train"].words


def test_neither_modality_tells_the_label(task):
    inputs, labels = task.splits["train"].batch(20000, torch.Generator().manual_seed(0))
    assert inputs["image"].shape == (20000, 1, 8, 8)
    assert inputs["text"].any(dim=0).all()  # no column of padding only
    shares = torch.bincount(labels, minlength=preprocess.CLASSES) / len(labels)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_models_have_the_same_encoders_and_the_mlp_the_size_of_the_fusion(task):
    sizes, firsts = {}, set()
    for name in fuse.MODELS:
        torch.manual_seed(0)
        model = fuse.build(name, task.vocabulary)
        sizes[name] = fuse.parameter_count(model.head)
        if "image" in model.encoders:
            firsts.add(next(model.encoders["image"].parameters()).sum().item())
        inputs, _ = task.splits["train"].batch(4, torch.Generator().manual_seed(0))
        assert model(inputs).shape == (4, preprocess.CLASSES)
    assert len(firsts) == 1
    assert abs(sizes["concat + MLP"] / sizes["fused"] - 1) < 0.01


def test_the_naive_head_computes_the_same(task):
    model = fuse.build("fused", task.vocabulary)
    features = [torch.randn(8, fuse.FEATURES, requires_grad=True) for _ in range(2)]
    naive = fuse.NaiveFusion(model.head)
    leaves = [*features, *model.head.parameters()]
    ours, theirs = model.head(*features), naive(*features)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), leaves), torch.autograd.grad(theirs.square().sum(), leaves)
    )


def test_training_is_reproducible_and_learns(task):
    """The fused model masters ten images and ten words, in the same way twice."""
    whole = task.splits["train"]
    few = torch.tensor([(whole.digits == k).nonzero()[0].item() for k in range(10)])
    words = torch.tensor([(whole.numbers % 10 == k).nonzero()[0].item() for k in range(10)])
    split = preprocess.Split(whole.images[few], whole.digits[few], whole.texts[words], whole.numbers[words], [])
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        model = fuse.build("fused", task.vocabulary)
        with tqdm(total=150, disable=True) as bar:
            histories.append(train.train(model, split, 150, 0, bar))
    assert histories[0] == histories[1]
    assert evaluate.accuracy(model, split) > 0.9


def test_demo_writes_its_report(tmp_path, capsys):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    results = demo.run(tmp_path / "report", seeds=2, steps=3, timed_pairs=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert list(results) == list(fuse.MODELS)
    for result in results.values():
        assert [len(v) for v in result.accuracy.values()] == [2, 2]
        assert [len(losses) for losses in result.losses] == [3, 3]
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "the label is constructed" in report.lower()
    assert all(f"| {name} |" in report for name in (*fuse.MODELS, "whole training step"))
    assert (tmp_path / "report" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_named_with_the_remedy():
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("num2words", "tqdm") else real(name, *a)
from fusionsum.__main__ import main
sys.stderr = sys.stdout
assert main(["demo"]) == 1
"""
    assert (
        run_python(code).strip().endswith("fusionsum.pipeline needs num2words, tqdm: pip install 'fusionsum[pipeline]'")
    )
