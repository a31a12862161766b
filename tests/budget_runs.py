"""Small models with budgets, and folders of them, for the tests of the recipe that trains them."""

from pathlib import Path

from pheye import PheyeForConditionalGeneration

from tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config

LAYERS = [3, 5]  # of 6, with cross-attention before 1, 3 and 5
BUDGETS = [[], [3], [5], [3, 5]]


def model_with_budgets(**kwargs) -> PheyeForConditionalGeneration:
    defaults = {"self_attention_layers": LAYERS, "self_attention_budgets": BUDGETS, "lora_dropout": 0.0}
    return tiny_model(tiny_config(**{"text_config": tiny_text_config(num_hidden_layers=6), **defaults, **kwargs}))


def save(folder: Path, model: PheyeForConditionalGeneration) -> Path:
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder
