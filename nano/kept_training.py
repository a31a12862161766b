"""Short training on kept features, for experiments: what `nano.replay` does, in memory and to its end."""

import itertools
import statistics
import time

import torch
from torch import nn

from .. import PheyeForConditionalGeneration
from ..training.vision_budgets import drawn_budget
from .checkpoints import autocast, rate_share
from .features import FeatureStore, as_image, schedule


def train(model: PheyeForConditionalGeneration, store: FeatureStore, steps: int, rate: float, seed: int) -> dict:
    """Train what requires gradients; of a model with budgets, each step trains one.

    Returns: the mean loss of the last tenth of the steps, and the median seconds of a step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    budgets = len(model.config.self_attention_budgets)
    losses, seconds = [], []
    for step, (number, is_new, indices) in enumerate(itertools.islice(schedule(None, seed), steps)):
        if is_new:
            store.encode(number, model)
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * rate_share(step, step / steps)
        batch = {name: values.to(model.device) for name, values in store.batch(indices).items()}
        budget = {"vision_budget": drawn_budget(seed, step, budgets)} if budgets else {}
        with autocast(model.device.type):
            image = as_image(model, batch.pop("features"), batch.pop("image_grids", None))
            loss = model(**image, **batch, **budget).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    last = losses[-max(1, steps // 10) :]
    return {"loss": round(statistics.mean(last), 4), "seconds_per_step": round(statistics.median(seconds), 3)}
