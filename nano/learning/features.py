"""Features of pictures, kept on the disk: what the vision tower gives while neither it nor its LoRA trains."""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ... import PheyeForConditionalGeneration, PheyeProcessor
from ...canvases_pheye import views_in
from ...common.command import InputError
from ...modeling_pheye import PheyeModel
from ...training.collator import IGNORED, PheyeCollator
from ...training.mixture import Mixture
from .checkpoints import autocast

BATCH = 8  # pictures of a step, and of a file
STEPS = 4  # of a round
ALONE = 40  # rounds before pictures are used again, of one step each
USES = 4  # of a picture, at most


def schedule(rounds: int | None, seed: int) -> Iterator[tuple[int, bool, list[int]]]:
    """For each step its round, whether it is on that round's new pictures, and the numbers of its pictures.

    `rounds`: how many there are; without end if None.
    """
    rng, uses = random.Random(f"kept {seed}"), []
    for number in itertools.count() if rounds is None else range(rounds):
        new = list(range(len(uses), len(uses) + BATCH))
        uses += [1] * BATCH
        yield number, True, new
        for _ in range(STEPS - 1 if number >= ALONE else 0):
            chosen = rng.sample([index for index, count in enumerate(uses) if count < USES], BATCH)
            for index in chosen:
                uses[index] += 1
            yield number, False, chosen


@torch.no_grad()
def save_features(file: Path, model: PheyeForConditionalGeneration, image_inputs: dict[str, torch.Tensor]):
    """Store what the vision tower gives to the view encoding for the pictures of some rows: (sum of V, N, D), one
    picture after another, and where the model needs them their grids (B, I, 2)."""
    image_inputs = {name: values.to(model.device) for name, values in image_inputs.items()}
    with autocast(model.device.type):
        seen = model.pheye.encode_views(**image_inputs).last_hidden_state
    tensors = {"features": seen.bfloat16().contiguous()}
    if "image_grids" in image_inputs:
        tensors["image_grids"] = image_inputs["image_grids"].cpu()
    temporary = file.with_suffix(".new")
    save_file(tensors, temporary)
    os.replace(temporary, file)


def as_image(
    model: PheyeForConditionalGeneration, features: torch.Tensor, image_grids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What the model takes in place of pixels, of features (sum of V, N, D) of some pictures."""
    if image_grids is None:
        return {"image_hidden_states": model.pheye.view_encoding(features)}
    table = model.pheye.views_of(image_grids, len(image_grids), None)
    return {"image_hidden_states": model.pheye.view_encoding(features, table), "image_grids": image_grids}


def kept_image(
    file: Path, model: PheyeForConditionalGeneration, processor: PheyeProcessor, images: Callable[[], list]
) -> dict[str, torch.Tensor]:
    """What the model takes in place of pixels, from the features in `file`, which begin with those of `images()`."""
    if not file.exists():
        save_features(file, model, processor.image_processor(images(), return_tensors="pt"))
    kept = load_file(file, model.device.type)
    return as_image(model, kept["features"].float(), kept.get("image_grids"))


class FeatureStore:
    """The samples of a mixture in random order, again from the start where it ends, and their features on the disk.

    Args:
        together: pictures that are encoded by one call, and whose features are in one file.
        seed: of the order.
    """

    def __init__(self, folder: Path, mixture: Mixture, processor: PheyeProcessor, together: int, seed: int):
        self.folder, self.mixture, self.collator = folder, mixture, PheyeCollator(processor)
        self.texts: dict[int, tuple[list[int], list[int]]] = {}  # by their place in the order
        self.together = together
        self.order = random.Random(f"order {seed}").sample(range(len(mixture)), len(mixture))
        folder.mkdir(parents=True, exist_ok=True)

    def sample(self, index: int) -> dict:
        return self.mixture[self.order[index % len(self.order)]]

    def text(self, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample. They are kept, as samples are used several times, and asked for their length."""
        place = index % len(self.order)
        if place not in self.texts:
            self.texts[place] = self.collator.encode_sample(self.sample(index))
        return self.texts[place]

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def encode(self, number: int, model: PheyeForConditionalGeneration):
        """Store what the vision tower gives to the view encoding for the pictures of file `number`.

        Raises:
            InputError: if a picture cannot be read.
        """
        if self.file(number).exists():
            return
        samples = [self.sample(number * self.together + row) for row in range(self.together)]
        image_inputs, errors = self.collator.open_images([sample["images"] for sample in samples])
        for sample, error in zip(samples, errors, strict=True):
            if error is not None:
                raise InputError(f"{sample['id']}: {error} Draw the data anew.")
        save_features(self.file(number), model, image_inputs)

    def features(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(V, N, D), and the grids (I, 2) of its pictures where the model needs them."""
        number, row = divmod(index, self.together)
        with safe_open(self.file(number), "pt") as file:
            features = file.get_slice("features")
            if "image_grids" not in file.keys():  # noqa: SIM118 (it is no dictionary)
                views = features.get_shape()[0] // self.together
                return features[row * views : (row + 1) * views], None
            grids = file.get_tensor("image_grids")
            counts = [sum(map(views_in, images)) for images in grids.tolist()]
            return features[sum(counts[:row]) : sum(counts[: row + 1])], grids[row]

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Text, padded on the right, features (sum of V, N, D) and, where the model needs them, grids (B, I, 2) of the
        samples of these numbers, which have equally many pictures."""
        rows = [self.text(index) for index in indices]
        inputs = self.collator.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (_, learnt) in enumerate(rows):
            labels[row, : len(learnt)] = torch.tensor(learnt)
        features, grids = zip(*(self.features(index) for index in indices), strict=True)
        batch = {**inputs, "labels": labels, "features": torch.cat(features).float()}
        return batch if grids[0] is None else {**batch, "image_grids": torch.stack(grids)}

    def length(self, index: int) -> int:
        """Tokens of a sample's text."""
        return len(self.text(index)[0])

    def batches(self, indices: list[int], rows: int) -> list[dict[str, torch.Tensor]]:
        """The same in batches of `rows` samples, of texts alike in length, which need little padding."""
        ordered = sorted(indices, key=self.length)
        return [self.batch(ordered[first : first + rows]) for first in range(0, len(ordered), rows)]


@contextmanager
def features_as_pixels(pheye: PheyeModel) -> Iterator[None]:
    """Within, `pheye` takes features (B, V, N, D) that were kept in place of pixels (B, V, 3, height, width)."""

    def get_image_features(pixel_values: torch.Tensor, *args, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pheye.view_encoding(pixel_values.flatten(0, 1)))

    pheye.get_image_features = get_image_features
    try:
        yield
    finally:
        del pheye.get_image_features
