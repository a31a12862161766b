"""The folder of a run: who may write there, what is left in it, and what reaches the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training import train
from pheye.training.trained import load_trained
from pheye.training.trainer import PheyeTrainer

from hub_server import FakeHub
from tiny import tiny_image, tiny_model
from training_runs import command, refusal, run_alone, save_base, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), lora_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 samples with answers of unequal length."""
    return write_data(tmp_path_factory.mktemp("data"), 16)


# --- Whose it is ---


def test_an_output_folder_that_holds_something_else_is_refused(base, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and holds no run.*another --output"):
        train.run(command(base, data, tmp_path))


@pytest.mark.parametrize(
    "change", [["--learning_rate", "1e-3"], ["--seed", "1"], ["--freeze", "global_lora"], ["--prompt", "Why?"]]
)
def test_going_on_with_other_settings_is_refused(base, data, tmp_path, change):
    arguments = command(base, data, tmp_path / "out", "--effective_batch_size", "4", "--max_steps", "1")
    train.run(arguments)
    with pytest.raises(ValueError, match=rf"other settings: (\w+, )*{change[0][2:]}\b"):
        train.run([*arguments, *change])
    assert train.run([*arguments, "--logging_steps", "3"]) is None  # does not matter to the result


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha"),
        (["--dataloader_drop_last", "True"], "dataloader_drop_last"),
    ],
)
def test_options_that_no_list_names_bind_a_run_too(base, data, tmp_path, options, changed, capsys):
    arguments = command(base, data, tmp_path / "out", "--effective_batch_size", "4", "--max_steps", "1")
    train.run(arguments)
    assert f"other settings: {changed} was" in refusal(capsys, [*arguments, *options])


def begun(base: Path, folder: Path, *options: str) -> tuple[list[str], Path]:
    """The command and the data of a run that has ended after its first checkpoint of two."""
    data, output = write_data(folder, 8), folder / "out"
    arguments = command(base, data, output, "--effective_batch_size", "4", "--save_steps", "1", *options)
    train.run(arguments)
    for path in (*output.glob("*.safetensors"), output / "config.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoint-2")
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "finished": False}))
    return arguments, data


CHANGES = {
    "answers": lambda text: text.replace("yes", "maybe"),
    "order": lambda text: json.dumps(json.loads(text)[::-1]),
    "fewer rows": lambda text: json.dumps(json.loads(text)[:4]),
    "more rows": lambda text: json.dumps(json.loads(text) * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_data(base, tmp_path, change, capsys):
    arguments, data = begun(base, tmp_path)
    text = data.read_text()
    data.write_text(CHANGES[change](text))
    message = refusal(capsys, arguments)
    assert "other settings: files of data was" in message and "remove" in message
    data.write_text(text)
    assert train.run(arguments).state.global_step == 2


def test_a_run_does_not_go_on_with_other_images_but_broken_ones_may_be_mended(base, tmp_path, capsys):
    data = write_data(tmp_path, 8)
    (tmp_path / "3.png").write_bytes(b"broken")
    arguments = command(base, data, tmp_path / "out", "--effective_batch_size", "4", "--max_steps", "1")
    train.run(arguments)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(record["images"]) == 7
    (tmp_path / "out" / "config.json").unlink()
    tiny_image(3).save(tmp_path / "3.png")
    kept = (tmp_path / "5.png").read_bytes()
    tiny_image(9).save(tmp_path / "5.png")
    assert f"The image {tmp_path / '5.png'} has changed" in refusal(capsys, arguments)
    (tmp_path / "5.png").unlink()
    assert f"The image {tmp_path / '5.png'} has changed" in refusal(capsys, arguments)
    (tmp_path / "5.png").write_bytes(kept)
    assert train.main(arguments) == 0


def test_a_run_does_not_go_on_from_another_base(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    (tmp_path / "set").mkdir()
    arguments, _ = begun(base, tmp_path / "set")
    tiny_model(seed=7).save_pretrained(base)
    assert "other settings: files of the model was" in refusal(capsys, arguments)


HOLDS = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"


def test_only_one_process_writes_to_an_output(base, data, tmp_path, monkeypatch, capsys):
    output, step = tmp_path / "out", PheyeTrainer.training_step
    output.mkdir()
    arguments = command(base, data, output, "--effective_batch_size", "4", "--max_steps", "1")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, output / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    assert f"Another process is still writing {output}" in refusal(capsys, arguments)
    other.communicate("\n")

    def held(self, *args, **kwargs):  # while a run trains, no other process gets the lock
        command = [sys.executable, "-c", HOLDS.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB"), output / "run.lock"]
        assert subprocess.run(command, input="\n", capture_output=True, text=True).returncode == 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PheyeTrainer, "training_step", held)
    train.run(arguments)
    assert (output / "config.json").is_file()


def test_a_folder_that_a_killed_run_has_locked_only_is_free(base, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").touch()
    train.run(command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"settings": []}', '{"settings": 5}', "null", '{"finished": true}'])
def test_a_record_that_is_none_is_named(base, data, tmp_path, text, capsys):
    (tmp_path / "run.json").write_text(text)
    message = refusal(capsys, command(base, data, tmp_path))
    assert "run.json is not a record" in message or "other settings" in message


def test_a_record_that_says_finished_without_a_model_is_not_believed(base, data, tmp_path):
    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    train.run(arguments)
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    train.run(arguments)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("is_link", [False, True])
def test_what_stands_in_the_place_of_unfinished_files_is_not_mixed_into_the_model(base, data, tmp_path, is_link):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    arguments = command(base, data, output, "--max_steps", "1", "--effective_batch_size", "4", "--save_strategy", "no")
    train.run(arguments)
    (output / "config.json").unlink()
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    if is_link:
        (output / "unfinished").symlink_to(elsewhere)
    else:
        (output / "unfinished").write_text("a file")
    train.run(arguments)
    assert not (output / "mine").exists() and not (output / "unfinished").exists()
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_a_finished_run_is_left_as_it_is(base, data, tmp_path, capsys):
    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    train.run(arguments)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train.run(arguments) is None
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_is_pushed_by_the_same_command(base, data, tmp_path, monkeypatch):
    def offline(*args):
        raise OSError("There is no network.")

    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    arguments += ["--push_to_hub", "--hub_model_id", "me/tuned"]
    monkeypatch.setattr(train, "open_repo", lambda output, name, private, token: name)
    monkeypatch.setattr(train, "push", offline)
    assert train.main(arguments) == 1
    pushed = []
    monkeypatch.setattr(train, "push", lambda *args: pushed.append(args))
    assert train.main(arguments) == 0
    assert pushed == [(tmp_path / "out", "me/tuned", None)]


# --- What is left in it ---


@pytest.mark.parametrize("lora", [False, True])
def test_trained_weights_alone_go_onto_the_base_model(base, data, tmp_path, lora):
    options = ["--max_steps", "2", "--effective_batch_size", "4", "--learning_rate", "1e-2"]
    options += ["--language_model_lora"] if lora else []
    train.run(command(base, data, tmp_path / "whole", *options))
    train.run(command(base, data, tmp_path / "alone", *options, "--trained_only"))
    assert not (tmp_path / "alone" / "model.safetensors").exists()
    whole = PheyeForConditionalGeneration.from_pretrained(tmp_path / "whole")
    loaded = load_trained(PheyeForConditionalGeneration.from_pretrained(base), tmp_path / "alone")
    processor, expected = (PheyeProcessor.from_pretrained(tmp_path / name) for name in ("alone", "whole"))
    inputs = {"images": tiny_image(), "text": "What is it?", "return_tensors": "pt"}
    for name, tensor in processor(**inputs).items():
        assert torch.equal(tensor, expected(**inputs)[name])
    changed = 0
    for (name, a), (_, b), c in zip(
        whole.named_parameters(), loaded.named_parameters(), tiny_model(lora_dropout=0.1).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
        changed += not torch.equal(a, c)
    in_language_model = 24 if lora else 0
    assert changed == in_language_model + sum(
        "language" not in n and "tower" not in n for n, _ in whole.named_parameters()
    )


# --- The Hub ---


PUSH = """
import sys
from pheye.training import train
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture
assert train.main(sys.argv[1:]) == 0
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/tuned", trust_remote_code=True)
AutoProcessor.from_pretrained("me/tuned", trust_remote_code=True)
print("loaded", sum(p.double().sum().item() for p in model.parameters()))
"""


def test_the_finished_model_is_pushed_and_loads_from_the_hub(base, data, tmp_path):
    script, output = tmp_path / "push.py", tmp_path / "out"
    script.write_text(PUSH)
    options = ["--max_steps", "1", "--effective_batch_size", "4", "--push_to_hub", "--hub_model_id", "me/tuned"]
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "cache")
        result = run_alone([str(script), *command(base, data, output, *options)], **environment)
        files = hub.repos["me/tuned"].commits[hub.repos["me/tuned"].branches["main"]].files
    assert {"model.safetensors", "config.json", "README.md", "training.png", "modeling_pheye.py"} <= set(files)
    assert not any(name.startswith(("checkpoint", "run", "skipped", "unfinished")) for name in files)
    model = PheyeForConditionalGeneration.from_pretrained(output)
    assert f"loaded {sum(p.double().sum().item() for p in model.parameters())}" in result.stdout
