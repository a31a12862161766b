"""Answer questions about a photograph and a page of text, and draw where Pheye looks for each word.

    python examples/demo.py [--model FOLDER_OR_ID] [--output FOLDER]

Without `--model` the weights are random, since no trained small model ships yet: everything runs as it would, and the
answers mean nothing.
"""

import argparse
from pathlib import Path

from PIL import Image
from skimage import data
from transformers import CLIPVisionConfig, PhiConfig, PreTrainedTokenizerFast

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from pheye.evaluation.attention import explain

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

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, file, question in QUESTIONS:
        image = Image.open(Path(data.__file__).parent / file).convert("RGB")
        drawing, found = explain(model, processor, image, question, max_new_tokens=16)
        path = arguments.output / f"{name}-attention.png"
        drawing.save(path)
        print(f"{name} ({image.width} x {image.height}): {question}")
        print(f"  answer: {found['answer']!r}\n  attention: {path}\n")


if __name__ == "__main__":
    main()
