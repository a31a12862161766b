"""The model card: what the converted model is, where it comes from, and what is stored in which dtype."""

import hashlib
import re

import pytest
import torch
from huggingface_hub import ModelCard

from pheye import convert_checkpoint as converter
from pheye.common.published import PUBLISHED
from pheye.configuration_pheye import VARIANTS

from conversion_fixtures import CASES, GOLDEN, ROOT, in_published_dtypes, make_tensors, small_config, stored, write

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with the converted golden cases."""
    folder = tmp_path_factory.mktemp("converted")
    for case in CASES:
        converter.convert(str(GOLDEN / case), folder / case)
    return folder


@pytest.mark.parametrize(
    ("case", "scores"),
    [("x2-448", ("76.0", "111.8", "47.3", "108.9")), ("x4-672", ("75.5", "110.8", "49.2", "111.9"))],
)
def test_the_card_says_what_it_is_and_where_it_comes_from(converted, case, scores):
    card = ModelCard.load(converted / case / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    assert (card.data.license, card.data.license_name) == ("other", "none-stated-by-the-source")
    assert "states no licence" in card.text
    assert card.data.base_model is None  # encoder and decoder of the golden cases are no repos
    assert {"pheye", "image-to-text", "custom_code"} <= set(card.data.tags)
    assert f"| Pheye-{case} | {' | '.join(scores)} |" in card.text
    assert "other sizes than the published one, so they are not its own" in card.text
    assert card.data.eval_results is None
    assert hashlib.sha256((GOLDEN / case / "checkpoint.pt").read_bytes()).hexdigest() in card.text
    assert str(ROOT) not in card.text


def test_the_card_says_what_is_stored_in_which_dtype(tmp_path):
    mixed = in_published_dtypes(make_tensors(small_config()))
    converter.convert(str(write(tmp_path / "source", mixed)), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    target = stored(tmp_path / "out").values()
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        count = sum(tensor.numel() for tensor in target if tensor.dtype == dtype)
        assert f"{count:,} parameters in {name}" in text
    assert "`config.dtype` is that of the language model's weights, bfloat16" in text
    assert "`dtype=torch.float32` gets every stored bit back" in text


def test_no_field_of_the_card_is_left_open(converted):
    for case in CASES:
        assert not re.search(r"\{\w*\}", (converted / case / "README.md").read_text())


def test_published_scores_cover_the_published_variants():
    for published in PUBLISHED.values():
        assert {f"Pheye-{variant}" for variant in VARIANTS} <= published.scores.keys()
