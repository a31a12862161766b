"""The model card of a converted checkpoint."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..common.published import PAPER_URL, PUBLISHED
from .reading import Conversion

if TYPE_CHECKING:
    from ..configuration_pheye import PheyeConfig

PUBLISHED_SIZES = (2048, 24, 1280, 32)  # width and layers of language model and ViT

CARD = """
# {title}

[Pheye]({paper}): a frozen language model that reads an image through dense cross-attention blocks, at
{pixels} x {pixels} pixels: one global view and {tiles} x {tiles} crops. Converted from {source}.

```python
from transformers import pipeline

pheye = pipeline("image-to-text", model="{model}", trust_remote_code=True)
print(pheye("picture.jpg", prompt="What is written on the sign?"))
```

`AutoModelForImageTextToText.from_pretrained("{model}", trust_remote_code=True)` and
`AutoProcessor.from_pretrained("{model}", trust_remote_code=True)` give model and processor. Pin `revision=` to a
commit: it holds for the code as for the weights.

## Published scores

{scores}

## How it was made

`pheye convert` (pheye {version}) renamed and split the tensors of the published checkpoint; their values
{values}.

| | |
| --- | --- |
| source | {source} |
| source revision | {revision} |
| sha256 of `checkpoint.pt` | `{sha256}` |
| vision encoder (configuration) | {encoder} |
| language model (configuration, tokenizer) | {decoder} |
| parameters | {parameters:,} |

## Dtypes

{dtypes}

## Licence

The source states no licence for its weights, and neither does this copy: ask its authors before you use it for more
than the law grants you anyway. The code files come from the package pheye and are under Apache-2.0.
"""


def find_variant(config: "PheyeConfig") -> str | None:
    from ..configuration_pheye import VARIANTS

    for variant, numbers in VARIANTS.items():
        if all(getattr(config, name) == value for name, value in numbers.items()):
            return variant
    return None


def describe_scores(config: "PheyeConfig", variant: str | None) -> str:
    if variant is None:
        return "The paper reports no model with these numbers."
    headings = [f"{published.benchmark} {published.split} {published.metric}" for published in PUBLISHED.values()]
    scores = [published.of_variant(variant) for published in PUBLISHED.values()]
    rows = [("model", *headings), ("---",) * (1 + len(headings)), (f"Pheye-{variant}", *scores)]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    text, vision = config.text_config, config.vision_config
    sizes = (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers)
    note = "They were not measured again after the conversion."
    if sizes != PUBLISHED_SIZES:
        note = "This model has other sizes than the published one, so they are not its own."
    return f"The paper reports, for the published model:\n\n{table}\n\n{note}"


def describe_dtypes(conversion: Conversion) -> str:
    """What is stored in which dtype, and what loading makes of it."""
    counts = Counter()
    for piece in conversion.plan.pieces.values():
        counts[dtype_name(conversion.dtype or piece.dtype)] += math.prod(piece.shape)
    held = ", ".join(f"{count:,} parameters in {name}" for name, count in counts.most_common())
    loaded = dtype_name(conversion.config.dtype)
    size = sum(counts.values()) * conversion.config.dtype.itemsize / 1e6
    size = f"{size / 1e3:.1f} GB" if size >= 1e3 else f"{size:.1f} MB"
    widest = "float64" if "float64" in counts else "float32"
    kept = (
        "Every tensor is stored as in the source" if conversion.dtype is None else f"All tensors were cast to {loaded}"
    )
    return (
        f"{kept}: {held}. `config.dtype` is that of the language model's weights, {loaded}, so a plain load casts all "
        f"of it to {loaded} and takes {size}; `dtype=torch.{widest}` gets every stored bit back."
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_card_data(conversion: Conversion, variant: str | None, title: str) -> ModelCardData:
    """The card's metadata; the scores are among them only for the published repo itself."""
    results = None
    if variant is not None and conversion.checkpoint.name == f"miguelcarv/Pheye-{variant}":
        results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset,
                dataset_name=published.benchmark,
                dataset_split=published.split,
                metric_type=published.metric.lower(),
                metric_value=published.of_variant(variant),
                source_name="Efficient Architectures for High Resolution Vision-Language Models",
                source_url=PAPER_URL,
            )
            for dataset, published in PUBLISHED.items()
        ]
    base_models = [conversion.hub_ids[part] for part in ("encoder", "decoder") if conversion.hub_ids[part]]
    return ModelCardData(
        language="en",
        license="other",
        license_name="none-stated-by-the-source",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        tags=["pheye", "vision-language-model", "image-to-text", "visual-question-answering", "custom_code"],
        model_name=title if results else None,
        eval_results=results,
    )


def write_card(folder: Path, model: str, conversion: Conversion, sha256: str):
    """README.md; `model` is what the reader will load, a Hub id or a folder."""
    config, name, revision = conversion.config, conversion.checkpoint.name, conversion.checkpoint.revision
    variant, title = find_variant(config), model.split("/")[-1]
    on_hub = revision is not None
    body = CARD.format(
        title=title,
        paper=PAPER_URL,
        pixels=config.tiles_per_side * config.vision_config.image_size,
        tiles=config.tiles_per_side,
        source=f"[{name}](https://huggingface.co/{name})" if on_hub else f"the folder `{name}`",
        model=model,
        scores=describe_scores(config, variant),
        version=__version__,
        values="are untouched" if conversion.dtype is None else f"were cast to {dtype_name(config.dtype)}",
        revision=f"`{revision}`" if on_hub else "unknown (a local folder)",
        sha256=sha256,
        encoder=conversion.hub_ids["encoder"] or "a local folder",
        decoder=conversion.hub_ids["decoder"] or "a local folder",
        parameters=sum(math.prod(piece.shape) for piece in conversion.plan.pieces.values()),
        dtypes=describe_dtypes(conversion),
    )
    data = make_card_data(conversion, variant, title)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")
