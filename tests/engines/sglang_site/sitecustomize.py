"""Lets SGLang run on a PyTorch built for the CPU; Python imports this by itself when it starts.

SGLang's packages lie in a directory of their own, behind vLLM's. Its wheel of torchvision belongs
to a PyTorch with CUDA and stops at operators that the CPU build does not declare; and memory pages
cannot be pinned without a GPU, so that wish is dropped.
"""

import functools
import os
import sys

sys.path.append(f"{os.environ['ENGINES']}/sglang")

import torch

_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _without_pinning(make):
    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return wrapped


for _name in ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like"):
    setattr(torch, _name, _without_pinning(getattr(torch, _name)))
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
