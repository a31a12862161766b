"""Pheye-nano from nothing: pictures, pre-training of both frozen parts, and the paper's three stages."""

from ..common.command import require

for _package in ("matplotlib", "skimage", "spellchecker"):
    require(_package, "nano")
