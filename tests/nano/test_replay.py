"""Training on features that are kept: the same as on pictures, and after a stop as without."""

import json
from collections import Counter

import pytest
import torch

from pheye import PheyeForConditionalGeneration
from pheye.answering.engine import answer_batches
from pheye.answering.rows import Request
from pheye.nano import replay
from pheye.nano.learning import checkpoints, features, kept_training
from pheye.nano.learning.features import FeatureStore
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture, read_mixture

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model and five pictures with a question each; rounds of two pictures."""
    for module in (features, replay):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(features, "STEPS", 2)
    monkeypatch.setattr(features, "ALONE", 0)
    monkeypatch.setattr(checkpoints, "WARMUP", 1)
    monkeypatch.setattr(replay, "SAVE_EVERY", 1)
    monkeypatch.setattr(replay, "LOG_EVERY", 2)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    rows = []
    for number in range(5):
        tiny_image(number).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "AB" * (1 + number)}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def train(folder, name, rounds):
    replay.train(folder / "model", [str(folder / "data.json")], folder / name, rounds, learning_rate=1e-2)
    return PheyeForConditionalGeneration.from_pretrained(folder / name).state_dict()


@pytest.mark.parametrize("canvases", [None, [[1, 2], [2, 2], [2, 1]]])
def test_features_stand_for_their_pictures(folder, canvases):
    for number in range(5):
        tiny_image(number, 40 + 15 * number, 70).save(folder / f"{number}.png")  # of several shapes
    model, processor = tiny_model(canvases=canvases), tiny_processor(tiny_config(canvases=canvases))
    mixture = Mixture(read_mixture([str(folder / "data.json")], turns=None), 0)
    store = FeatureStore(folder / "features", mixture, processor, together=2, seed=0)
    for number in range(3):  # the sixth picture is the first again
        store.encode(number, model)
    indices = [4, 1, 5]
    batch = store.batch(indices)
    image = features.as_image(model, batch.pop("features"), batch.pop("image_grids", None))
    found = model(**image, **batch)
    names = ("input_ids", "attention_mask", "labels", *processor.image_processor.model_input_names)
    whole = PheyeCollator(processor)([store.sample(index) for index in indices])
    expected = model(**{name: whole[name] for name in names})
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=0)  # features are kept in bfloat16
    assert all(torch.equal(batch[name], whole[name]) for name in names[:3])
    assert store.sample(5) == store.sample(0) and len({store.sample(index)["id"] for index in range(5)}) == 5


def test_a_text_is_encoded_once_however_often_it_is_used(folder, monkeypatch):
    encoded, encode = [], PheyeCollator.encode_sample

    def count(self, sample):
        encoded.append(sample["id"])
        return encode(self, sample)

    monkeypatch.setattr(PheyeCollator, "encode_sample", count)
    mixture = Mixture(read_mixture([str(folder / "data.json")], turns=None), 0)
    store = FeatureStore(folder / "features", mixture, tiny_processor(), together=1, seed=0)
    for number in range(5):
        store.encode(number, tiny_model())
    batches = [batch for _ in range(2) for batch in store.batches(list(range(5)), 2)]
    assert sorted(encoded) == sorted(store.sample(index)["id"] for index in range(5))
    assert all(torch.equal(one["labels"], other["labels"]) for one, other in zip(batches, batches[3:], strict=False))
    assert store.length(5) == store.length(0) and len(encoded) == 5


def test_blocks_and_view_encoding_train_and_nothing_else(folder):
    before, after = tiny_model().state_dict(), train(folder, "run", 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("cross_attention_blocks" in name or "view_encoding" in name for name in changed)
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(row["loss"] != row["kept_loss"] for row in rows)


@pytest.mark.parametrize("canvases", [None, [[1, 2], [2, 2], [2, 1]]])
def test_a_step_in_parts_is_the_step_of_all_samples(folder, monkeypatch, canvases):
    model, processor = tiny_model(canvases=canvases), tiny_processor(tiny_config(canvases=canvases))
    model.save_pretrained(folder / "canvases")
    mixture = Mixture(read_mixture([str(folder / "data.json")], turns=None), 0)
    store = FeatureStore(folder / "features", mixture, processor, together=1, seed=0)
    for number in range(5):
        store.encode(number, model)
    parts = store.batches(list(range(5)), 2)
    lengths = [length for part in parts for length in part["attention_mask"].sum(1).tolist()]
    assert [len(part["labels"]) for part in parts] == [2, 2, 1] and lengths == sorted(lengths)
    steps = []
    for part in (2, 5):
        monkeypatch.setattr(kept_training, "PART", part)
        trained = kept_training.opened(folder / "canvases", "cpu")
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        loss = kept_training.learn(trained, torch.optim.SGD(parameters, lr=0.1), store, list(range(5)))
        steps.append((loss, torch.cat([parameter.detach().flatten() for parameter in parameters])))
    before = torch.cat([parameter.flatten() for parameter in parameters_of(folder / "canvases")])
    [(loss, after), (whole_loss, whole_after)] = steps
    assert loss == pytest.approx(whole_loss, rel=1e-3)
    assert (after - whole_after).norm() < 0.02 * (after - before).norm()  # some products are in bfloat16


@pytest.mark.parametrize(("canvases", "seed"), [(None, 2), ([[1, 2], [2, 2], [2, 1]], 5)])
def test_answers_from_features_are_those_from_pixels(tmp_path, monkeypatch, canvases, seed):
    """With these seeds no answer depends on the digits that features lose in bfloat16."""
    monkeypatch.setattr(kept_training, "BATCH", 2)
    config = tiny_config(canvases=canvases, max_images=2)
    model, processor = tiny_model(config, seed=seed), tiny_processor(config)
    wide, high, square = (tiny_image(seed, *size) for seed, size in enumerate([(80, 40), (40, 80), (50, 50)]))
    both = [wide, high]
    images = [wide, both, square, both, wide]
    requests = [Request(number, image, f"What is {number}?") for number, image in enumerate(images)]
    options = {"generate_kwargs": {"max_new_tokens": kept_training.TOKENS, "do_sample": False}, "workers": 0}
    batches = answer_batches(model, processor, requests, batch_size=1, **options)
    expected = [{"id": request.id, "answer": text} for batch in batches for request, text, _, _ in batch]
    assert len({row["answer"] for row in expected}) > 3  # so that mixing them up shows
    assert kept_training.ask(model, processor, requests, tmp_path / "asked") == expected
    assert len(list((tmp_path / "asked").iterdir())) == 2  # of three subjects, two together
    monkeypatch.setattr(features, "save_features", None)  # nothing is encoded again
    assert kept_training.ask(model, processor, requests, tmp_path / "asked") == expected


def parameters_of(folder):
    trained = kept_training.opened(folder, "cpu")
    return [parameter.detach() for parameter in trained.parameters() if parameter.requires_grad]


def test_a_model_without_lora_trains_as_well(folder):
    tiny_model(global_lora_rank=0, local_lora_rank=0).save_pretrained(folder / "model")
    assert not any("lora" in name for name in train(folder, "run", 1))


def test_a_picture_that_cannot_be_read_stops_the_run_by_name(folder):
    (folder / "3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"^3: .*could not be read"):
        train(folder, "run", 3)


def test_pictures_come_once_as_new_and_later_again_but_not_too_often():
    rounds = 2 * features.ALONE
    steps = list(features.schedule(rounds, seed=0))
    assert len(steps) == rounds + features.ALONE * (features.STEPS - 1)
    new = [index for _, is_new, indices in steps if is_new for index in indices]
    assert new == list(range(rounds * features.BATCH))
    uses = Counter(index for _, _, indices in steps for index in indices)
    assert max(uses.values()) == features.USES
    for number, is_new, indices in steps:
        assert len(set(indices)) == features.BATCH and max(indices) < (number + 1) * features.BATCH
        assert is_new or number >= features.ALONE


def test_a_run_that_was_stopped_ends_like_one_that_was_not(folder, monkeypatch):
    expected = train(folder, "whole", 3)
    encode = replay.FeatureStore.encode

    def stop(self, number, model):
        if number == 2:
            raise KeyboardInterrupt
        encode(self, number, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(replay.FeatureStore, "encode", stop)
        train(folder, "stopped", 3)
    found = train(folder, "stopped", 3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_takes_more_rounds_but_no_features_of_another_model(folder):
    train(folder, "run", 1)
    train(folder, "run", 2)
    (folder / "model").rename(folder / "other")
    with pytest.raises(ValueError, match=r"with other settings: model was '.*model' and is now '.*other'"):
        replay.train(folder / "other", [str(folder / "data.json")], folder / "run", 2, learning_rate=1e-2)
