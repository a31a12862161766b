"""A Pheye for another number of crops, or with LoRA, that keeps what it learnt."""

import copy

import torch

from ... import PheyeConfig, PheyeForConditionalGeneration
from ...common.command import InputError

SPREAD = 0.25  # of the numbers that tell rows and columns of new crops apart; features have a spread of about 1


def crop_vectors(old: torch.Tensor, tiles_per_side: int) -> torch.Tensor:
    """Vectors (k * k, D) for new crops, whose mean is that of the old ones, and random numbers for row and column.

    With vectors that are alike a model cannot know in which crop a word goes on that runs out of another, and what
    tells them apart would have to grow from nothing.
    """
    generator = torch.Generator().manual_seed(0)
    places = SPREAD * torch.randn(2, tiles_per_side, old.shape[1], generator=generator)
    rows, columns = places - places.mean(1, keepdim=True)
    return old.mean(0) + (rows[:, None] + columns).flatten(0, 1)


def with_places_changed(model: PheyeForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Weights of a model of one crop that sees its crop as it saw the global view: norm, vector and LoRA.

    The global view gets the crop's norm and vector. It keeps its LoRA, for that of the crop has a higher rank.

    Raises:
        InputError: if the global view's LoRA is of a higher rank than that of the crop, and so does not fit.
    """
    weights, config = dict(model.state_dict()), model.config
    encoding, vectors = "pheye.view_encoding", "pheye.view_encoding.view_embedding.weight"
    weights[vectors] = weights[vectors].flip(0)
    for name in ("weight", "bias"):
        one, other = f"{encoding}.global_norm.{name}", f"{encoding}.local_norm.{name}"
        weights[one], weights[other] = weights[other], weights[one]
    rank, room = config.global_lora_rank, config.local_lora_rank
    if rank > room:
        raise InputError(f"LoRA of the global view has rank {rank}, which does not fit into the crops' {room}.")
    for name in [name for name in weights if ".global_lora." in name]:
        crop_name = name.replace(".global_lora.", ".local_lora.")
        new = weights[crop_name].clone()
        if name.endswith(".A"):
            new[:rank] = weights[name]
        else:
            new[:, rank:] = 0
            new[:, :rank] = weights[name] * (config.global_lora_alpha / rank) / (config.local_lora_alpha / room)
        weights[crop_name] = new
    return weights


def set_lora(config: PheyeConfig):
    """Give LoRA of the usual ranks to what has none."""
    usual = PheyeConfig()
    config.global_lora_rank = config.global_lora_rank or usual.global_lora_rank
    config.local_lora_rank = config.local_lora_rank or usual.local_lora_rank


def with_crops(
    model: PheyeForConditionalGeneration, tiles_per_side: int, with_lora: bool
) -> PheyeForConditionalGeneration:
    """`model` for `tiles_per_side` x `tiles_per_side` crops, with new vectors for them if it had another number of
    crops, and with places changed if it had one; LoRA that is new starts as nothing."""
    config = copy.deepcopy(model.config)
    config.tiles_per_side = tiles_per_side
    if with_lora:
        set_lora(config)
    is_cut_now = model.config.tiles_per_side == 1 < tiles_per_side
    weights = with_places_changed(model) if is_cut_now else model.state_dict()
    if tiles_per_side != model.config.tiles_per_side:
        name = "pheye.view_encoding.view_embedding.weight"
        weights[name] = torch.cat([weights[name][:1], crop_vectors(weights[name][1:], tiles_per_side)])
    larger = PheyeForConditionalGeneration(config)
    new = {name: weight for name, weight in larger.state_dict().items() if name not in weights and "_lora." in name}
    larger.load_state_dict({**weights, **new})
    return larger.eval()
