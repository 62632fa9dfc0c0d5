"""Models that nobody adapted, served bit for bit; benchmarks/cache_architectures.py does more."""

import pytest
import torch

from tests.cached import check
from tests.zoo import timm_architecture, torchvision_architecture, transformers_architecture


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vit_tiny_patch16_224",  # class token and position embedding are the root's own
        "mobilenetv3_small_050",
        "mixer_s32_224",
    ],
)
def test_timm_networks_are_served_at_every_depth(name: str) -> None:
    torch.manual_seed(0)
    report = check(*timm_architecture(name).make())
    assert (len(report.served), report.refused) == (4, {})
    assert report.difference <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "albert",  # one block that runs many times
        "llama",  # rotary embeddings made in front are used all along
        "mixtral",
        "vit",
    ],
)
def test_transformers_are_served_at_every_depth(name: str) -> None:
    torch.manual_seed(0)
    report = check(*transformers_architecture(name).make())
    assert (len(report.served), report.refused) == (4, {})
    assert report.difference <= 1e-5


def test_tied_embeddings_are_refused_and_a_dense_block_inside() -> None:
    report = check(*transformers_architecture("llama, tied").make())
    assert report.served == []
    assert all("still trains" in why for why in report.refused.values())
    report = check(*torchvision_architecture("densenet121").make(), depths=2)
    assert report.served
    assert all("by another way" in why for why in report.refused.values())
    assert report.refused
