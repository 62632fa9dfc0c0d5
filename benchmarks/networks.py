"""Networks as users have them, for `freezeout estimate --model benchmarks.networks:NAME`: each
function returns a model and a batch of example inputs. timm's come with random weights."""

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]


def resnet18() -> Built:
    """ResNet-18 on 64 x 64 images."""
    return _timm("resnet18"), _images(8, 64)


def resnet50() -> Built:
    """ResNet-50 on 64 x 64 images."""
    return _timm("resnet50"), _images(4, 64)


def vit() -> Built:
    """A ViT of 12 blocks, 192 wide, on 64 patches."""
    return _timm("vit_tiny_patch16_224", img_size=64, patch_size=8), _images(4, 64)


def convnext() -> Built:
    """ConvNeXt-atto on 64 x 64 images."""
    return _timm("convnext_atto"), _images(12, 64)


def gpt() -> Built:
    """A GPT-2 of 6 blocks, 256 wide, its output tied to its embedding; 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=6, n_embd=256, n_head=4, n_positions=128, vocab_size=2000, use_cache=False
    )
    tokens = torch.randint(2000, (2, 128))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)
