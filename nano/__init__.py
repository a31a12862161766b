"""Pheye-nano from nothing: pictures, pre-training of both frozen parts, and the paper's three stages."""

from ..common.command import require

for _package in ("matplotlib", "skimage", "spellchecker"):
    require(_package, "nano")

from .learning import backbones  # noqa: E402, F401 - models with one of them load then
