"""Numbers of any kind in a model's files give a model that computes, or one error that names what is wrong."""

import json

import pytest
import torch
from PIL import Image

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeProcessor

from tiny import tiny_config, tiny_processor, tiny_text

st = pytest.importorskip("hypothesis.strategies", reason="hypothesis is not installed")
from searching import SECONDS, search  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]

BASE = json.loads(tiny_config().to_json_string(use_diff=False))
OWN = [name for name in PheyeConfig.__dataclass_fields__ if name in PheyeConfig.__annotations__ and name in BASE]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 64, 128, 1000, 2**31, 10**30, 0.5, -0.5, 1e308, 1e-308]),
    st.integers(-5, 70),
    st.floats(),
)
OTHERS = st.sampled_from(
    [None, True, False, "", "3", "abc", "\ud800", [], [1], ["a"], {}, {"a": 1}, {"model_type": "phi"}]
)
PARTS = st.sampled_from(["vision_config", "text_config"])
SIZES = st.sampled_from(["num_channels", "image_size", "patch_size", "hidden_size", "num_hidden_layers"])
PLACES = st.one_of(
    st.sampled_from(OWN).map(lambda name: (name,)),
    st.tuples(PARTS, SIZES),
    st.sampled_from([name for name in dir(PheyeConfig) if not name.startswith("__")]).map(lambda name: (name,)),
)
CHANGES = st.lists(st.tuples(PLACES, NUMBERS | NUMBERS | OTHERS), min_size=1, max_size=3)


def changed(base: dict, changes: list) -> dict:
    config = json.loads(json.dumps(base))
    for place, value in changes:
        inner = config
        for key in place[:-1]:
            inner = inner[key] if isinstance(inner.get(key), dict) else {}
        inner[place[-1]] = value
    return config


def is_said(error: Exception) -> bool:
    """Clear errors: ours, those by which transformers checks its own fields, and torch's of too large a model."""
    if isinstance(error, RuntimeError):
        return "size calculation overflowed" in str(error)
    return isinstance(error, (ValueError, TypeError)) or type(error).__name__.startswith("StrictDataclass")


def check_config(changes):
    theirs = {place[0] for place, _ in changes} - {*OWN, "vision_config", "text_config"}
    try:
        config = PheyeConfig.from_dict(changed(BASE, changes))
        if max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) > 1000:
            return  # a model as large as its file says
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in PheyeForConditionalGeneration(config).parameters())
    except Exception as error:
        assert is_said(error) or theirs, repr(error)  # the base class' own fields are transformers' matter
        return
    assert config.views_per_image <= 4097
    if size > 5_000_000 or config.tokens_per_image > 1000 or config.vision_config.image_size > 1000 or theirs:
        return
    model = PheyeForConditionalGeneration(config)
    rows, columns = config.grids[0]
    inputs = {"pixel_values": torch.randn(1, 1 + rows * columns, 3, *2 * [config.vision_config.image_size])}
    if config.canvases is not None or config.max_images > 1:
        inputs["image_grids"] = torch.tensor([[[rows, columns]]])
    for part in (model.train(), model.eval()):
        with torch.no_grad():
            assert part(tiny_text(1, 3), **inputs).logits.isfinite().all()


def test_a_configuration_that_is_accepted_computes():
    search(check_config, CHANGES, rounds=30)


IMAGE_PROCESSOR = tiny_processor().image_processor
SETTINGS = "tiles_per_side size resample image_mean image_std rescale_factor data_format input_data_format device"
SWITCHES = "do_rescale do_normalize do_resize do_convert_rgb do_center_crop do_pad"
NAMES = st.sampled_from([*SETTINGS.split(), *SWITCHES.split()])
LISTS = st.lists(NUMBERS | OTHERS, min_size=2, max_size=4)
DICTS = st.dictionaries(st.sampled_from(["height", "width", "shortest_edge"]), NUMBERS | OTHERS, max_size=3)


def check_processor(folder):
    def check(changes):
        path = folder / "processor_config.json"
        settings = json.loads((folder / "kept.json").read_text())
        settings["image_processor"].update(changes)
        path.write_text(json.dumps(settings))
        try:
            processor = PheyeProcessor.from_pretrained(folder)
            size = processor.image_processor.size
            if processor.image_processor.tiles_per_side * max(size.height, size.width) > 300:
                return
            pixels = processor(images=Image.new("RGB", (30, 20), "red"), text="a", return_tensors="pt")["pixel_values"]
        except Exception as error:
            assert is_said(error), repr(error)
            return
        assert pixels.isfinite().all() and pixels.abs().max() <= 1e4
        views = 1 + processor.image_processor.tiles_per_side**2
        assert pixels.shape == (1, views, 3, size.height, size.width)

    return check


def test_a_processors_file_that_is_accepted_gives_pixels(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").rename(tmp_path / "kept.json")
    changes = st.dictionaries(NAMES, NUMBERS | OTHERS | LISTS | DICTS, min_size=1, max_size=3)
    # A list for a size is read by transformers, before anything of Pheye.
    changes = changes.filter(lambda drawn: not isinstance(drawn.get("size"), list))
    search(check_processor(tmp_path), changes, rounds=400)
