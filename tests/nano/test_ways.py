"""The ways of training Pheye-nano that are compared, on tiny parts: they differ as they say."""

import pytest
import torch
from torch import nn

from pheye import PheyeForConditionalGeneration
from pheye.nano.comparing.ways import WAYS, build

from tiny import randomize, tiny_model, tiny_processor

pytestmark = pytest.mark.once


def test_each_way_differs_as_it_says(parts):
    names = ("full", "k1", "one_lora", "no_lora", "every_layer", "every4th", "paper_start", "prefix", "frozen_prefix")
    models = {name: build(WAYS[name], seed=0, tiles_per_side=3, lora_sets=2, parts=parts)[0] for name in names}
    assert models["full"].config.cross_attention_layers == (1, 3) and models["full"].config.views_per_image == 10
    assert models["k1"].config.views_per_image == 2
    assert models["every_layer"].config.cross_attention_layers == (0, 1, 2, 3)
    assert models["every4th"].config.cross_attention_layers == (3,)
    assert models["one_lora"].pheye.global_lora is models["one_lora"].pheye.local_lora
    assert models["full"].pheye.global_lora is not models["full"].pheye.local_lora
    spread = {
        name: models[name].pheye.cross_attention_blocks[0].to_q.weight.std().item() for name in ("full", "paper_start")
    }
    assert spread["full"] == pytest.approx(4 * spread["paper_start"], rel=1e-3)  # of one seed
    for name, model in models.items():
        assert any("lora" in key for key, _ in model.named_parameters()) == (name != "no_lora")
    for name, model in models.items():
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and not any("vision_tower" in key for key in trained)
        assert any("language_model" in key for key in trained) == (name == "prefix")


@torch.no_grad()
def test_one_lora_set_sees_every_view_alike(parts):
    for name in ("full", "one_lora"):
        model, _ = build(WAYS[name], seed=0, tiles_per_side=3, lora_sets=2, parts=parts)
        for key, parameter in model.named_parameters():
            if "_lora." in key:
                nn.init.normal_(parameter)
        views = torch.rand(1, 1, 3, 224, 224).expand(-1, 10, -1, -1, -1)
        global_view, *crops = model.pheye.encode_views(views).last_hidden_state
        assert all(torch.allclose(crop, crops[0], atol=1e-4) for crop in crops)
        assert torch.allclose(global_view, crops[0], atol=1e-4) == (name == "one_lora")


def test_the_same_seed_gives_the_same_start(parts):
    first, again, other = (
        build(WAYS["full"], seed, tiles_per_side=3, lora_sets=2, parts=parts)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_command_says_how_many_lora_sets_and_crops_unless_the_way_does(parts):
    asked = {"seed": 0, "tiles_per_side": 2, "lora_sets": 0}
    for name, views, has_lora in (("full", 5, False), ("one_lora", 5, True), ("k1", 2, False)):
        model, processor = build(WAYS[name], **asked, parts=parts)
        assert model.config.views_per_image == processor.image_processor.tiles_per_side**2 + 1 == views
        assert any("_lora." in key for key, _ in model.named_parameters()) == has_lora


@pytest.mark.parametrize("tiles_per_side", [1, 3])
def test_ways_of_looking_begin_with_blocks_that_learnt(tiles_per_side, tmp_path):
    start = tiny_model(tiles_per_side=tiles_per_side)
    for name, parameter in start.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)  # what it learnt
    old = start.pheye.cross_attention_blocks.state_dict()
    start.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    for name, views, lora in (("full", 10, True), ("k1", 2, True), ("one_lora", 10, True), ("no_lora", 10, False)):
        model, processor = build(WAYS[name], seed=0, tiles_per_side=3, lora_sets=2, start=tmp_path)
        assert model.config.views_per_image == processor.image_processor.tiles_per_side**2 + 1 == views
        second = [parameter for key, parameter in model.named_parameters() if "_lora." in key and key.endswith(".B")]
        assert bool(second) == lora and not any(parameter.any() for parameter in second)  # LoRA begins as nothing
        blocks = model.pheye.cross_attention_blocks.state_dict()
        assert all(torch.equal(blocks[key], learnt) for key, learnt in old.items())
        vectors, learnt = (one.pheye.view_encoding.view_embedding.weight for one in (model, start))
        assert torch.equal(vectors, learnt) == (vectors.shape == learnt.shape)


@pytest.mark.parametrize("lora_sets", [0, 2])
def test_ways_with_new_blocks_have_eyes_that_learnt(lora_sets, parts_with_branch):
    whole = PheyeForConditionalGeneration.from_pretrained(parts_with_branch).state_dict()
    for name in ("full", "frozen_prefix", "small_cap", "perceiver"):
        model, _ = build(WAYS[name], seed=0, tiles_per_side=1, lora_sets=lora_sets, parts=parts_with_branch)
        learns = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        found = {key.replace(".layer.", "."): value for key, value in model.state_dict().items()}
        for key, value in whole.items():
            part = key.split(".")[1]
            is_kept = part not in ("view_encoding", "cross_attention_blocks")
            if part != "cross_attention_blocks" or name == "full":
                assert is_kept == (key in found and torch.equal(found[key], value)), (name, key)
        trained = {key.split(".")[1] for key, is_learnt in learns.items() if is_learnt}
        new = {"view_encoding"} if name == "frozen_prefix" else {"view_encoding", "cross_attention_blocks"}
        assert trained == new | ({"global_lora", "local_lora"} if lora_sets else set())
    assert model.config.cross_attention_layers == (1, 3)  # and not before every layer


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "frozen_prefix", "casa"])
def test_ways_with_a_branch_see_through_it(name, parts_with_branch):
    model, processor = build(WAYS[name], seed=0, tiles_per_side=1, lora_sets=0, parts=parts_with_branch)
    randomize(model).eval()
    inputs = processor(images=torch.rand(3, 60, 50), text="What?", return_tensors="pt")
    other = {**inputs, "high_res_pixel_values": inputs["high_res_pixel_values"] + 1}
    seen, changed = (model(**one, labels=inputs["input_ids"]).logits for one in (inputs, other))
    assert not torch.allclose(seen[0, -1], changed[0, -1])
    ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert getattr(ids, "sequences", ids)[0, -1] == seen[0, -1].argmax()


def test_the_prefix_model_says_what_its_forward_pass_predicts(parts):
    model, processor = build(WAYS["prefix"], seed=0, tiles_per_side=3, lora_sets=2, parts=parts)
    model.eval()
    inputs = processor(images=torch.rand(3, 60, 50), text="What?", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False).sequences
        length = inputs["input_ids"].shape[1]
        assert torch.equal(ids[:, :length], inputs["input_ids"])
        logits = model(**inputs, labels=inputs["input_ids"]).logits
        assert logits.shape[1] == 10 * 17 + length
        assert logits[0, -1].argmax() == ids[0, length]
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1}, labels=inputs["input_ids"]).logits
        assert not torch.allclose(logits[0, -1], other[0, -1])
