"""The router: what it reads, what it learns, and that nothing else of the model changes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pheye import PheyeForConditionalGeneration
from pheye.common.command import InputError
from pheye.training.questions import read_questions
from pheye.training.router import held_out, labels_by_id, report, router_states, save_routed, train_router
from pheye.visor_pheye import PheyeRouter

from budget_runs import BUDGETS, model_with_budgets, save, write_questions
from tiny import tiny_processor

ROUTER = "pheye.router."


@pytest.fixture(scope="module")
def model() -> PheyeForConditionalGeneration:
    return model_with_budgets(router_size=16).requires_grad_(False)


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list:
    path = write_questions(tmp_path_factory.mktemp("questions") / "data", 20)
    (path.parent / "7.png").write_bytes((path.parent / "6.png").read_bytes())  # one picture under two names
    (path.parent / "3.png").write_bytes(b"broken")
    return read_questions(str(path), task="own", prompt=None, images=None)[1]


@pytest.fixture(scope="module")
def found(model, requests):
    return router_states(model, tiny_processor(), requests, batch_size=5, workers=0)


# --- What it reads ---


def test_states_are_those_that_generate_gives_the_router(model, requests, found):
    whole = [request for request in requests if not request.id.startswith("3-")]
    assert found.ids == [request.id for request in whole] and list(found.errors) == ["3-0", "3-1"]
    processor, ids = tiny_processor(), {}
    for state, request in zip(found.states, whole[:6], strict=False):
        text = processor.apply_chat_template([{"role": "user", "content": request.prompt}], add_generation_prompt=True)
        inputs = processor(images=request.image, text=text, return_tensors="pt")
        ids[request.id] = inputs["input_ids"].shape[1]
        logits = model(**inputs).router_logits[0]
        torch.testing.assert_close(model.model.router(state), logits, atol=2e-5, rtol=1e-4)
    assert len({*ids.values()}) > 1  # so that padding matters
    assert not model.model.router._forward_pre_hooks


def test_pictures_are_known_again_and_held_out_whole(found):
    by_id = dict(zip(found.ids, found.pictures, strict=True))
    assert by_id["6-0"] == by_id["6-1"] == by_id["7-0"] != by_id["5-0"]
    assert len({*found.pictures}) == 18
    tested = held_out(found.pictures, 0.25)
    kept = {picture for picture, is_tested in zip(found.pictures, tested.tolist(), strict=True) if is_tested}
    assert len(kept) == 4
    assert kept.isdisjoint(p for p, is_tested in zip(found.pictures, tested.tolist(), strict=True) if not is_tested)
    assert torch.equal(held_out(found.pictures[::-1], 0.25), tested.flip(0))
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match=rf"share of {share} of 18 pictures"):
            held_out(found.pictures, share)


# --- What it learns ---


def planted(ids: list[str]) -> torch.Tensor:
    """The kind of question decides."""
    return torch.tensor([3 if row_id.endswith("-0") else 1 for row_id in ids])


def test_a_planted_rule_is_learnt_and_nothing_else_changes(model, found):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    labels, tested = planted(found.ids), held_out(found.pictures, 0.3)
    router = model.model.router.requires_grad_(True)
    train_router(router, found.states[~tested], labels[~tested], epochs=20, learning_rate=1e-2, batch_size=8, seed=0)
    rows = [{"label": label, "scores": [0, 0.5, 0, 1]} for label in labels[tested].tolist()]
    result = report(router, found.states[tested], rows, BUDGETS)
    assert result["samples"] == 2 * 5 and result["accuracy"] >= 0.95
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(ROUTER)}
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    rows = [{"label": label, "scores": [0, 0.5, 0, 1]} for label in shuffled[tested].tolist()]
    assert report(router, found.states[tested], rows, BUDGETS)["accuracy"] < 0.95


def test_the_same_seed_learns_the_same(model, found):
    trained = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        router = PheyeRouter(model.config)
        train_router(router, found.states, planted(found.ids), epochs=2, learning_rate=1e-3, batch_size=8, seed=seed)
        trained.append(router.mlp_out.weight)
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_the_report_counts_by_hand():
    def router(states):
        return states

    states = torch.eye(3)[[0, 1, 2, 2]]
    rows = [
        {"label": label, "scores": scores}
        for label, scores in [(0, [1, 1, 1]), (2, [0, 0, 1]), (2, [0, 0, 1]), (1, [0, 1, 1])]
    ]
    result = report(router, states, rows, [[], [3], [3, 5]])
    assert result["accuracy"] == 0.5 and result["confusion"] == [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert result["ways"] == {
        "router": {"layers": 5 / 4, "scores": 0.75},
        "labels": {"layers": 5 / 4, "scores": 1.0},
        "budget 0": {"layers": 0.0, "scores": 0.25},
        "budget 1": {"layers": 1.0, "scores": 0.5},
        "budget 2": {"layers": 2.0, "scores": 1.0},
    }


def test_labels_of_other_budgets_are_refused():
    rows = [{"id": "a", "label": 0, "scores": [1, 1]}, {"id": "b", "error": "broken"}]
    assert list(labels_by_id(rows, [[], [3]])) == ["a"]
    with pytest.raises(InputError, match=r"'a' was chosen from 2 budgets, but the model has 4"):
        labels_by_id(rows, BUDGETS)
    with pytest.raises(InputError, match="holds none"):
        labels_by_id(rows[1:], BUDGETS)
    with pytest.raises(InputError, match=r"self_attention_budgets are \[\[3\]\]"):
        labels_by_id(rows, [[3]])


# --- Saving ---


@pytest.mark.parametrize("had_router", [True, False])
def test_all_other_weights_are_written_as_they_are_in_the_files(tmp_path, had_router):
    base = model_with_budgets(router_size=16 if had_router else 0)
    for name, weight in base.named_parameters():  # as after training: frozen parts in bfloat16
        if "language_model" in name:
            weight.data = weight.data.bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    tiny_processor().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base", router_size=16, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.model.router.float().parameters():
            weight.add_(torch.rand_like(weight))
    save_routed(tmp_path / "base", model, tiny_processor(), tmp_path / "out")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in before.items() if ROUTER not in name} == {
        name: tensor.dtype for name, tensor in after.items() if ROUTER not in name
    }
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    for name, tensor in after.items():
        if name.startswith(ROUTER):
            assert torch.equal(tensor, model.state_dict()[name])
        else:
            assert torch.equal(tensor, before[name]), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    assert after == {**before, "router_size": 16} and after["dtype"] == "float32"
    assert (tmp_path / "out" / "README.md").exists()
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.model.router.mlp_in.weight, model.model.router.mlp_in.weight)
    with pytest.raises(InputError, match="exists already"):
        save_routed(tmp_path / "base", model, tiny_processor(), tmp_path / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_saved_model_without_a_router_gets_one(tmp_path):
    folder = save(tmp_path / "base", model_with_budgets())
    assert PheyeForConditionalGeneration.from_pretrained(folder, router_size=4).model.router is not None
