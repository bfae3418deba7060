"""Step 1: raw items to tensors, and the splits of train and test.

The task: an image of a handwritten digit and a number written out in words; the label is (digit + number) mod 10. The
inputs are real (scikit-learn's scans of handwriting; number words by num2words), the label is constructed, so that
neither modality alone, nor any sum of what each says alone, tells anything about it.

Train and test share no item: images are split, words are split, and whole languages are held out besides. A word that
several languages share counts as one item, and as unseen where any held-out language has it.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from num2words import num2words
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10
NUMBERS = range(100)
# In Latin script, and of words below 22 letters, for the GRU's time is theirs. Those held out have relatives among the
# others, without which no model could read them.
LANGUAGES = "cs da de en eo es fr is it nl pt ro sl sr sv tr".split()
HELD_OUT_LANGUAGES = "ca no sk".split()


@dataclass(frozen=True)
class Split:
    """Items of both modalities; any image makes an example with any text.

    ``images`` (I, 1, 8, 8) float32, ``digits`` (I,) int64; ``texts`` (W, T) int64, left-padded with 0, ``numbers`` (W,)
    int64, ``words`` the W strings.
    """

    images: Tensor
    digits: Tensor
    texts: Tensor
    numbers: Tensor
    words: list[str]

    def batch(self, size: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Pair `size` random images with random texts; return inputs by modality, and labels (size,)."""
        i = torch.randint(len(self.images), (size,), generator=generator)
        w = torch.randint(len(self.texts), (size,), generator=generator)
        text = self.texts[w]
        text = text[:, text.any(dim=0)]  # the padding that no text here needs
        return {"image": self.images[i], "text": text}, (self.digits[i] + self.numbers[w]) % CLASSES


@dataclass(frozen=True)
class Task:
    """The splits by name, ``train`` first, and the number of character codes, padding included."""

    splits: dict[str, Split]
    vocabulary: int


def spell(number: int, language: str) -> str:
    """Write a number in words, lower case and without diacritics, which relatives often differ in.

    Examples
    --------
    >>> spell(22, "fr"), spell(22, "sv")
    ('vingt-deux', 'tjugotva')
    """
    folded = unicodedata.normalize("NFKD", num2words(number, lang=language).lower())
    return "".join(c for c in folded if not unicodedata.combining(c))


def encode(words: list[str], alphabet: str, length: int) -> Tensor:
    """Code characters from 1 by their place in `alphabet`, padded with 0 on the left: an RNN ends on a letter."""
    codes = np.zeros((len(words), length), dtype=np.int64)
    for row, word in zip(codes, words, strict=True):
        row[length - len(word) :] = [alphabet.index(c) + 1 for c in word]
    return torch.from_numpy(codes)


def load(seed: int, test_share: float = 0.2) -> Task:
    """Load both modalities and split them at random; the held-out languages are always the same.

    Parameters
    ----------
    seed : int
        Of the split.
    test_share : float, optional
        The share of images, and of words of the known languages, that is kept for testing.

    Returns
    -------
    Task
        With the splits ``train``, ``unseen words`` and ``unseen languages``; the last two share their images.
    """
    unseen = {spell(n, language): n for language in HELD_OUT_LANGUAGES for n in NUMBERS}
    known = {spell(n, language): n for language in LANGUAGES for n in NUMBERS}
    known = {word: n for word, n in sorted(known.items()) if word not in unseen}
    alphabet = "".join(sorted(set("".join([*known, *unseen]))))
    length = max(map(len, [*known, *unseen]))
    handwriting = load_digits()
    images = torch.from_numpy(handwriting.images[:, None] / 16).float()
    digits = torch.from_numpy(handwriting.target).long()

    rng = np.random.default_rng(seed)
    image_order, word_order = rng.permutation(len(images)), rng.permutation(len(known))
    test_images, train_images = np.split(image_order, [int(test_share * len(images))])
    test_words, train_words = np.split(word_order, [int(test_share * len(known))])

    def split(which: np.ndarray, words: dict[str, int]) -> Split:
        numbers = torch.tensor(list(words.values()))
        return Split(images[which], digits[which], encode(list(words), alphabet, length), numbers, list(words))

    items = list(known.items())
    splits = {
        "train": split(train_images, dict(items[i] for i in train_words)),
        "unseen words": split(test_images, dict(items[i] for i in test_words)),
        "unseen languages": split(test_images, unseen),
    }
    return Task(splits, vocabulary=len(alphabet) + 1)
