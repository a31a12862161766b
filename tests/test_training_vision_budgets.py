"""Which budget a step trains, which budgets are worth having, and which a sample needs."""

import itertools
import json
import multiprocessing
import os
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pheye.training import train
from pheye.training.trainer import PheyeTrainer
from pheye.training.vision_budgets import (
    changed_config,
    drawn_budget,
    label_by_loss,
    label_by_score,
    measured_subsets,
    prepare_for_budgets,
    viable_budgets,
)

from budget_runs import BUDGETS, LAYERS, model_with_budgets, save
from tiny import tiny_config, tiny_text_config
from training_runs import command, refusal, weights, write_data

UNIVERSAL = ["--vision_budgets", "universal"]
# Four steps of two batches each; by the default seed, 42, they draw the budgets DRAWN.
STEPS = ["--max_steps", "4", "--effective_batch_size", "4", "--per_device_train_batch_size", "2"]
STEPS += ["--learning_rate", "1e-2", "--save_steps", "1", "--save_total_limit", "10"]
DRAWN = [drawn_budget(42, step, len(BUDGETS)) for step in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("base"), model_with_budgets(router_size=8))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    model = model_with_budgets(self_attention_layers=[], self_attention_budgets=[])
    return save(tmp_path_factory.mktemp("plain"), model)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 16)


# --- Drawing ---


def test_budgets_are_drawn_uniformly_and_by_the_seed():
    budgets, steps = 5, 5000
    drawn = [drawn_budget(7, step, budgets) for step in range(steps)]
    expected = steps / budgets
    chi_square = sum((count - expected) ** 2 / expected for count in Counter(drawn).values())
    assert set(drawn) == set(range(budgets))
    assert chi_square < 18.5  # 1 in 1,000 would have more, of 4 degrees of freedom
    pairs = Counter(itertools.pairwise(drawn))
    assert len(pairs) == budgets**2 and max(pairs.values()) < 2 * steps / budgets**2
    assert drawn == [drawn_budget(7, step, budgets) for step in range(steps)]
    assert drawn != [drawn_budget(8, step, budgets) for step in range(steps)]


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, bool, int | None]]:
    """Step, whether it trains, and the budget, of each batch that a loss is computed of."""
    seen, compute = [], PheyeTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.append((self.state.global_step, model.training, inputs.get("vision_budget")))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PheyeTrainer, "compute_loss", record)
    return seen


def test_all_batches_of_a_step_take_the_drawn_budget_and_a_resumed_run_draws_the_same(
    base, data, tmp_path, taken, monkeypatch
):
    assert len(set(DRAWN)) > 1
    train.run(command(base, data, tmp_path / "undisturbed", *STEPS, *UNIVERSAL))
    assert taken == [(step, True, DRAWN[step]) for step in range(4) for _ in range(2)]
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()

    taken.clear()
    arguments, step = command(base, data, tmp_path / "out", *STEPS, *UNIVERSAL), PheyeTrainer.training_step

    def die(self, *args, **kwargs):
        if len(taken) == 5:  # in the second batch of step 3
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PheyeTrainer, "training_step", die)
    with pytest.raises(RuntimeError, match="killed"):
        train.run(arguments)
    monkeypatch.setattr(PheyeTrainer, "training_step", step)
    taken.clear()
    train.run(arguments)
    assert taken == [(step, True, DRAWN[step]) for step in (2, 3) for _ in range(2)]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_evaluation_takes_the_largest_and_a_batch_without_images_what_the_step_takes(base, tmp_path, taken):
    data = write_data(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"broken")
    options = ["--per_device_train_batch_size", "1", "--effective_batch_size", "4", "--max_skipped_share", "1"]
    arguments = command(base, data, tmp_path / "out", *options, "--eval_data", str(data), "--max_steps", "1")
    train.run([*arguments, *UNIVERSAL])
    assert [budget for _, training, budget in taken if training] == DRAWN[:1] * 4
    assert {budget for _, training, budget in taken if not training} == {3}


def test_without_the_option_the_largest_budget_trains_and_the_router_does_not(base, data, tmp_path, taken):
    train.run(command(base, data, tmp_path / "out", *STEPS))
    assert {budget for *_, budget in taken} == {len(BUDGETS) - 1}
    before, after = weights(base), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    refining = {name for name in before if ".self_attention_blocks." in name and not name.endswith("to_k.bias")}
    assert refining <= changed and not [name for name in changed if ".router." in name]


def process(rank: int, port: int, folder: Path, arguments: list[str]):
    """One of two processes of a training command; writes which budgets it took."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    seen, compute = [], PheyeTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.append(inputs["vision_budget"])
        return compute(self, model, inputs, *args, **kwargs)

    PheyeTrainer.compute_loss = record
    trainer = train.run([*arguments, "--ddp_backend", "gloo"])
    assert trainer.args.world_size == 2
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_draw_the_same_and_train_as_one(base, data, tmp_path):
    sgd = ["--optim", "sgd", "--max_grad_norm", "0", *STEPS, *UNIVERSAL]
    train.run(command(base, data, tmp_path / "alone", *sgd))
    sgd[sgd.index("--per_device_train_batch_size") + 1] = "1"  # still two batches a step
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("forkserver")  # which imports once for both
    processes.set_forkserver_preload(["pheye.training.train", "datasets"])
    arguments = command(base, data, tmp_path / "spread", *sgd)
    started = [processes.Process(target=process, args=(rank, port, tmp_path, arguments)) for rank in (0, 1)]
    for one in started:
        one.start()
    for one in started:
        one.join(300)
    assert [one.exitcode for one in started] == [0, 0]
    drawn = [budget for budget in DRAWN for _ in range(2)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [drawn] * 2
    alone, spread = weights(tmp_path / "alone"), weights(tmp_path / "spread")
    for name, tensor in weights(base).items():
        torch.testing.assert_close(spread[name], alone[name], atol=1e-5, rtol=1e-4, msg=name)
        if ".self_attention_blocks." in name and not name.endswith("to_k.bias"):
            assert not torch.equal(alone[name], tensor), name


@pytest.mark.parametrize(
    ("budgets", "way", "unused"),
    [
        (BUDGETS, "universal", True),
        (BUDGETS, "largest", False),
        ([[], [3]], "largest", True),
        (None, "largest", False),
    ],
)
def test_processes_do_not_wait_for_blocks_that_a_step_may_leave_out(budgets, way, unused):
    layers = {} if budgets is None else {"self_attention_layers": LAYERS, "self_attention_budgets": budgets}
    config = tiny_config(text_config=tiny_text_config(num_hidden_layers=6), **layers)
    training = SimpleNamespace(
        ddp_find_unused_parameters=False, ddp_static_graph=None, gradient_checkpointing=False,
        gradient_checkpointing_kwargs=None,
    )  # fmt: skip
    prepare_for_budgets(config, training, way)
    assert training.ddp_find_unused_parameters is unused


# --- Layers that a plain model gets ---


def test_a_plain_model_gets_blocks_and_trains_them_at_the_largest_budget(plain, data, tmp_path, taken):
    train.run(command(plain, data, tmp_path / "out", *STEPS, "--self_attention_layers", "3", "5"))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["self_attention_layers"] == [3, 5] and saved["self_attention_budgets"] == [[], [3, 5]]
    assert {budget for *_, budget in taken} == {1}
    blocks = {name: tensor for name, tensor in weights(tmp_path / "out").items() if ".self_attention_blocks." in name}
    assert len(blocks) == 32 and all(tensor.any() for name, tensor in blocks.items() if "to_out" in name)


def test_what_a_run_with_budgets_refuses(base, plain, data, tmp_path, capsys):
    outputs = map(str, itertools.count())

    def refused(model: Path, *options: str) -> str:
        return refusal(capsys, command(model, data, tmp_path / next(outputs), *options))

    assert "self_attention_budgets are []" in refused(plain, *UNIVERSAL)
    assert "has self_attention_layers=[3, 5]; leave" in refused(base, "--self_attention_layers", "3")
    assert "some of [3, 5]" in refused(plain, "--self_attention_layers", "1")
    assert "leave out one of them" in refused(plain, "--self_attention_layers", "3", "--trained_only")
    assert "it needs --self_attention_layers" in refused(plain, "--self_attention_kind", "block")
    reentrant = ["--gradient_checkpointing", "--gradient_checkpointing_kwargs"]
    message = refused(base, *UNIVERSAL, *reentrant, '{"use_reentrant": true}')
    assert "--vision_budgets universal" in message and "'use_reentrant': True" in message
    assert "--ddp_static_graph True" in refused(base, *UNIVERSAL, "--ddp_static_graph", "true")


@pytest.mark.slow
def test_checkpointing_that_is_not_reentrant_goes_with_drawn_budgets(base, data, tmp_path):
    for name, options in {"a": [], "b": ["--gradient_checkpointing"]}.items():
        train.run(command(base, data, tmp_path / name, *STEPS, *UNIVERSAL, *options))
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


# --- Budgets that are worth having ---


def test_of_few_layers_all_subsets_are_measured():
    losses = measured_subsets([3, 5, 7], lambda subsets: {subset: len(subset) for subset in subsets})
    assert len(losses) == 8 and {(), (3, 7), (3, 5, 7)} <= losses.keys()
    assert len(measured_subsets(list(range(5)), lambda subsets: dict.fromkeys(subsets, 0.0))) == 2**5


def test_of_many_layers_the_one_that_hurts_least_is_left_out_each_time():
    worth = {1: 5.0, 2: 0.1, 3: 3.0, 4: 1.0, 5: 0.5, 6: 2.0}
    asked = []

    def measure(subsets):
        asked.extend(subsets)
        return {subset: 20 - sum(worth[layer] for layer in subset) for subset in subsets}

    losses = measured_subsets(list(worth), measure)
    assert list(losses) == [(1, 2, 3, 4, 5, 6), (1, 3, 4, 5, 6), (1, 3, 4, 6), (1, 3, 6), (1, 3), (1,), ()]
    assert all(loss == pytest.approx(20 - sum(worth[layer] for layer in subset)) for subset, loss in losses.items())
    assert len(asked) == 1 + 6 + 5 + 4 + 3 + 2 + 1


def test_viable_budgets_are_those_that_no_other_beats_in_cost_and_loss():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        subsets = [subset for size in range(4) for subset in itertools.combinations((3, 5, 7), size)]
        losses = dict(zip(subsets, torch.randint(20, (8,), generator=draw).tolist(), strict=True))
        viable = viable_budgets(losses)
        for subset in subsets:
            beaten = [
                other
                for other in subsets
                if len(other) <= len(subset)
                and losses[other] <= losses[subset]
                and (len(other), losses[other]) != (len(subset), losses[subset])
            ]
            if beaten:
                assert list(subset) not in viable
            else:  # itself, or one just as good and cheap
                assert any((len(one), losses[tuple(one)]) == (len(subset), losses[subset]) for one in viable)
        assert [len(subset) for subset in viable] == sorted({len(subset) for subset in viable})


def test_budgets_that_cannot_be_are_refused_and_nothing_else_of_a_config_changes(base):
    with pytest.raises(ValueError, match="sort them"):
        changed_config(base, self_attention_budgets=[[3], []])
    changed = json.loads(changed_config(base, self_attention_budgets=[[], [5]], router_size=0))
    before = json.loads((base / "config.json").read_text())
    assert changed == {**before, "self_attention_budgets": [[], [5]], "router_size": 0}
    assert changed_config(base) == (base / "config.json").read_bytes()


# --- Labels ---


@pytest.mark.parametrize(
    ("scores", "label"),
    [([0, 0, 0], 0), ([0, 1, 1], 1), ([1, 1, 1], 0), ([0.95, 0.99, 1], 1), ([1, 1, 0], 0), ([0, 0, 1], 2), ([0.3], 0)],
)
def test_the_label_is_the_cheapest_budget_that_is_good_enough(scores, label):
    assert label_by_score(scores) == label


@pytest.mark.parametrize(
    ("losses", "margin", "label"),
    [([2, 1, 1], 0, 1), ([2, 1.1, 1], 0.1, 1), ([2, 1.2, 1], 0.1, 2), ([1, 1, 1], 0, 0), ([0.5, 2, 1], 0, 0),
     ([float("nan")] * 2, 0, 1)],
)  # fmt: skip
def test_the_label_by_the_loss_of_the_right_answer(losses, margin, label):
    assert label_by_loss(losses, margin) == label
