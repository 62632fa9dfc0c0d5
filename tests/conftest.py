"""Lets timm be imported beside a CPU build of torch."""

import torch

# torchvision's compiled part needs CUDA and defines two operators that its Python part looks up
# at import; naming them is enough, since no test calls them.
if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _library.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
