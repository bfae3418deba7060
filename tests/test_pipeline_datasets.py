"""`fusionsum.pipeline.datasets`: digits-sum whole; the Debian packages' layouts on made-up files of the same names.

What lives elsewhere: training on digits-sum (``test_pipeline.py``).
"""

from __future__ import annotations

import csv
import functools
import itertools
import subprocess
from pathlib import Path

import pytest

from conftest import missing

try:
    from PIL import Image

    from fusionsum.pipeline import MultimodalPredictor, PrepareError, datasets
    from fusionsum.pipeline.manifest import check
    from fusionsum.pipeline.sources import read
except ModuleNotFoundError as error:
    missing(str(error))


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_manifest_of(path):
    """Check the manifest that a configuration names."""
    config = MultimodalPredictor(path).config
    check(read(Path(config.data.manifest)), config.columns, config.task, config.data.splits)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    (config,) = datasets.prepare("digits-sum", out)
    return config


def test_digits_sum_splits_share_no_item(digits):
    rows = rows_of(digits.parent / "manifest.csv")
    check_manifest_of(digits)
    of = {
        split: [row for row in rows if row["split"] == split] for split in ("train", "unseen words", "unseen languages")
    }
    assert sum(map(len, of.values())) == len(rows)
    held_out = {datasets.spell(n, lang) for lang in datasets.HELD_OUT_LANGUAGES for n in datasets.NUMBERS}
    assert {row["text"] for row in of["unseen languages"]} == held_out
    for column in ("image", "text"):
        train = {row[column] for row in of["train"]}
        assert len(train) > 1000
        for split in ("unseen words", "unseen languages"):
            assert not train & {row[column] for row in of[split]}


def test_digits_sum_labels_are_sums_that_neither_tells(digits):
    """Languages that spell different numbers alike would make the label a guess."""
    units = {}
    for lang in datasets.LANGUAGES + datasets.HELD_OUT_LANGUAGES:
        for n in datasets.NUMBERS:
            assert units.setdefault(datasets.spell(n, lang), n % 10) == n % 10, (lang, n)
    rows = rows_of(digits.parent / "manifest.csv")
    digit = datasets.load_digits().target
    for row in rows[:: len(rows) // 500]:
        assert int(row["label"]) == (digit[int(row["image"][7:-4])] + units[row["text"]]) % 10
    counts = [sum(row["label"] == str(k) for row in rows) / len(rows) for k in range(10)]
    assert all(abs(share - 0.1) <= 0.01 for share in counts)


@pytest.mark.parametrize("name, columns", [("digits-rules", ("left", "right")), ("digits-dial", ("image", "text"))])
def test_splits_of_the_constructed_tasks_share_no_scan(tmp_path, name, columns):
    configs = datasets.prepare(name, tmp_path)
    digit = datasets.load_digits().target
    numbers = {datasets.spell(n, "en"): n for n in datasets.NUMBERS}
    value = {f"digits/{i}.png": int(k) for i, k in enumerate(digit)} | numbers
    assert len(configs) == len(datasets.RULES if name == "digits-rules" else datasets.DIALS)
    for path in configs:
        check_manifest_of(path)
        rows = rows_of(path.with_suffix(".csv"))
        scans = {
            s: {row[c] for row in rows if row["split"] == s for c in columns if c != "text"} for s in datasets.COUNTS
        }
        assert {split: sum(row["split"] == split for row in rows) for split in datasets.COUNTS} == datasets.COUNTS
        assert not any(scans[a] & scans[b] for a, b in itertools.combinations(datasets.COUNTS, 2))
        rule = datasets.RULES.get(path.stem) or functools.partial(datasets.dialled, dial=float(path.stem[5:]))
        assert all(row["label"] == str(rule(*(value[row[c]] for c in columns))) for row in rows[::97])
        if path.stem == "equal":
            assert 0.5 <= sum(row["label"] == "same" for row in rows) / len(rows) <= 0.6


@pytest.mark.parametrize("dial", datasets.DIALS)
def test_the_dial_is_the_share_of_numbers_that_need_the_digit(dial):
    """Of the others as many leave the label to the digit alone as decide it alone, whatever the digit is."""
    labels = {n: [datasets.dialled(digit, n, dial) for digit in range(10)] for n in datasets.NUMBERS}
    alone = [n for n, found in labels.items() if set(found) == {n % 10}]
    digits_own = [n for n, found in labels.items() if found == list(range(10)) and n >= 100 * dial]
    assert len(alone) == len(digits_own) == round(50 * (1 - dial))
    both = [found for n, found in labels.items() if n < 100 * dial]
    assert len(both) == round(100 * dial)
    assert all(sorted(found) == list(range(10)) for found in both)


SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<dc:title>{title}</dc:title><dc:creator><x><dc:title>{author}</dc:title></x></dc:creator>
<dc:subject><rdf:Bag><rdf:li>first</rdf:li><rdf:li> second</rdf:li></rdf:Bag></dc:subject>
</rdf:RDF></metadata></svg>"""


def clipart(source, monkeypatch):
    """Five pictures that count, and one for each reason to leave one out."""
    monkeypatch.setattr(datasets, "LEAST", 2)
    share = source / "usr/share"
    for package in ("openclipart-png", "openclipart-svg"):
        (share / "doc" / package).mkdir(parents=True)
    made = [("animals", f"a{i}", f"cat {i}", "ann") for i in range(3)] + [
        ("food", f"f{i}", f"pie {i}", "bob") for i in range(2)
    ]
    left_out = [("shapes", "s", "star", "ann"), ("animals", "t", "", "ann"), ("plants", "p", "one of its class", "bob")]
    for k, (category, name, title, author) in enumerate(made + left_out):
        for kind in ("png", "svg"):
            (share / "openclipart" / kind / category).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (k, 0, 0)).save(share / "openclipart/png" / category / f"{name}.png")
        (share / "openclipart/svg" / category / f"{name}.svg").write_text(SVG.format(title=title, author=author))
    twin = share / "openclipart/png/animals/z.png"
    twin.write_bytes((share / "openclipart/png/animals/a0.png").read_bytes())
    (share / "openclipart/svg/animals/z.svg").write_text(SVG.format(title="twin", author="ann"))
    Image.new("RGB", (4, 4)).save(share / "openclipart/png/animals/broken.png")
    (share / "openclipart/svg/animals/broken.svg").write_text("<svg>")


def test_openclipart(tmp_path, monkeypatch, capsys):
    clipart(tmp_path / "from", monkeypatch)
    configs = datasets.prepare("openclipart", tmp_path / "out", tmp_path / "from")
    said = capsys.readouterr().out
    assert "public domain" in said and "openclipart-svg/copyright" in said and "1 SVG not well-formed" in said
    rows = rows_of(tmp_path / "out/manifest.csv")
    assert [(row["id"], row["group"], row["label"], row["title"]) for row in rows] == [
        ("animals/a0", "ann", "animals", "cat 0"),
        ("animals/a1", "ann", "animals", "cat 1"),
        ("animals/a2", "ann", "animals", "cat 2"),
        ("food/f0", "bob", "food", "pie 0"),
        ("food/f1", "bob", "food", "pie 1"),
    ]
    assert rows[0]["description"] == "cat 0: first second"
    assert all((tmp_path / "out" / row["image"]).exists() for row in rows)
    for config in configs:
        check_manifest_of(config)


def test_tuxpaint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "LEAST", 2)
    share = tmp_path / "from/usr/share"
    (share / "doc/tuxpaint-stamps-default").mkdir(parents=True)
    for name in ("animals/cat", "animals/dog", "animals/cat_mirror", "symbols/a", "food/pie", "food/nameless"):
        path = share / "tuxpaint/stamps" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
        if "nameless" not in name:
            path.with_suffix(".txt").write_text(f"A {path.stem}.\nfr.utf8=Un {path.stem}.\n", encoding="utf-8")
    for name in ("cat_desc_fr.ogg", "cat_desc.ogg", "dog_desc_da.wav", "catalogue_desc_da.ogg"):
        (share / "tuxpaint/stamps/animals" / name).write_bytes(b"")
    configs = datasets.prepare("tuxpaint", tmp_path / "out", tmp_path / "from")
    assert "GPL-2" in capsys.readouterr().out
    rows = {row["id"]: row for row in rows_of(tmp_path / "out/manifest.csv")}
    assert list(rows) == ["animals/cat", "animals/dog", "food/pie"]
    cat = rows["animals/cat"]
    assert (cat["group"], cat["text"], cat["text_fr"], cat["text_da"]) == ("a cat.", "A cat.", "Un cat.", "")
    spoken = {key: row for name in rows for key, row in rows[name].items() if key.startswith("speech_") and row}
    assert {key: path.rpartition("/")[2] for key, path in spoken.items()} == {
        "speech_fr": "cat_desc_fr.ogg",
        "speech_en": "cat_desc.ogg",
        "speech_da": "dog_desc_da.wav",
    }
    assert [row["id"] for row in rows_of(tmp_path / "out/category.csv")] == ["animals/cat", "animals/dog"]
    for config in configs:
        check_manifest_of(config)


def test_packages_are_fetched_and_unpacked_once(tmp_path, monkeypatch):
    calls = []

    def call(command, cwd, **options):
        calls.append(command[:2])
        if command[0] == "apt-get":
            (cwd / f"{command[2]}_1_all.deb").write_bytes(b"")
        else:
            (cwd / "usr/share/doc" / command[2].rpartition("/")[2].partition("_")[0]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(datasets.subprocess, "run", call)
    for _ in range(2):
        datasets.unpack(("one", "two"), tmp_path / "files", None)
    assert calls == [["apt-get", "download"], ["dpkg", "-x"]] * 2
    assert not list((tmp_path / "files").glob("*.deb"))
    source = tmp_path / "debs"
    source.mkdir()
    (source / "three_1_all.deb").write_bytes(b"")
    datasets.unpack(("three",), tmp_path / "files", source)
    assert calls[4:] == [["dpkg", "-x"]]
    assert (source / "three_1_all.deb").exists()


def test_data_that_cannot_be_fetched_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(PrepareError, match="unknown data set 'tuxpant'; did you mean 'tuxpaint'"):
        datasets.prepare("tuxpant", tmp_path)
    with pytest.raises(PrepareError, match=r"has neither usr/share nor tuxpaint-stamps-default_\*\.deb"):
        datasets.prepare("tuxpaint", tmp_path / "out", tmp_path)
    (tmp_path / "from/usr/share/doc/openclipart-png").mkdir(parents=True)
    with pytest.raises(PrepareError, match="has usr/share, but not openclipart-svg"):
        datasets.prepare("openclipart", tmp_path / "out", tmp_path / "from")
    monkeypatch.setattr(
        datasets.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 100, "", "E: no network")
    )
    with pytest.raises(PrepareError, match="apt-get download tuxpaint-stamps-default: E: no network"):
        datasets.prepare("tuxpaint", tmp_path / "other")
    monkeypatch.setenv("PATH", "")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="apt-get is not on this machine"):
        datasets.prepare("tuxpaint", tmp_path / "other")
