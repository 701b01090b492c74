"""Many-to-one channel matching."""

import pytest
import torch

from timm_sfr import UserError, match_channels
from timm_sfr.method.channels import ChannelProjection, channel_correlation


def test_groups_average_contiguous_bins():
    deep = torch.randn(2, 5, 12)
    assert torch.allclose(match_channels(deep, 4), deep.view(2, 5, 4, 3).mean(-1), atol=1e-6)
    assert torch.equal(match_channels(deep, 12), deep)


@pytest.mark.parametrize("deep_channels,channels", [(185, 16), (448, 24), (7, 3)])
def test_groups_of_unequal_size_cover_every_channel(deep_channels, channels):
    eye = torch.eye(deep_channels)[None]
    weights = match_channels(eye, channels)[0]
    assert torch.allclose(weights.sum(0), torch.ones(channels), atol=1e-6)
    assert (weights.sum(1) > 0).all()


def test_fewer_deep_channels_repeat():
    deep = torch.arange(3.0).view(1, 1, 3)
    assert match_channels(deep, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_transport_finds_a_shuffled_assignment():
    shallow = torch.randn(8, 16, 6)
    order = torch.randperm(12)
    deep = shallow.repeat_interleave(2, dim=-1)[..., order] + 0.01 * torch.randn(8, 16, 12)
    matched = match_channels(deep, 6, "transport", shallow=shallow)
    assert torch.allclose(matched, shallow, atol=0.1)


def test_correlation_by_numpy_and_dead_channels():
    shallow, deep = torch.randn(4, 9, 3), torch.randn(4, 9, 5)
    import numpy as np

    expected = np.corrcoef(shallow.flatten(0, 1).T.numpy(), deep.flatten(0, 1).T.numpy())[:3, 3:]
    assert torch.allclose(channel_correlation(shallow, deep), torch.tensor(expected).float(), atol=1e-5)
    deep[..., 0] = 2.0
    assert (channel_correlation(shallow, deep)[:, 0] == 0).all()


def test_projection_maps_every_tap_and_learns():
    projection = ChannelProjection((4, 8), 16)
    maps = projection([torch.randn(2, 5, 4), torch.randn(2, 3, 8)])
    assert [tuple(x.shape) for x in maps] == [(2, 5, 16), (2, 3, 16)]
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


def test_errors_say_what_to_do():
    deep = torch.randn(2, 5, 12)
    with pytest.raises(UserError, match="needs shallow="):
        match_channels(deep, 4, "transport")
    with pytest.raises(UserError, match="ChannelProjection"):
        match_channels(deep, 4, "projection")
    with pytest.raises(UserError, match="expected one of groups"):
        match_channels(deep, 4, "group")


def test_channel_transport_is_the_same_inside_autocast():
    shallow = torch.randn(4, 6, 3)
    deep = shallow.repeat(1, 1, 2)
    expected = match_channels(deep, 3, "transport", shallow=shallow)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.allclose(match_channels(deep, 3, "transport", shallow=shallow).float(), expected, atol=0.02)
        large = torch.randn(512, 196, 4)
        assert match_channels(large.repeat(1, 1, 2), 4, "transport", shallow=large).isfinite().all()
