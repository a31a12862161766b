"""Look at a photograph and at a page of text as Pheye does, and answer.

    python examples/demo.py [--model FOLDER_OR_ID] [--output FOLDER]

Without `--model` the weights are random, since no trained small model ships yet: everything runs as it would, and the
answers mean nothing.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from skimage import data
from transformers import CLIPVisionConfig, PhiConfig, PreTrainedTokenizerFast

from pheye import (
    PheyeConfig,
    PheyeForConditionalGeneration,
    PheyeImageProcessor,
    PheyeImageToTextPipeline,
    PheyeProcessor,
)
from pheye.image_processing_pheye import resize, tile_boxes

QUESTIONS = [
    ("photograph", "chelsea.png", "What animal is this? Answer the question using a single word or phrase"),
    ("page", "page.png", "What is the heading of this page? Answer the question using a single word or phrase"),
]


def random_parts() -> tuple[PheyeForConditionalGeneration, PheyeProcessor]:
    """A small Pheye with random weights, and a processor whose tokenizer has one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([end, *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    config = PheyeConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, patch_size=28
        ),
        text_config=PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        ),
        cross_attention_interval=2,
    )
    return PheyeForConditionalGeneration(config).eval(), PheyeProcessor(PheyeImageProcessor(), tokenizer)


def draw_views(image: Image.Image, tiles: int, size: int = 224) -> Image.Image:
    """The global view beside the enlarged picture, its crops outlined and numbered in the order the model reads."""
    canvas = Image.new("RGB", (size * (tiles + 1) + 10, size * tiles), "white")
    canvas.paste(resize(image, (size, size), Image.Resampling.BICUBIC), (0, 0))
    enlarged = resize(image, (size * tiles, size * tiles), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(enlarged)
    for number, box in enumerate(tile_boxes(tiles, size, size), start=1):
        draw.rectangle(box, outline="red", width=2)
        draw.text((box[0] + 6, box[1] + 4), str(number), fill="red", font_size=24)
    canvas.paste(enlarged, (size + 10, 0))
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a trained Pheye; random weights without it")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the pictures go")
    arguments = parser.parse_args()
    if arguments.model:
        model = PheyeForConditionalGeneration.from_pretrained(arguments.model).eval()
        processor = PheyeProcessor.from_pretrained(arguments.model)
    else:
        print("These weights are RANDOM: no trained small model ships yet, so the answers below mean nothing.\n")
        model, processor = random_parts()
    pipe = PheyeImageToTextPipeline(model=model, processor=processor)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, file, question in QUESTIONS:
        image = Image.open(Path(data.__file__).parent / file).convert("RGB")
        answer = pipe(image, prompt=question, max_new_tokens=16)[0]["generated_text"]
        views = arguments.output / f"{name}-views.png"
        draw_views(image, model.config.tiles_per_side).save(views)
        print(f"{name} ({image.width} x {image.height}): {question}\n  answer: {answer!r}\n  views: {views}\n")


if __name__ == "__main__":
    main()
