"""Pheye: efficient high-resolution vision-language models as a Hugging Face Transformers plugin."""

import importlib
from importlib import metadata

from packaging.version import Version

__version__ = "0.1.0"

OLDEST_TRANSFORMERS = "5.17.0"
if Version(metadata.version("transformers")) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"pheye needs transformers>={OLDEST_TRANSFORMERS}, but transformers=={metadata.version('transformers')} is "
        "installed; upgrade it: pip install --upgrade transformers"
    )

_EXPORTS = {
    "PheyeConfig": "configuration_pheye",
    "PheyeImageProcessor": "image_processing_pheye",
    "PheyeProcessor": "processing_pheye",
    "PheyePreTrainedModel": "modeling_pheye",
    "PheyeModel": "modeling_pheye",
    "PheyeForConditionalGeneration": "modeling_pheye",
    "PheyeImageToTextPipeline": "pipeline_pheye",
}

__all__ = ["register", *_EXPORTS]


def __getattr__(name: str):
    # Lazy, because transformers and torch take seconds to import (PEP 562).
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def register():
    """Make transformers' Auto classes know Pheye, so that folders and repos load without `trust_remote_code`."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    # Not from transformers itself, where older releases hide it unless torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_pheye import PheyeConfig
    from .image_processing_pheye import PheyeImageProcessor
    from .modeling_pheye import PheyeForConditionalGeneration
    from .processing_pheye import PheyeProcessor

    AutoConfig.register("pheye", PheyeConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(PheyeConfig, PheyeForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(PheyeConfig, image_processor_classes={"pil": PheyeImageProcessor}, exist_ok=True)
    AutoProcessor.register(PheyeConfig, PheyeProcessor, exist_ok=True)
