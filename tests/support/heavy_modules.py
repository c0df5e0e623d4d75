"""Modules that cost seconds to import and that a command must not load unless it uses them."""

import torch

# Before 2.7 torch itself loads sympy with much of what it offers.
_SYMPY = ("sympy",) if torch.__version__ >= (2, 7) else ()

HEAVY = ("torch._dynamo", *_SYMPY, "torchvision", "timm", "matplotlib")
