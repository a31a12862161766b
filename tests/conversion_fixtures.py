"""Published checkpoints with tiny weights, and a look at what the converter makes of them."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pheye import convert_checkpoint as converter
from pheye.benchmarks import conversion as benchmark

from tiny import tiny_config, tiny_text_config, tiny_tokenizer, tiny_vision_config

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CASES = ("x2-448", "x4-672")
INDEX = "model.safetensors.index.json"
VIT = "vision_encoder.vision_model.base_model.model."
Q_PROJ = VIT + "encoder.layers.0.self_attn.q_proj"
EMBEDDINGS = "lang_encoder.model.embed_tokens.weight"


def small_config(**kwargs):
    """Text 64 wide, vision 32 wide, blocks before layers 1 and 3 of 4, five views, LoRA ranks 2 and 4."""
    return tiny_config(
        **{
            "vision_config": tiny_vision_config(hidden_size=32),
            "text_config": tiny_text_config(hidden_size=64, intermediate_size=96),
            "tiles_per_side": 2,
            "cross_attention_interval": 2,
            "global_lora_rank": 2,
            "local_lora_rank": 4,
            **kwargs,
        }
    )


def make_tensors(config) -> dict[str, torch.Tensor]:
    """Random values that matter, under the published names."""
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.1 * noise if len(shape) == 1 and name.endswith("norm.weight") else noise * 0.15

    return benchmark.published_state(config, make)


def in_published_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks in float32, everything else in bfloat16."""
    return {name: tensor if "cross_attn" in name else tensor.bfloat16() for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict, config=None, **settings) -> Path:
    """A published repo in `folder`."""
    benchmark.write_published(folder, config or small_config(), tensors)
    tiny_tokenizer().save_pretrained(folder / "decoder")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a converted folder, as they are in its files."""
    index = json.loads((folder / INDEX).read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    return {name: tensor for held in files.values() for name, tensor in held.items()}


def contents(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, and what is in them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(capsys, source, output, *options) -> str:
    """The error with which a conversion ends, after a look that nothing is left of it."""
    before = sorted(output.parent.iterdir())
    assert converter.main([str(source), str(output), *options]) == 1
    assert sorted(output.parent.iterdir()) == before
    printed = capsys.readouterr().err
    error = printed[printed.index("error: ") :]
    assert error.endswith(f"\nNothing was written to {output}.\n")
    return error


def run(arguments: list, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)
