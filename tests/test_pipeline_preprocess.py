"""`fusionsum.pipeline.preprocess`: each kind's decoding, what is wrong with a file, the cache by content, columns.

What lives elsewhere: what can be known without opening a file (``test_pipeline_manifest.py``).
"""

from __future__ import annotations

import io

import numpy as np
import pytest

import made_up
from conftest import missing

try:
    import soundfile
    import torch
    from PIL import Image

    from fusionsum.pipeline import ManifestError, manifest, preprocess
    from fusionsum.pipeline.preprocess import KINDS
except ModuleNotFoundError as error:
    missing(str(error))


def png(picture, **options):
    file = io.BytesIO()
    picture.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def wav(samples, rate):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_transparency_is_white_and_the_rest_is_padded_white():
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 2))
    decoded = preprocess.Image(size=4).decode(png(picture))
    assert decoded.shape == (3, 4, 4) and decoded.dtype == np.uint8
    assert (decoded[:, [0, 3]] == 255).all()
    assert (decoded[:, 1:3, :2] == 0).all() and (decoded[:, 1:3, 2:] == 255).all()
    assert preprocess.Image(size=4, channels=1).decode(png(picture)).shape == (1, 4, 4)


def test_pictures_are_turned_as_exif_says():
    picture = Image.new("RGB", (4, 4), "white")
    picture.paste((0, 0, 0), (0, 0, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise: the black top comes to the right
    decoded = preprocess.Image(size=4).decode(png(picture, exif=exif))
    assert (decoded[:, :, 2:] == 0).all() and (decoded[:, :, :2] == 255).all()


@pytest.mark.parametrize("options", [{}, {"lower": False}, {"accents": False}])
def test_texts_come_back_as_they_were_normalised(options):
    text = preprocess.Text(length=16, **options)
    contents = [text.content(None, (written,)) for written in ("Ｅ\u0301te\u0301  ", "Grün\tes\u200b")]
    strings = [content.decode() for content in contents]
    expected = {
        (): ["été", "grün es"],
        ("lower",): ["Été", "Grün es"],
        ("accents",): ["ete", "grun es"],
    }[tuple(options)]
    assert strings == expected
    items = [text.decode(content) for content in contents]
    assert [preprocess.string(item) for item in items] == expected
    fitted = preprocess.fit("text", text, items[:1])
    codes = text.tensor(items, fitted)
    assert codes.shape == (2, len(expected[0])) and codes.dtype == torch.int64  # the longest training text's
    known = {c: k for k, c in enumerate(fitted["alphabet"], 2)}
    assert codes[0, -len(expected[0]) :].tolist() == [known[c] for c in expected[0]]
    assert codes[1].tolist() == [known.get(c, 1) for c in expected[1][: len(expected[0])]]
    assert codes.max() < fitted["vocabulary"]
    both = preprocess.fit("text", text, items)
    padded = text.tensor(items, both)
    assert padded.shape == (2, len(expected[1])) and padded.all(dim=1).tolist() == [False, True]
    assert not padded[0, : -len(expected[0])].any()
    assert preprocess.fit("text", preprocess.Text(length=2), items)["shape"] == [2]


def test_a_tone_is_loudest_in_its_own_mel_band_whatever_its_rate():
    audio = preprocess.Audio(seconds=0.5, rate=8000, mels=20)
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22) / 2595) - 1)
    for rate in (8000, 11025, 44100):
        time = np.arange(rate) / rate
        decoded = audio.decode(wav(np.sin(2 * np.pi * 1000 * time)[:, None].repeat(2, axis=1), rate))
        assert decoded.shape == (20, 51) and decoded.dtype == np.float32
        assert decoded[:, 25].argmax() == np.abs(corners[1:-1] - 1000).argmin()
    assert audio.waveform(wav(np.full(400, 0.1), 8000)).max() == 1
    assert audio.waveform(wav(np.zeros(400), 8000)).shape == (4000,)


def test_mel_filters_sum_to_one_between_the_first_and_the_last_peak():
    filters = preprocess.mel_filters(40, 2048, 16000).double()
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = np.arange(1025) * 16000 / 2048
    inside = (bins >= corners[1]) & (bins <= corners[-2])
    torch.testing.assert_close(filters[:, inside].sum(dim=0), torch.ones(int(inside.sum())).double(), atol=1e-5, rtol=0)
    assert (filters >= 0).all()


@pytest.mark.parametrize("kind", ["audio", "table"])
def test_training_items_are_standardised(kind):
    rng = np.random.default_rng(0)
    if kind == "audio":
        modality = preprocess.Audio(seconds=0.1, rate=8000, mels=8)
        items = [modality.decode(wav(rng.normal(size=800), 8000)) for _ in range(20)]
    else:
        modality = preprocess.Table(columns=("a", "b"))
        items = [modality.decode(modality.content(None, (str(x), "7"))) for x in rng.normal(5, 3, 20)]
    fitted = preprocess.fit("x", modality, items)
    tensor = modality.tensor(items, fitted).double()
    assert fitted["shape"] == list(tensor.shape[1:])
    first = tensor[:, 0]
    assert abs(first.mean()) <= 1e-5 and abs(first.std(correction=0) - 1) <= 1e-4
    if kind == "table":
        assert (tensor[:, 1] == 0).all()  # what does not vary is not divided by its spread


BAD = {
    "image": [(b"", "cannot identify"), (b"no picture", "cannot identify"), ("cut", "truncated")],
    "audio": [(b"", "rror"), (b"no sound", "rror"), ("silence", "holds no sound"), ("nan", "not finite")],
}


@pytest.mark.parametrize("kind, content, message", [(k, c, m) for k, cases in BAD.items() for c, m in cases])
def test_a_bad_file_is_named_with_its_row_and_column(tmp_path, kind, content, message):
    noise = np.random.default_rng(0).integers(255, size=(50, 50, 3), dtype=np.uint8)
    made = {
        "cut": lambda: png(Image.fromarray(noise))[:3000],
        "silence": lambda: wav(np.zeros(0), 8000),
        "nan": lambda: wav(np.full(100, np.nan), 8000),
    }
    (tmp_path / "bad").write_bytes(made[content]() if isinstance(content, str) else content)
    problem, message_of = gathered(tmp_path, kind, "bad")
    assert problem.row == 1
    assert message in problem.reason
    assert message_of.startswith("m.csv:3, column 'x': 'bad': ")


@pytest.mark.parametrize(
    "kind, cell, message",
    [
        ("image", "none.png", "no such file: none.png"),
        ("audio", "none.wav", "no such file: none.wav"),
        ("image", "../", "directory"),
        ("text", "\u200b", "is empty once normalised"),
        ("table", "tall", "could not convert"),
        ("table", "nan", "expected finite numbers"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, kind, cell, message):
    problem, _ = gathered(tmp_path, kind, cell)
    assert message in problem.reason


def gathered(tmp_path, kind, cell):
    """Gather a row of nothing and a row of one bad cell; return the one problem and its message."""
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": ""}, {"id": "b", "x": cell}])
    read = manifest.read(tmp_path / "m.csv")
    cache = preprocess.Cache(tmp_path / "cache")
    items, (problem,) = preprocess.gather(read, "x", KINDS[kind](), cache, progress=False)
    assert items.index.tolist() == [-1, -1] and not items.distinct
    left, kept, messages = preprocess.without(read, [problem], "skip")
    assert kept.tolist() == [0] and left.lines == [2]
    with pytest.raises(ManifestError) as raised:
        preprocess.without(read, [problem], "raise")
    assert str(raised.value) == messages[0]
    return problem, messages[0]


def test_numbers_of_which_some_are_missing(tmp_path):
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": "1", "y": ""}, {"id": "b", "x": "", "y": ""}])
    table = preprocess.Table(columns=("x", "y"))
    cache = preprocess.Cache(tmp_path / "cache")
    _, (problem,) = preprocess.gather(manifest.read(tmp_path / "m.csv"), "t", table, cache, progress=False)
    assert (problem.row, problem.column) == (0, "x, y")
    assert "some are missing" in problem.reason


def test_skipping_every_row_is_an_error_all_the_same(tmp_path):
    made_up.write(tmp_path / "m.csv", [{"id": "a", "x": "none.png"}])
    read = manifest.read(tmp_path / "m.csv")
    with pytest.raises(ManifestError):
        preprocess.without(read, [preprocess.Problem(0, "x", "why")], "skip")


def test_each_content_is_decoded_once_and_never_again(tmp_path, monkeypatch):
    rows = made_up.rows(tmp_path, 6)
    (tmp_path / "5.png").write_bytes((tmp_path / "2.png").read_bytes())
    rows.append(rows[0] | {"id": "twin"})
    read = manifest.read(made_up.write(tmp_path / "m.csv", rows))
    decoded = []
    real = preprocess.Image.decode
    monkeypatch.setattr(preprocess.Image, "decode", lambda self, content: decoded.append(1) or real(self, content))

    def gather(size):
        cache = preprocess.Cache(tmp_path / "cache")
        items, problems = preprocess.gather(
            read, "image", preprocess.Image(size=size), cache, workers=3, progress=False
        )
        assert not problems
        return items

    first = gather(8)
    assert first.index.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert len(decoded) == 6  # the twins of a chunk are decoded, and kept once
    second = gather(8)
    assert len(decoded) == 6
    assert all(np.array_equal(a, b) for a, b in zip(first.distinct, second.distinct, strict=True))
    gather(16)
    assert len(decoded) == 12
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert gather(8).index.tolist() == [0, 0, 1, 2, 3, 1, 0]
    assert len(decoded) == 12
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_columns_say_what_is_missing():
    table = preprocess.Table()
    items = preprocess.Items([np.array([1.0]), np.array([3.0])], np.array([1, -1, 0]))
    assert [item.item() for item in items.of(np.array([0, 1]))] == [3.0]
    fitted = preprocess.fit("t", table, items.distinct)
    values, present = preprocess.column(table, items, fitted).batch(torch.tensor([2, 1, 0]))
    assert present.tolist() == [True, False, True]
    assert values[present].flatten().tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="modality 't': no training row has it"):
        preprocess.fit("t", table, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_any_item_has_the_shape_all_the_same(kind):
    modality = KINDS[kind]()
    none = preprocess.Items([], np.array([-1, -1]))
    values, present = preprocess.column(modality, none, {"shape": [3, 2]}).batch(torch.tensor([0, 1]))
    assert values.shape == (2, 3, 2) and values.dtype == modality.dtype
    assert not present.any()


def test_texts_by_a_tokenizer(monkeypatch):
    class Words:
        def __len__(self):
            return 50

        def encode(self, text):
            return [len(word) for word in text.split()]

    monkeypatch.setattr(preprocess, "_tokenizer", lambda name: Words() if name == "words" else None)
    text = preprocess.Text(tokenizer="words")
    items = [text.decode(text.content(None, (written,))) for written in ("a bc def", "abcd")]
    fitted = preprocess.fit("text", text, items)
    assert fitted["vocabulary"] == 50
    assert text.tensor(items, fitted).tolist() == [[1, 2, 3], [0, 0, 4]]
