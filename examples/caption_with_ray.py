"""Captions of many images by Ray Data, for those who have a Ray cluster: one copy of the model per GPU.

    pip install ".[ray]"
    python examples/caption_with_ray.py --model your-name/your-pheye --images s3://bucket/photos --output s3://bucket/out

IMAGES is a folder of files, here or in object storage, or a folder of Parquet files with a column of encoded images
(`--column`). Rows stream through the cluster, so neither images nor captions need fit into a memory. A row of the
output, JSON lines in OUTPUT, has `image`, and `caption` or `error`. To go on after a kill, give the images that are
not yet in the output; `pheye caption` does that by itself, with `accelerate launch`.
"""

import argparse

import torch

from pheye.answering.engine import answer_batches, open_model
from pheye.answering.rows import Request
from pheye.processing_pheye import CAPTION_INSTRUCTION


class Captioner:
    """A model on one GPU, or on a CPU where there is none."""

    def __init__(self, model: str, prompt: str, max_new_tokens: int):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        _, load = open_model(model, None, "auto", device)
        self.model, self.processor = load()
        self.prompt, self.generate_kwargs = prompt, {"max_new_tokens": max_new_tokens, "do_sample": False}

    def __call__(self, batch: dict) -> dict:
        """image, bytes -> image, caption, error; of the last two one is None."""
        # Ray gives bytes as they are. Nobody but Ray opens paths and URLs.
        requests = [
            Request(name, data, self.prompt) for name, data in zip(batch["image"], batch["bytes"], strict=True)
        ]
        size = len(requests)
        [answered] = answer_batches(self.model, self.processor, requests, size, 0, self.generate_kwargs)
        return {
            "image": [request.id for request, *_ in answered],
            "caption": [caption for _, caption, *_ in answered],
            "error": [error for _, _, error, _ in answered],
        }


def caption(
    model: str,
    images: str,
    output: str,
    *,
    column: str | None = None,
    prompt: str = CAPTION_INSTRUCTION,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    actors: int = 1,
):
    """Write the captions; the arguments are the command's options."""
    import ray

    if column is None:
        rows = ray.data.read_binary_files(images, include_paths=True).rename_columns({"path": "image"})
    else:
        rows = ray.data.read_parquet(images, columns=[column], include_paths=True)

        def named(row: dict) -> dict:
            cell = row[column]  # as `datasets` writes images: a struct of bytes and path
            return {"image": row["path"], "bytes": cell["bytes"] if isinstance(cell, dict) else cell}

        rows = rows.map(named)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    rows.map_batches(
        Captioner,
        fn_constructor_args=(model, prompt, max_new_tokens),
        batch_size=batch_size,
        num_gpus=1 if has_gpus else None,
        num_cpus=None if has_gpus else 1,
        concurrency=actors,
    ).write_json(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that every machine sees, or a Hub id")
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--column", help="of Parquet files")
    parser.add_argument("--prompt", default=CAPTION_INSTRUCTION)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--actors", type=int, default=1, help="copies of the model: GPUs of the cluster")
    caption(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
