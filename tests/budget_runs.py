"""Small models with budgets, and folders of them, for the tests of the recipe that trains them."""

import json
from pathlib import Path

from pheye import PheyeForConditionalGeneration

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor, tiny_text_config

LAYERS = [3, 5]  # of 6, with cross-attention before 1, 3 and 5
BUDGETS = [[], [3], [5], [3, 5]]


def model_with_budgets(**kwargs) -> PheyeForConditionalGeneration:
    defaults = {"self_attention_layers": LAYERS, "self_attention_budgets": BUDGETS, "lora_dropout": 0.0}
    return tiny_model(tiny_config(**{"text_config": tiny_text_config(num_hidden_layers=6), **defaults, **kwargs}))


def save(folder: Path, model: PheyeForConditionalGeneration) -> Path:
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


KINDS = ("What is written on the sign?", "Is there a cat?")


def write_questions(folder: Path, pictures: int, answer=lambda picture, kind: ("stop", "yes")[kind]) -> Path:
    """A question of each kind about each picture, in LLaVA's format."""
    folder.mkdir(exist_ok=True)
    rows = []
    for picture in range(pictures):
        tiny_image(picture).save(folder / f"{picture}.png")
        turns = []
        for kind, question in enumerate(KINDS):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer(picture, kind)}]
        rows.append({"id": str(picture), "image": f"{picture}.png", "conversations": turns})
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder / "questions.json"
