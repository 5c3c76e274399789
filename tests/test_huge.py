"""Tensors of more than 2³¹ elements, whose indices do not fit into 32 bits. They take up to 13 GB."""

import pytest
import torch

import mobilemamba_kernels as mk

pytestmark = pytest.mark.full
SIDE = 11_590  # 16 maps of SIDE × SIDE are just over 2³¹ elements


def image(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Zeros but for the last corner of the last channel, where a 32-bit index would have wrapped."""
    x = torch.zeros(1, SIDE, SIDE, 16, dtype=dtype).permute(0, 3, 1, 2)
    x[0, -1, -4:, -4:] = torch.arange(1.0, 17).view(4, 4)
    assert x.numel() > 2**31
    return x


def corner(x: torch.Tensor) -> torch.Tensor:
    return x[:, -1:, -4:, -4:]


def test_haar_dwt2d_and_idwt2d():
    x = image()
    expected = corner(x).clone()
    bands = mk.haar_dwt2d(x)
    del x
    assert torch.equal(bands[:, -1:, :, -2:, -2:], mk.haar_dwt2d(expected))
    assert torch.equal(corner(mk.haar_idwt2d(bands)), expected)


def test_cross_scan_and_merge():
    side = SIDE // 2 + 1  # the sequences together are just over 2³¹ elements
    x = torch.zeros(1, 16, side, side, dtype=torch.bfloat16)
    x[0, -1, -4:, -4:] = expected = torch.arange(1.0, 17).view(4, 4)
    sequences = mk.cross_scan_fn(x)
    assert torch.equal(sequences[0, 3, -1, :4].float(), expected[:, -1].flip(0))  # columns, backwards
    merged = mk.cross_merge_fn(sequences.view(1, 4, 16, side, side)).view_as(x)
    assert torch.equal(merged, 4 * x)


def test_depthwise_conv2d_act():
    x = image()
    weight = torch.ones(16, 1, 3, 3)
    expected = mk.depthwise_conv2d_act(x[:, :, -8:, -8:].clone(), weight)
    assert torch.equal(corner(mk.depthwise_conv2d_act(x, weight)), corner(expected))


def test_conv2d_act():
    x = image(torch.float16)  # in bfloat16 it is PyTorch's convolution
    weight = torch.ones(16, 16, 3, 3)
    expected = mk.conv2d_act(x[:, :, -8:, -8:].clone(), weight)
    assert torch.equal(corner(mk.conv2d_act(x, weight)), corner(expected))


def test_wavelet_depthwise_conv2d():
    x = image()
    weight = torch.ones(64, 1, 3, 3)
    expected = mk.wavelet_depthwise_conv2d(x[:, :, -10:, -10:].clone(), weight)
    assert torch.equal(corner(mk.wavelet_depthwise_conv2d(x, weight)), corner(expected))


def test_selective_scan_fn():
    length = 2**27 + 5
    u = torch.zeros(1, 16, length, dtype=torch.bfloat16)
    u[:, :, -32:] = torch.linspace(-1, 1, 32)
    delta = torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16).expand(u.shape)
    A, B = -torch.ones(16, 1), torch.ones(1, 1, 1).expand(1, 1, length)
    y = mk.selective_scan_fn(u, delta, A, B, B)
    end = slice(length - 32, length)
    expected = mk.selective_scan_ref(u[..., end], delta[..., end], A, B[..., end], B[..., end])
    torch.testing.assert_close(y[..., end], expected)
    assert not y[..., : length - 32].any()
