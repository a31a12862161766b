"""The converted folder but for its card and processor: weights in shards, configs, code."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..common.command import InputError
from .reading import read_tensors
from .rules import SAFETENSORS_DTYPES, Plan

if TYPE_CHECKING:
    from ..configuration_pheye import PheyeConfig

ELEMENTS_AT_ONCE = 1 << 24  # in one write; bounds the memory that a change of dtype takes


def write_weights(
    folder: Path, weights: Path, plan: Plan, dtype: torch.dtype | None, max_shard_size: int, stop: threading.Event
):
    """Write the model's tensors as safetensors shards, and the index that says which tensor is where.

    weights: the published checkpoint.pt. dtype: of all tensors, None for each one's own. stop: when set, the writing
    ends and leaves what there is.
    """
    layout = {
        name: torch.empty(piece.shape, dtype=dtype or piece.dtype, device="meta")
        for name, piece in plan.pieces.items()
    }
    shards = split_into_shards({name: tensor.nbytes for name, tensor in layout.items()}, max_shard_size)
    total = sum(tensor.nbytes for tensor in layout.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise InputError(f"The weights take {total:,} bytes, but the disk of OUTPUT has {free:,} left; make room.")
    weight_map, tensors = {}, {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            # Mapped anew for each shard, so that the pages which the last one read are let go.
            tensors.clear()
            tensors.update(read_tensors(weights))
            for size in write_shard(folder / file, {name: layout[name] for name in names}, plan, tensors):
                progress.update(size)
                if stop.is_set():
                    return
    parameters = sum(tensor.numel() for tensor in layout.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_into_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes; a larger tensor is alone in its group."""
    shards, room = [], 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_shard(
    path: Path, layout: dict[str, torch.Tensor], plan: Plan, tensors: dict[str, torch.Tensor]
) -> Iterator[int]:
    """One safetensors file: length of the header, header, tensors; yields bytes of tensors as they are written.

    The library's own writer wants the whole file in memory.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in layout.items():
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(path, "wb", buffering=0) as file:
        write_all(file, len(text).to_bytes(8, "little") + text)
        for name, tensor in layout.items():
            piece = plan.pieces[name]
            values = tensors[piece.source] if piece.rows is None else tensors[piece.source][piece.rows]
            values = values.contiguous().reshape(-1)
            for start in range(0, values.numel(), ELEMENTS_AT_ONCE):
                chunk = cast(values[start : start + ELEMENTS_AT_ONCE], tensor.dtype, piece.source)
                write_all(file, chunk.view(torch.uint8).numpy())
                yield chunk.nbytes


def write_all(file, data):
    """Write all of `data`; an unbuffered file may take less at once."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if not torch.equal(result.isfinite(), values.isfinite()):
        raise InputError(f"{name} holds values beyond the range of {dtype}; choose another --dtype.")
    return result


def write_configs(folder: Path, config: "PheyeConfig", tokenizer):
    """Configuration, generation configuration and the code that they name."""
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.text_config.bos_token_id
    generation = GenerationConfig(
        bos_token_id=bos, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)


def code_files() -> list[Path]:
    """What a model folder carries of this package."""
    return sorted(Path(__file__).parent.parent.glob("*_pheye.py"))
