"""What `generate` does with images: they are encoded once, keep one row each, and only the first pass sees them.

An answer ends at the language model's last position.
"""

import functools
from collections.abc import Callable

from transformers import Cache, GenerationMixin
from transformers.utils import logging

from .configuration_pheye import learned_positions
from .layers_pheye import CACHE

PIXELS = ("pixel_values", "high_res_pixel_values")
IMAGE_INPUTS = (*PIXELS, "image_grids", "image_hidden_states")
PER_IMAGE = (*IMAGE_INPUTS, "vision_budget")  # what has a row per image, and goes with it

logger = logging.get_logger(__name__)


class PheyeGenerationMixin(GenerationMixin):
    """For a model whose part `pheye` is a `PheyeModel`."""

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids=None, **model_kwargs):
        images = {name: model_kwargs.pop(name) for name in PER_IMAGE if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _prepare_generated_length(self, **kwargs):
        generation_config = super()._prepare_generated_length(**kwargs)
        generation_config._text_length = kwargs["input_ids_length"]  # of the text that `max_length` counts
        return generation_config

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        self._end_at_last_position(generation_config, model_kwargs)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        chunked = generation_config.prefill_chunk_size is not None
        if not chunked and generation_config.use_cache is not False:
            return
        # Without a cache every step needs the image, and prefill in chunks takes no pixels: encode it beforehand.
        cache = model_kwargs.get(CACHE)
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
        features, mask = self.pheye.image_features(cache, **images)
        if features is not None and chunked and cache is not None:
            self.pheye.fill_image_caches(cache, features, mask, model_kwargs.pop("vision_budget", None))
        elif features is not None:
            model_kwargs.update(image_hidden_states=features, image_grids=images["image_grids"])

    def _end_at_last_position(self, generation_config, model_kwargs: dict):
        """The library would go on, to an index error or to positions that the language model never saw."""
        left = self.pheye.positions_left(int(model_kwargs["position_ids"].max()) + 1)  # padding takes none
        if left is None:
            return
        longest = generation_config._text_length + max(left, 1)  # the last token needs no position
        if generation_config.max_length > longest:
            logger.warning_once(
                f"The answer ends after {max(left, 1)} tokens at the latest: the language model has "
                f"{self.config.text_positions} positions."
            )
            generation_config.max_length = longest

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the names that it may take
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration: bool = False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("use_cache", True) and self._holds_image(inputs.get(CACHE)):
            for name in PER_IMAGE:
                inputs.pop(name, None)
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.vision_budget is not None:  # without a cache each step reads the image anew, and the same way
            model_kwargs["vision_budget"] = outputs.vision_budget
        return model_kwargs

    def _holds_image(self, cache: Cache | None) -> bool:
        return cache is not None and self.pheye.image_caches(cache)[0].is_initialized

    def _get_candidate_generator(self, generation_config, model_kwargs, assistant_model=None, **kwargs):
        if generation_config.assistant_early_exit is not None:
            raise ValueError("Pheye cannot leave its language model early: assistant_early_exit must be None.")
        positions = None if assistant_model is None else learned_positions(assistant_model.config.get_text_config())
        if positions is not None and positions < generation_config.max_length:
            raise ValueError(
                f"The assistant has {positions} positions, but the text may get {generation_config.max_length} tokens "
                "long; give a smaller max_new_tokens, or another assistant."
            )
        if assistant_model is not None:
            # An assistant that only reads text guesses without the image; this model corrects it. One that sees gets
            # features of its own, for pixels do not reach its first pass, which is no first iteration to the library.
            images = {name: model_kwargs.get(name) for name in (*PIXELS, "image_grids")}
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in PER_IMAGE}
            if assistant_model.config.model_type == self.config.model_type and images["pixel_values"] is not None:
                if assistant_model.config.high_res_vision_config is None:
                    images["high_res_pixel_values"] = None
                features, _ = assistant_model.pheye.image_features(None, **images)
                model_kwargs.update(image_hidden_states=features, image_grids=images["image_grids"])
        generator = super()._get_candidate_generator(
            generation_config=generation_config, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        if generation_config.prompt_lookup_num_tokens is not None:
            # It would guess tokens behind the last one of the answer, for which there may be no position.
            generator.get_candidates = functools.partial(
                _candidates_up_to, generation_config.max_length, generator.get_candidates
            )
        return generator


def _candidates_up_to(length: int, get_candidates: Callable, *args, **kwargs) -> tuple:
    ids, logits = get_candidates(*args, **kwargs)
    return ids[:, :length], logits
