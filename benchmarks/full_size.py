"""Full-size models with random weights, made in seconds, straight in their dtype."""

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, ConvNextConfig, PhiConfig, PreTrainedModel

from pheye import PheyeConfig, PheyeForConditionalGeneration

NOISE_SIZE = 1 << 20
CONVNEXT_SIZES = {  # widths and depths of the published ConvNeXt's stages
    "T": ([96, 192, 384, 768], [3, 3, 9, 3]),
    "B": ([128, 256, 512, 1024], [3, 3, 27, 3]),
    "L": ([192, 384, 768, 1536], [3, 3, 27, 3]),
}


def chosen_config(variant: str) -> PheyeConfig:
    """The configuration of a published model, of one in a folder, or of a toy that tries a benchmark in seconds."""
    if Path(variant).is_dir():
        return PheyeConfig.from_pretrained(variant)
    if variant != "toy":
        return PheyeConfig.from_variant(variant)
    return PheyeConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=56,
        ),
        text_config=PhiConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
        ),
        tiles_per_side=2,
        cross_attention_interval=2,
    )


def with_branch(config: PheyeConfig, convnext: str, **kwargs) -> PheyeConfig:
    """`config` with a ConvNeXt of the size "T", "B" or "L" as high-resolution branch; `kwargs` override its fields."""
    widths, depths = CONVNEXT_SIZES[convnext]
    branch = ConvNextConfig(hidden_sizes=widths, depths=depths)
    return PheyeConfig.from_dict(config.to_dict() | {"high_res_vision_config": branch.to_dict(), **kwargs})


def with_budgets(config: PheyeConfig, layers: list[int], kind: str = "block") -> PheyeConfig:
    """`config` with self-attention of this kind at `layers`, and a budget for each number of them: the first ones."""
    budgets = [layers[:number] for number in range(len(layers) + 1)]
    fields = {"self_attention_kind": kind, "self_attention_layers": layers, "self_attention_budgets": budgets}
    return PheyeConfig.from_dict(config.to_dict() | fields)


def without_budgets(config: PheyeConfig) -> PheyeConfig:
    """The configuration of plain Pheye."""
    added = {
        "self_attention_kind": "block",
        "self_attention_layers": [],
        "self_attention_budgets": [],
        "router_size": 0,
        "visual_convolution_kernel": 0,
    }
    return PheyeConfig.from_dict(config.to_dict() | added)


def random_model(
    config: PheyeConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PheyeForConditionalGeneration:
    """A Pheye in evaluation mode that was never held in another dtype; for its speed, not for its answers."""
    with torch.device("meta"):
        model = PheyeForConditionalGeneration._from_config(config, dtype=dtype)
    return fill(model, device)


def fill(model: PreTrainedModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Give the tensors of `model` that are on the meta device memory on `device`: noise as weights, and buffers."""
    noise = torch.randn(NOISE_SIZE, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty_like(parameter, device=device)
                if values.ndim == 1:
                    values.fill_(1.0 if name == "weight" else 0.0)  # of norms; all others are biases
                else:
                    for chunk in values.view(-1).split(NOISE_SIZE):
                        chunk.copy_(noise[: len(chunk)])
                module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name]._is_hf_initialized = True
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False
    # Buffers that no checkpoint holds are made by the library's initialization, which leaves marked parameters alone.
    model.initialize_weights()
    return model.eval()
