"""Pheye under transformers' own common tests, fetched by `run.py`; what cannot apply stands in EXCLUDED, with why."""

# ruff: noqa: E402 - the tests must be on the path before they are imported

import copy
import fnmatch
import importlib.util
import os
import sys
import unittest
from importlib import metadata

import numpy as np
import torch
from PIL import Image
from run import EXCLUDED as EXCLUDED_MARK
from run import ROOT, prepare
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import pheye
from pheye import (
    PheyeConfig,
    PheyeForConditionalGeneration,
    PheyeImageProcessor,
    PheyeModel,
    PheyeProcessor,
)

VERSION = tuple(int(part) for part in metadata.version("transformers").split(".")[:2])

sys.path.insert(0, str(prepare(metadata.version("transformers"))))
sys.path.append(str(ROOT / "tests"))

if os.environ.get("PHEYE_GENERATION_TESTS"):
    spec = importlib.util.spec_from_file_location("tests.generation.test_utils", os.environ["PHEYE_GENERATION_TESTS"])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import ImageProcessingTestMixin
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_processing_common import MODALITY_TEST_SPECS, ProcessorTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

from tiny import tiny_config, tiny_processor, tiny_text_config

# "Class.test", a pattern -> why it cannot apply to Pheye. A line that matches no test is an error.
EXCLUDED = {
    "PheyeImageProcessingTest.test_call_numpy_4_channels": (
        "wants images of 4 channels to stay so; Pheye's views are RGB, as its vision towers are"
    ),
    "PheyeImageProcessingTest.test_new_models_require_torchvision_backend": (
        "a rule for models inside transformers; Pheye's pixels are Pillow's, bit for bit"
    ),
}
if VERSION >= (5, 23):  # newer tests
    EXCLUDED |= {
        "PheyeProcessorTest.test_processor_text_has_no_visual": (
            "mixes texts with and without an image in a batch, but no mask keeps rows of a batch from the image"
        ),
        "PheyeImageProcessingTest.test_pil_can_run_without_torchvision": (
            "loads in a new process without trust_remote_code, which refuses all code outside transformers"
        ),
    }
if VERSION >= (5, 24):
    EXCLUDED |= {
        "PheyeModelTest.test_multimodal_outputs_are_returned": (
            "wants the output field `image_outputs`, which came with 5.24; Pheye gives an image's features as "
            "`image_hidden_states` on every release"
        ),
    }

# The common tests look class names up in these tables of transformers' own models, which `register` does not reach.
MODEL_MAPPING_NAMES["pheye"] = "PheyeModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["pheye"] = "PheyeForConditionalGeneration"
pheye.register()
# Older releases hide this class behind torchvision, which neither it nor Pheye needs.
sys.modules[ImageProcessingTestMixin.__module__].AutoImageProcessor = AutoImageProcessor


class PheyeModelTester:
    """What the common tests want to know of a tiny model, and inputs for it."""

    is_training = True
    batch_size = 3
    seq_length = 7

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.vocab_size = config.text_config.vocab_size
        self.causal_lm_class = PheyeForConditionalGeneration  # the name by which the training test finds the head

    def get_config(self) -> PheyeConfig:
        return tiny_config(text_config=tiny_text_config(num_hidden_layers=2, pad_token_id=1))

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = config.vision_config.image_size
        attention_mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        attention_mask[0, :2] = 0  # padded on the left
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size - 2) + 2,
            "attention_mask": attention_mask,
            "pixel_values": floats_tensor([self.batch_size, config.views_per_image, 3, size, size]),
        }
        return config, inputs


class PheyeModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (PheyeModel, PheyeForConditionalGeneration)
    all_generative_model_classes = (PheyeForConditionalGeneration,)
    # The vision tower's last norm is passed by, because the features are the states before it.
    test_all_params_have_gradient = False
    _is_composite = True
    model_tester = None

    def setUp(self):
        self.model_tester = PheyeModelTester(self)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """Behind the language model's own layers stand those of the image: a row per image, not per row of text."""
        layers = config.get_text_config(decoder=True).num_hidden_layers
        text_cache = copy.copy(past_key_values)
        text_cache.layers = past_key_values.layers[:layers]
        super()._check_past_key_values_for_generate(batch_size, text_cache, seq_length, config)

        config = self.model_tester.get_config()
        size = config.cross_attention_size // config.cross_attention_heads
        image_layers = past_key_values.layers[layers:]
        self.assertEqual(len(image_layers), len(config.cross_attention_layers))
        for layer in image_layers:
            for states in (layer.keys, layer.values):
                self.assertEqual(states.shape[1:], (config.cross_attention_heads, config.tokens_per_image, size))
                self.assertEqual(batch_size % states.shape[0], 0)


class PheyeConfigTest(unittest.TestCase):
    def setUp(self):
        self.model_tester = PheyeModelTester(self)

    def test_config(self):
        ConfigTester(self, PheyeConfig, common_properties=["views_per_image"]).run_common_tests()


# By the sign of the pixels they tell whether a factor has arrived. Theirs is -1, which Pheye refuses.
MODALITY_TEST_SPECS["images"]["init_time_kwargs"]["rescale_factor"] = 1e-5


class PheyeProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PheyeProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor


class PheyeImageTester:
    """Random pictures, and what becomes of them."""

    batch_size = 7
    num_channels = 3

    def prepare_image_processor_dict(self) -> dict:
        return {
            "tiles_per_side": 2,
            "size": {"height": 18, "width": 20},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.4, 0.5, 0.6],
        }

    def expected_output_image_shape(self, images: list) -> tuple[int, ...]:
        return 5, 3, 18, 20

    def prepare_image_inputs(self, equal_resolution: bool = False, numpify: bool = False, torchify: bool = False):
        random = np.random.default_rng(0)
        arrays = []
        for _ in range(self.batch_size):
            height, width = (60, 60) if equal_resolution else random.integers(30, 90, 2)
            arrays.append(random.integers(0, 256, (height, width, self.num_channels), dtype=np.uint8))
        if numpify:
            return arrays
        if torchify:
            return [torch.from_numpy(array).movedim(-1, 0) for array in arrays]
        return [Image.fromarray(array) for array in arrays]

    def prepare_processor_inputs(self, **kwargs) -> dict:
        return {"images": self.prepare_image_inputs(**kwargs)}


class PheyeImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    # These would be looked up by the name of this file's folder.
    image_processing_classes = {"pil": PheyeImageProcessor}
    image_processor_dict = PheyeImageTester().prepare_image_processor_dict()
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = PheyeImageTester()


def exclude(excluded: dict[str, str]):
    """Replace the tests that match a pattern by ones that say why they are left out."""
    classes = (PheyeModelTest, PheyeConfigTest, PheyeProcessorTest, PheyeImageProcessingTest)
    tests = {f"{cls.__name__}.{name}": (cls, name) for cls in classes for name in dir(cls) if name.startswith("test_")}
    for pattern, reason in excluded.items():
        matches = fnmatch.filter(tests, pattern)
        if not matches:
            raise LookupError(f"EXCLUDED has {pattern!r}, but there is no such test; remove the line.")
        for match in matches:
            cls, name = tests[match]
            setattr(cls, name, unittest.skip(EXCLUDED_MARK + reason)(getattr(cls, name)))


exclude(EXCLUDED)
