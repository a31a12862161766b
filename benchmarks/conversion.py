"""Time and memory of the converter on a checkpoint of full size: `python -m pheye.benchmarks.conversion`.

Makes a Pheye-x4-448 checkpoint with random weights in the published format (2.35 G parameters: 5.3 GB of disk, and of
memory while it is made), converts it and copies it in turn on the same disk, prints a table, and a line of JSON last.
Peak memory is that beyond the page cache, read from Linux's /proc; elsewhere it is left out.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel

from ..common.command import Parser
from ..configuration_pheye import PheyeConfig
from ..conversion.rules import LM_LAYER, OLD_BLOCK, Names, target_shapes, template_regex

VIEW_ROWS = 21  # of the published view vectors, whatever the number of views
POLL_SECONDS = 0.01


def make_tokenizer(size: int) -> dict:
    """A tokenizer.json of `size` tokens: one for the end of a text, one for each byte, and others without use."""
    end = "<|endoftext|>"
    tokens = [end, *sorted(ByteLevel.alphabet())]
    tokens += [f"<|{number}|>" for number in range(len(tokens), size)]
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": end, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
    }


def published_shapes(config: PheyeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's tensors, without those that it holds twice."""
    targets = target_shapes(config)
    names = Names(targets, config)
    shapes = {}
    for target, shape in targets.items():
        source = names.source_of(target)
        if source in shapes:  # the second part of a split one
            shape = (shapes[source][0] + shape[0], *shape[1:])
        if source.endswith("connector.embedding.weight"):
            shape = (VIEW_ROWS, *shape[1:])
        shapes[source] = shape
    width = config.vision_config.hidden_size
    return shapes | {f"vision_encoder.norm_lvl_3.{kind}": (width,) for kind in ("weight", "bias")}


def published_state(
    config: PheyeConfig, make_tensor: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict in the published format, with the layers and blocks that are in it twice."""
    tensors = {name: make_tensor(name, shape) for name, shape in published_shapes(config).items()}
    layer, block = template_regex(LM_LAYER), template_regex(OLD_BLOCK + "{rest}")
    for name, tensor in list(tensors.items()):
        if match := layer.fullmatch(name):
            tensors["lang_encoder.old_decoder_blocks.{layer}.{rest}".format(**match.groupdict())] = tensor
        elif match := block.fullmatch(name):
            tensors["lang_encoder.cross_attn_layers.{layer}.{rest}".format(**match.groupdict())] = tensor
    return tensors


def write_published(folder: Path, config: PheyeConfig, tensors: dict[str, torch.Tensor]):
    """checkpoint.pt and config.json of a published repo, encoder's and decoder's folders beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    config.vision_config.save_pretrained(folder / "encoder")
    config.text_config.save_pretrained(folder / "decoder")
    (folder / "decoder" / "tokenizer.json").write_text(json.dumps(make_tokenizer(config.vocab_size)))
    (folder / "decoder" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    settings = {
        "encoder": "encoder",
        "tokenizer": "decoder",
        "decoder": "decoder",
        "first_level": config.global_lora_rank > 0,
        "level": config.tiles_per_side,
        "cross_interval": config.cross_attention_interval,
        "from_layer": config.cross_attention_start_layer,
        "reduce": config.cross_attention_reduction,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(tensors, folder / "checkpoint.pt")


def make_full_size(folder: Path, config: PheyeConfig):
    """The published dtypes: blocks in float32, everything else in bfloat16."""
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02

    def make_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = noise if ".cross_attn_layer." in name else noise.bfloat16()
        tensor = torch.empty(shape, dtype=values.dtype)
        for chunk in tensor.view(-1).split(len(values)):
            chunk.copy_(values[: len(chunk)])
        return tensor

    write_published(folder, config, published_state(config, make_tensor))


def memory_beyond_page_cache(process: int) -> int:
    """Bytes of a process that no file backs, or 0 where there is no /proc or it has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)


def sync():
    """Wait until what was written is on the disk."""
    if hasattr(os, "sync"):
        os.sync()


def evict(path: Path):
    """Take a file out of the page cache, so that the next reader gets it from the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(path: Path):
    """Take a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def time_copy(checkpoint: Path, work: Path) -> dict:
    sync()
    start = time.perf_counter()
    shutil.copyfile(checkpoint, work / "copy.pt")
    returned = time.perf_counter()
    sync()
    result = {"returned": returned - start, "on_disk": time.perf_counter() - start}
    (work / "copy.pt").unlink()
    return result


def time_conversion(source: Path, work: Path) -> dict:
    sync()
    command = [sys.executable, "-m", "pheye.convert_checkpoint", str(source), str(work / "converted")]
    with open(work / "log.txt", "wb") as log:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, memory_beyond_page_cache(process.pid))
            time.sleep(POLL_SECONDS)
        returned = time.perf_counter()
    sync()
    result = {"returned": returned - start, "on_disk": time.perf_counter() - start, "peak": peak}
    if process.returncode:
        raise RuntimeError(f"The conversion failed:\n{(work / 'log.txt').read_text()}")
    shutil.rmtree(work / "converted")
    return result


def measure(work: Path, config: PheyeConfig, repeats: int) -> dict:
    """Make a checkpoint of `config` in `work`; convert and copy it in turn, `repeats` times each way."""
    source = work / "published"
    make_full_size(source, config)
    checkpoint = source / "checkpoint.pt"
    result, peak = {"bytes": checkpoint.stat().st_size, "repeats": repeats}, 0
    for state, prepare in (("disk", evict), ("cache", read_all)):
        copies, conversions = [], []
        for _ in range(repeats):
            prepare(checkpoint)
            copies.append(time_copy(checkpoint, work))
            prepare(checkpoint)
            conversions.append(time_conversion(source, work))
        peak = max(peak, *(run["peak"] for run in conversions))
        for moment in ("on_disk", "returned"):
            result[f"from_{state}_{moment}"] = compare(
                [run[moment] for run in copies], [run[moment] for run in conversions]
            )
    return {**result, "peak_gb": round(peak / 1e9, 3) if peak else None}


def compare(copies: list[float], conversions: list[float]) -> dict:
    """Medians and ranges of two lists of seconds, and the ratio of the medians."""
    ratio = statistics.median(conversions) / statistics.median(copies)
    result = {"ratio": round(ratio, 2)}
    for name, times in (("copy", copies), ("conversion", conversions)):
        result[f"{name}_s"] = round(statistics.median(times), 2)
        result[f"{name}_range_s"] = [round(min(times), 2), round(max(times), 2)]
    return result


ROWS = {
    "from_disk_on_disk": "from the disk, until it is on the disk",
    "from_disk_returned": "from the disk, until it returns",
    "from_cache_on_disk": "from the page cache, until it is on the disk",
    "from_cache_returned": "from the page cache, until it returns",
}


def print_table(result: dict):
    print(f"{result['bytes'] / 1e9:.2f} GB, medians of {result['repeats']} runs (fastest to slowest), in seconds\n")
    print("| | copy | conversion | conversion / copy |\n| --- | --- | --- | --- |")
    for name, words in ROWS.items():
        row, cells = result[name], []
        for part in ("copy", "conversion"):
            low, high = row[f"{part}_range_s"]
            cells.append(f"{row[f'{part}_s']} ({low} to {high})")
        print(f"| {words} | {' | '.join(cells)} | {row['ratio']} |")
    peak = f"{result['peak_gb']} GB" if result["peak_gb"] else "not measured (needs Linux's /proc)"
    print(f"\nPeak memory beyond the page cache: {peak}")


def main(argv: list[str] | None = None, config: PheyeConfig | None = None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", help="folder on the disk to measure; needs 17 GB (default: the temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pheye-conversion-", dir=args.workdir) as work:
        result = measure(Path(work), config or PheyeConfig.from_variant("x4-448"), args.repeats)
    print_table(result)
    print(json.dumps({"benchmark": "conversion", **result}))


if __name__ == "__main__":
    main()
