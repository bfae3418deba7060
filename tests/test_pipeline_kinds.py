"""`fusionsum.pipeline.kinds`: each kind's decoding, and the tensors of its items.

What lives elsewhere: files and cells that cannot be decoded (``test_pipeline_preprocess.py``).
"""

from __future__ import annotations

import numpy as np
import pytest

import made_up
from conftest import missing, run_python

try:
    import torch
    from PIL import Image

    from fusionsum.pipeline import kinds, preprocess
except ModuleNotFoundError as error:
    missing(str(error))


def test_transparency_is_white_and_the_rest_is_padded_white():
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 2))
    decoded = kinds.Image(size=4).decode(made_up.png(picture))
    assert decoded.shape == (3, 4, 4) and decoded.dtype == np.uint8
    assert (decoded[:, [0, 3]] == 255).all()
    assert (decoded[:, 1:3, :2] == 0).all() and (decoded[:, 1:3, 2:] == 255).all()
    assert kinds.Image(size=4, channels=1).decode(made_up.png(picture)).shape == (1, 4, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("side", [4, 64])
def test_pictures_are_turned_as_exif_says(dtype, side, monkeypatch):
    monkeypatch.setattr(kinds, "LARGE", 100)
    pixels = np.full((side, side), np.iinfo(dtype).max, dtype)
    pixels[: side // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise: the black top comes to the right
    decoded = kinds.Image(size=4).decode(made_up.png(Image.fromarray(pixels), exif=exif))
    assert (decoded[:, :, 2:] < 64).all() and (decoded[:, :, :2] > 192).all()


FORMS = {
    "1": lambda grey: Image.fromarray(grey).convert("1"),
    "L": Image.fromarray,
    "P": lambda grey: Image.fromarray(grey).convert("P"),
    "LA": lambda grey: Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey.T.reshape(grey.shape))]),
    "RGBA": lambda grey: Image.merge("RGBA", [Image.fromarray(np.roll(grey, k)) for k in range(4)]),
    "16 bits": lambda grey: Image.fromarray(grey * np.uint16(257)),
    "floats": lambda grey: Image.fromarray(grey / np.float32(255)),
    "floats of any range": lambda grey: Image.fromarray(grey * np.float32(0.5) - 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_large_pictures_are_averaged_first(form, monkeypatch, rng):
    """Some rows at a time, which does not show."""
    grey = rng.integers(1, 255, size=(301, 203), dtype=np.uint8)
    grey[0, 0], grey[-1, -1] = 0, 255  # what 32 bits are scaled by is in the first rows and in the last
    picture, eight = FORMS[form](grey), FORMS[form if len(form) <= 4 else "L"](grey)
    averaged = eight.convert("RGBA").reduce(301 // (8 * kinds.SPARE))
    monkeypatch.setattr(kinds, "LARGE", 5000)
    image = kinds.Image(size=8)
    assert np.array_equal(image.decode(made_up.png(picture, format="TIFF")), image.decode(made_up.png(averaged)))


def test_pictures_of_very_many_pixels_take_little_memory():
    """Pillow's own is a byte for a pixel of one bit; all of them in RGBA would take eight more."""
    code = """
import io, pathlib, re
from PIL import Image
from fusionsum.pipeline import kinds
def peak():  # of this program; what getrusage tells begins with the peak of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, file = peak(), io.BytesIO()
Image.new("1", (13000, 13000)).save(file, "PNG", compress_level=1)
assert kinds.Image().decode(file.getvalue()).shape == (3, 64, 64)
print((peak() - before) / 13000**2)
"""
    assert float(run_python(code)) <= 4


@pytest.mark.parametrize("options", [{}, {"lower": False}, {"accents": False}])
def test_texts_come_back_as_they_were_normalised(options):
    text = kinds.Text(length=16, **options)
    contents = [text.content(None, (written,)) for written in ("Ｅ\u0301te\u0301  ", "Grün\tes\u200b")]
    strings = [content.decode() for content in contents]
    expected = {
        (): ["été", "grün es"],
        ("lower",): ["Été", "Grün es"],
        ("accents",): ["ete", "grun es"],
    }[tuple(options)]
    assert strings == expected
    items = [text.decode(content) for content in contents]
    assert [kinds.string(item) for item in items] == expected
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
    assert preprocess.fit("text", kinds.Text(length=2), items)["shape"] == [2]


def test_a_tone_is_loudest_in_its_own_mel_band_whatever_its_rate():
    audio = kinds.Audio(seconds=0.5, rate=8000, mels=20)
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22) / 2595) - 1)
    for rate in (8000, 11025, 44100):
        time = np.arange(rate) / rate
        decoded = audio.decode(made_up.wav(np.sin(2 * np.pi * 1000 * time)[:, None].repeat(2, axis=1), rate))
        assert decoded.shape == (20, 51) and decoded.dtype == np.float32
        assert decoded[:, 25].argmax() == np.abs(corners[1:-1] - 1000).argmin()
    assert audio.waveform(made_up.wav(np.full(400, 0.1), 8000)).max() == 1
    assert audio.waveform(made_up.wav(np.zeros(400), 8000)).shape == (4000,)


def test_mel_filters_sum_to_one_between_the_first_and_the_last_peak():
    filters = kinds.mel_filters(40, 2048, 16000).double()
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    bins = np.arange(1025) * 16000 / 2048
    inside = (bins >= corners[1]) & (bins <= corners[-2])
    torch.testing.assert_close(filters[:, inside].sum(dim=0), torch.ones(int(inside.sum())).double(), atol=1e-5, rtol=0)
    assert (filters >= 0).all()


@pytest.mark.parametrize("kind", ["audio", "table"])
def test_training_items_are_standardised(kind):
    rng = np.random.default_rng(0)
    if kind == "audio":
        modality = kinds.Audio(seconds=0.1, rate=8000, mels=8)
        items = [modality.decode(made_up.wav(rng.normal(size=800), 8000)) for _ in range(20)]
    else:
        modality = kinds.Table(columns=("a", "b"), categories=())
        items = [modality.decode(modality.content(None, (str(x), "7"))) for x in rng.normal(5, 3, 20)]
    fitted = preprocess.fit("x", modality, items)
    tensor = modality.tensor(items, fitted).double()
    assert fitted["shape"] == list(tensor.shape[1:])
    first = tensor[:, 0]
    assert abs(first.mean()) <= 1e-5 and abs(first.std(correction=0) - 1) <= 1e-4
    if kind == "table":
        assert (tensor[:, 1] == 0).all()  # a column that does not vary is not divided by its spread


def test_texts_by_a_tokenizer(monkeypatch):
    class Words:
        def __len__(self):
            return 50

        def encode(self, text):
            return [len(word) for word in text.split()]

    monkeypatch.setattr(kinds, "_tokenizer", lambda name: Words() if name == "words" else None)
    text = kinds.Text(tokenizer="words")
    items = [text.decode(text.content(None, (written,))) for written in ("a bc def", "abcd")]
    fitted = preprocess.fit("text", text, items)
    assert fitted["vocabulary"] == 50
    assert text.tensor(items, fitted).tolist() == [[1, 2, 3], [0, 0, 4]]


def test_pictures_of_16_bits_keep_their_order():
    """Pillow's own conversion clips them at 255: all but black was white."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = kinds.Image(size=8, channels=1).decode(made_up.png(Image.fromarray(ramp)))[0]
    assert np.abs(decoded - ramp / 257).max() <= 1
    dark = kinds.Image(size=8, channels=1, range=(0, 4095)).decode(made_up.png(Image.fromarray(ramp // 16)))[0]
    assert np.abs(dark - ramp / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("form", ["array", "tensor", "picture"])
def test_pictures_in_memory_are_those_of_files(dtype, form):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    given = pixels if dtype == np.uint8 else pixels.astype(dtype) / 255
    if form == "tensor":
        given = torch.from_numpy(given).permute(2, 0, 1)
    if form == "picture":
        given = Image.fromarray(pixels)
    image = kinds.Image(size=8)
    assert np.array_equal(image.decode(image.content(None, (given,))), pixels.transpose(2, 0, 1))


def test_a_sound_in_memory_is_that_of_a_file():
    sound = np.sin(np.arange(4000)).astype(np.float32)
    audio = kinds.Audio(seconds=0.5, rate=8000)
    expected = audio.decode(made_up.wav(sound, 16000))
    stereo = torch.from_numpy(np.stack([sound, sound]))
    for given in ({"array": sound, "sampling_rate": 16000}, (sound, 16000), (stereo, 16000)):
        assert np.array_equal(audio.decode(audio.content(None, (given,))), expected)


def test_tables_of_gaps_and_categories():
    table = kinds.Table(columns=("size", "colour"), categories=("colour",))
    rows = [("1", "red"), ("", "blue"), ("3", ""), ("2", "3.0")]
    items = [table.decode(table.content(None, row)) for row in rows]
    fitted = preprocess.fit("t", table, items)
    tensor = table.tensor(items, fitted)
    assert fitted["shape"] == [6]  # the number, whether it is missing, and "", 3, blue, red
    assert tensor[:, 1].tolist() == [0, 1, 0, 0] and tensor[1, 0] == 0
    assert (tensor[:, 2:].sum(dim=1) == 1).all() and tensor[3, 3] == 1
    assert not table.tensor([table.decode(table.content(None, ("1", "green")))], fitted)[0, 2:].any()


def test_texts_that_are_cut_are_counted():
    text = kinds.Text(length=3)
    (note,) = text.notes([text.decode(text.content(None, (written,))) for written in ("abc", "abcd", "abcdefg")])
    assert note == "2 of 3 texts are cut to their first 3 characters (length: 3); the longest has 7"
