"""Let Pheye-nano read signs that are drawn as it runs, and look at a photograph; and draw where it looks.

    python examples/demo.py [--model FOLDER_OR_ID] [--output FOLDER] [--signs 10] [--seed 0]

The words on the signs, real and made-up, their fonts and photographs never occurred in its training. `--model` asks
another model the same.
"""

import argparse
import random
from pathlib import Path

from PIL import Image
from skimage import data

from pheye import PheyeForConditionalGeneration, PheyeImageToTextPipeline, PheyeProcessor
from pheye.common.command import Parser
from pheye.evaluation.heatmaps import explain
from pheye.nano.drawing import pictures, words
from pheye.nano.drawing.questions import SIGN
from pheye.processing_pheye import CAPTION_INSTRUCTION

NANO = Path(__file__).parent.parent / "checkpoints" / "pheye-nano"
CAP_HEIGHTS = 0.03, 0.06  # of the letters, over the picture's height
TOKENS = 40


def drawn_signs(count: int, seed: int) -> list[pictures.Picture]:
    rng = random.Random(seed)
    return [
        pictures.scene(rng, True, sizes=(400, 900), cap_heights=CAP_HEIGHTS, text=words.word(rng, True, 3, 7))
        for _ in range(count)
    ]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NANO, help="folder or Hub id of a trained Pheye; by default Pheye-nano")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the pictures go")
    parser.add_argument("--signs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = PheyeForConditionalGeneration.from_pretrained(arguments.model)
    processor = PheyeProcessor.from_pretrained(arguments.model)
    pipe = PheyeImageToTextPipeline(model=model, processor=processor)
    arguments.output.mkdir(parents=True, exist_ok=True)

    signs = drawn_signs(arguments.signs, arguments.seed)
    print(SIGN)
    answers = pipe([sign.image for sign in signs], prompt=SIGN, max_new_tokens=TOKENS)
    for number, (sign, [answer]) in enumerate(zip(signs, answers, strict=True), start=1):
        path = arguments.output / f"sign-{number}.png"
        sign.image.save(path)
        print(f"  {sign.signs[0]:8} read as {answer['generated_text']!r:12} {path}")
    right = [answer["generated_text"] == sign.signs[0] for sign, [answer] in zip(signs, answers, strict=True)]
    print(f"  {sum(right)} of {len(signs)} right\n")
    shown = signs[right.index(True) if any(right) else 0]  # where it looks as it reads a sign, if it has read one

    photograph = Image.open(Path(data.__file__).parent / "coffee.png").convert("RGB")
    for name, image, question in (
        ("sign", shown.image, CAPTION_INSTRUCTION),
        ("photograph", photograph, "Is there a circle?"),
    ):
        drawing, found = explain(model, processor, image, question, max_new_tokens=TOKENS)
        path = arguments.output / f"{name}-attention.png"
        drawing.save(path)
        print(f"{name} ({image.width} x {image.height}): {question}")
        print(f"  answer: {found['answer']!r}\n  crops and attention: {path}\n")


if __name__ == "__main__":
    main()
