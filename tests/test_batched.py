"""Batches of cached images are timm's transform of each, to the bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from timm_sfr.config import AugConfig
from timm_sfr.data import batch_transform, samples
from timm_sfr.data.batch_transform import BatchTransform
from timm_sfr.data.cache import Cached
from timm_sfr.data.samples import _batch_transform
from timm_sfr.data.transforms import Preprocessing
from timm_sfr.utils.seeding import seed_cpu


def made(size=32, **options):
    return create_transform(size, is_training=True, use_prefetcher=True, **{"interpolation": "random", **options})


def pictures(count=12, low=6, high=48, seed=0):
    """Smooth, noisy, flat and black-and-white images of many sizes: all grey levels, and clipping at both ends."""
    random = np.random.default_rng(seed)
    for index in range(count):
        size = tuple(random.integers(low, high, 2).tolist())
        kind = index % 4
        if kind == 0:
            rough = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
            yield np.asarray(rough.resize(size, Image.Resampling.BICUBIC))
        elif kind == 1:
            yield random.integers(0, 256, (*size, 3), np.uint8)
        elif kind == 2:
            yield np.full((*size, 3), random.integers(0, 256, 3, np.uint8), np.uint8)
        else:
            yield random.choice(np.array([0, 255], np.uint8), (*size, 3))


def check(transform, images, seed=0):
    ours = BatchTransform.of(transform)
    assert ours is not None
    draws, expected = [], []
    for number, image in enumerate(images):
        seed_cpu(seed, number)
        draws.append(ours.draw(*image.shape[:2]))
        after = torch.get_rng_state()
        seed_cpu(seed, number)
        expected.append(transform(Image.fromarray(image)).numpy())
        assert torch.equal(after, torch.get_rng_state()), "as many numbers are drawn"
    found = ours(images, draws)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert np.array_equal(one, other), (number, np.abs(one.astype(int) - other).max())
    return found


JITTERS = (None, 0.4, 0.0, 2.0, (0.8, 0.0, 0.1), (0.0, 0.0, 1.0))


@pytest.mark.parametrize(("jitter", "vflip"), list(itertools.product(JITTERS, (0.0, 0.5))))
def test_every_image_is_timms(jitter, vflip):
    check(made(color_jitter=jitter, vflip=vflip), list(pictures()))


OTHERS = (
    {"size": (24, 40)},
    {"size": 8, "interpolation": "bicubic"},
    {"hflip": 0.0},
    {"interpolation": "bilinear", "scale": (0.02, 0.1), "ratio": (0.2, 5.0)},
)


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_sizes_filters_and_crops(options):
    check(made(**options), list(pictures(high=90)))


@pytest.mark.parametrize("aug", [AugConfig(crop_padding=4), AugConfig(crop_padding=9, vflip=0.5, color_jitter=0.0, hflip=0.0)])
def test_crops_of_the_padded_image(aug):
    prep = Preprocessing((3, 24, 32), (0.5,) * 3, (0.2,) * 3, "bicubic", 1.0)
    transform, images = prep.train_transform(aug), [*pictures(), *pictures(3, 32, 33)]
    found = check(transform, images)
    # torchvision's steps by hand: the image at the training size, black around it, a part of that size.
    plain = AugConfig(crop_padding=aug.crop_padding, hflip=0.0, color_jitter=0.0)
    resize = transforms.Resize((24, 32), transforms.InterpolationMode.BICUBIC)
    around = aug.crop_padding
    for number, image in enumerate(images):
        seed_cpu(0, number)
        one = prep.train_transform(plain)(Image.fromarray(image)).numpy()
        seed_cpu(0, number)
        top, left = (int(torch.randint(2 * around + 1, (1,))) for _ in range(2))
        padded = np.pad(np.asarray(resize(Image.fromarray(image))), ((around, around), (around, around), (0, 0)))
        assert np.array_equal(one, padded[top : top + 24, left : left + 32].transpose(2, 0, 1))
    assert found.shape == (len(images), 3, 24, 32)


def test_views_share_the_crop_of_the_padded_image():
    prep = Preprocessing((3, 32, 32), (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0)
    views = prep.train_transform(AugConfig(crop_padding=4, aug_splits=2, color_jitter=0.0))
    first, second = views(Image.fromarray(next(pictures(low=32, high=33))))
    assert first.shape == (3, 32, 32) and torch.equal(first, second)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.tuples(*[st.floats(0, 3)] * 3))
def test_any_change_of_colours(seed, strengths):
    check(made(16, color_jitter=strengths), list(pictures(4, seed=seed)), seed)


@pytest.mark.parametrize("options", [{"auto_augment": "rand-m9"}, {"color_jitter": (0.1, 0.1, 0.1, 0.1)}, {"size": 160},
                                     {"train_crop_mode": "rkrc"}, {"grayscale_prob": 0.2}, {"interpolation": "lanczos"},
                                     {"color_jitter_prob": 0.5}, {"no_aug": True}], ids=str)  # fmt: skip
def test_anything_else_is_left_to_timm(options):
    assert BatchTransform.of(made(**options)) is None
    assert BatchTransform.of(transforms.Compose(made().transforms[::-1])) is None
    assert BatchTransform.of(transforms.Compose(made().transforms[:-1])) is None


def cache_of(images):
    return Cached([(image if isinstance(image, Image.Image) else Image.fromarray(image), 1) for image in images])


def test_a_cache_is_batched_where_it_shows_the_same_bits(monkeypatch):
    images, state = list(pictures()), torch.get_rng_state()
    assert _batch_transform(made(), cache_of(images)) is not None
    assert torch.equal(state, torch.get_rng_state())
    assert _batch_transform(made(), cache_of([Image.fromarray(image).convert("L") for image in images])) is None
    brightness, contrast, saturation = batch_transform._CHANGES
    monkeypatch.setattr(batch_transform, "_CHANGES", (brightness, saturation, contrast))
    assert _batch_transform(made(), cache_of(images)) is None, "a library that has come to differ"
    assert _batch_transform(made(color_jitter=None), cache_of(images)) is not None


def test_samples_are_those_of_the_images_one_by_one():
    cache, transform = cache_of(pictures()), made()
    one_by_one = samples.Samples(cache, transform, 7)
    ours = samples.Samples(cache, transform, 7, BatchTransform.of(transform))
    keys = [3, 25, 0, 11, 40]
    images, targets = batch_transform.collate(ours.__getitems__(keys))
    expected = batch_transform.collate(one_by_one.__getitems__(keys))
    assert torch.equal(images, expected[0]) and torch.equal(targets, expected[1]) and targets.dtype == expected[1].dtype
    image, target = ours[25]
    assert np.array_equal(image, expected[0][1]) and target == 1
