"""Tiny models with random weights, and what goes with them, for tests that run in milliseconds."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PhiConfig, PreTrainedTokenizerFast

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor

END = "<|endoftext|>"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([END, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)


def tiny_vision_config(**kwargs) -> CLIPVisionConfig:
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    return CLIPVisionConfig(**{**defaults, **kwargs})


def tiny_text_config(**kwargs) -> PhiConfig:
    defaults = {
        "vocab_size": 257,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return PhiConfig(**{**defaults, **kwargs})


def tiny_config(**kwargs) -> PheyeConfig:
    """k = 2, blocks before layers 1 and 3 of 4."""
    defaults = {"tiles_per_side": 2, "cross_attention_interval": 2, "global_lora_rank": 2, "local_lora_rank": 4}
    return PheyeConfig(
        **{"vision_config": tiny_vision_config(), "text_config": tiny_text_config(), **defaults, **kwargs}
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that matters, so that no part of the model can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm_weight else noise * 0.1)
    return model


def tiny_model(config: PheyeConfig | None = None, seed: int = 0, **kwargs) -> PheyeForConditionalGeneration:
    """In evaluation mode; `kwargs` go to `tiny_config`."""
    return randomize(PheyeForConditionalGeneration(config or tiny_config(**kwargs)), seed).eval()


def tiny_processor(config: PheyeConfig | None = None) -> PheyeProcessor:
    config = config or tiny_config()
    size = config.vision_config.image_size
    image_processor = PheyeImageProcessor(
        tiles_per_side=config.tiles_per_side,
        canvases=config.canvases,
        max_images=config.max_images,
        size={"height": size, "width": size},
        high_res_tile_size=config.high_res_tile_size,
    )
    return PheyeProcessor(image_processor, tiny_tokenizer())


def tiny_image(seed: int = 0, width: int = 90, height: int = 70) -> Image.Image:
    """Random colours in patches large enough to survive the resize."""
    colours = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def tiny_pixels(images: int = 2, views: int = 5, size: int = 32) -> torch.Tensor:
    return torch.randn(images, views, 3, size, size, generator=torch.Generator().manual_seed(0))


def tiny_text(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(0))
