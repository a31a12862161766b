"""The Pheye that ships: small, with one copy of the code, loaded and pushed like any other; and it reads."""

import json
import os
import random
import shutil
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image
from transformers import pipeline

import pheye
from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.nano import language
from pheye.nano.drawing import pictures, words
from pheye.nano.drawing.questions import SIGN

from hub_server import FakeHub
from tiny import tiny_image

ROOT = Path(__file__).parent.parent.parent
NANO = ROOT / "checkpoints" / "pheye-nano"
CODE = sorted(file.name for file in ROOT.glob("*_pheye.py"))

LOAD = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("image-to-text", model=folder, trust_remote_code=True)
[answer] = pipe("image.png", prompt="Is there a circle?", max_new_tokens=5)
print("REPORT" + json.dumps([type(model).__name__, type(processor).__name__, answer, "pheye" in sys.modules]))
"""

PUSH = """
import sys
from huggingface_hub import HfApi

HfApi().create_repo("me/nano")
HfApi().upload_folder(repo_id="me/nano", folder_path=sys.argv[1])
"""


def run(script: str, folder: Path, model: Path = NANO, environment: dict[str, str] | None = None) -> str:
    tiny_image().save(folder / "image.png")
    command = [sys.executable, "-c", script, model]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_is_small():
    model = PheyeForConditionalGeneration.from_pretrained(NANO)
    assert model.num_parameters() <= 12_000_000
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 26_000_000
    assert model.config.tiles_per_side == 3 and model.config.cross_attention_interval == 1
    assert model.pheye.global_lora and model.pheye.local_lora and model.pheye.high_res_tower


def test_its_code_is_that_of_the_repository():
    assert sorted(file.name for file in NANO.glob("*.py")) == CODE
    for name in CODE:
        assert not (NANO / name).is_symlink()
        assert (NANO / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} differs: run `make format`"


def test_a_copy_of_its_folder_loads_by_its_own_code_in_a_fresh_process(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(NANO, copy, symlinks=True)  # as cp -r does
    model, processor, answer, is_pheye_imported = json.loads(run(LOAD, tmp_path, copy).rpartition("REPORT")[2])
    assert (model, processor) == ("PheyeForConditionalGeneration", "PheyeProcessor") and not is_pheye_imported
    assert answer["generated_text"] in ("yes", "no")


def test_pushing_it_uploads_the_code(tmp_path):
    with FakeHub() as hub:
        run(PUSH, tmp_path, environment=hub.environment(tmp_path / "cache"))
        repo = hub.repos["me/nano"]
        files = repo.commits[repo.branches["main"]].files
        for name in CODE:
            assert hub.contents[files[name]] == (ROOT / name).read_bytes(), name


def signs(texts: list[str], seed: int, cap_heights: tuple[float, float] = (0.03, 0.06)) -> list[Image.Image]:
    """Pictures with fonts and photographs that training never showed, one for each text."""
    rng = random.Random(seed)
    options = {"sizes": (400, 1000), "cap_heights": cap_heights}
    return [pictures.scene(rng, True, text=text, **options).image for text in texts]


def read(folder: Path, images: list[Image.Image]) -> list[str]:
    pheye.register()
    kind = pheye.PheyeImageToTextPipeline
    pipe = pipeline("image-to-text", model=str(folder), pipeline_class=kind)
    return [answer["generated_text"] for [answer] in pipe(images, prompt=SIGN, max_new_tokens=12)]


def likeness(answer: str, text: str) -> float:
    """1 for what is read exactly, 0 if no letter is right."""
    return SequenceMatcher(None, answer, text).ratio()


def new_words(count: int) -> list[str]:
    rng = random.Random("new words")
    return [words.word(rng, True, 3, 7) for _ in range(count)]


@pytest.mark.slow
def test_it_reads_new_signs():
    """The goal is nine of ten signs right."""
    texts = new_words(36)
    answers = read(NANO, signs(texts, seed=10))
    alike = [[likeness(answer, text) for text in texts] for answer in answers]
    own = mean(row[place] for place, row in enumerate(alike))
    others = mean(ratio for place, row in enumerate(alike) for other, ratio in enumerate(row) if other != place)
    assert own > others + 0.4, (answers, texts)
    assert sum(answer == text for answer, text in zip(answers, texts, strict=True)) >= 32, (answers, texts)


@pytest.mark.slow
def test_its_language_model_answers_about_shapes_that_it_is_told():
    model, processor = PheyeForConditionalGeneration.from_pretrained(NANO), PheyeProcessor.from_pretrained(NANO)
    right = []
    for seed in range(40):
        question, answer = language.lesson(random.Random(f"told {seed}"), most_shapes=5)
        prompt = processor.apply_chat_template([question], add_generation_prompt=True)
        ids = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        right.append(processor.tokenizer.decode(written, skip_special_tokens=True).strip() == answer["content"])
    assert sum(right) >= 38
