"""The converter's command: golden cases start to end, the format's variants, what is left after a crash, the Hub."""

import errno
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast, pipeline

from pheye import convert_checkpoint as converter
from pheye.conversion import rules, writing

from conversion_fixtures import (
    CASES,
    GOLDEN,
    INDEX,
    ROOT,
    contents,
    make_tensors,
    refuse,
    run,
    small_config,
    stored,
    write,
)
from hub_server import FakeHub
from tiny import tiny_text_config, tiny_vision_config

pytestmark = pytest.mark.once

COMMANDS = {"x2-448": [str(ROOT / "convert_checkpoint.py")], "x4-672": ["-m", "pheye.convert_checkpoint"]}
CODE = {path.name for path in ROOT.glob("*_pheye.py")}


@pytest.fixture
def tensors():
    return make_tensors(small_config())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden cases through the command, one as a script and one as a module, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("converted"), {}
    for case, command in COMMANDS.items():
        done = run([*command, GOLDEN / case, case, "--verify"], cwd=folder)
        assert done.returncode == 0, done.stderr
        printed[case] = done.stdout
    return folder, printed


# --- Golden cases ---


@pytest.mark.parametrize("case", CASES)
def test_golden_case_converts_and_reproduces_the_recorded_outputs(converted, case):
    expected, told = (
        load_file(GOLDEN / case / "expected.safetensors"),
        json.loads((GOLDEN / case / "expected.json").read_text()),
    )
    model, loading = AutoModelForImageTextToText.from_pretrained(
        converted[0] / case, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(converted[0] / case, trust_remote_code=True)
    images = [Image.open(GOLDEN / case / f"image{number}.png") for number in (0, 1)]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in told["prompts"]
    ]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    pixels = inputs["pixel_values"]
    torch.testing.assert_close(pixels[..., ::16, ::16], expected["pixel_values_probe"], atol=1e-6, rtol=0)
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, expected["vision_features"], atol=2e-4, rtol=0)
    for number in (0, 1):
        ids = expected["input_ids"][number][expected["attention_mask"][number].bool()][None]
        labels = ids.clone()
        labels[:, :-6] = -100
        with torch.no_grad():
            outputs = model(ids, pixels[number : number + 1], labels=labels)
        torch.testing.assert_close(outputs.logits, expected[f"logits_{number}"], atol=2e-3, rtol=0)
        torch.testing.assert_close(outputs.loss, expected[f"loss_{number}"].squeeze(), atol=1e-4, rtol=0)
        for beams in (1, 3):
            generated = model.generate(
                input_ids=ids, pixel_values=pixels[number : number + 1], num_beams=beams, max_new_tokens=12
            )
            assert torch.equal(generated, expected[f"generated_{number}_beams{beams}"])


@pytest.mark.parametrize("case", CASES)
def test_golden_case_answers_in_a_pipeline(converted, case):
    told = json.loads((GOLDEN / case / "expected.json").read_text())
    pipe = pipeline("image-to-text", model=str(converted[0] / case), trust_remote_code=True)
    answer = pipe(str(GOLDEN / case / "image0.png"), prompt=told["prompts"][0], max_new_tokens=12)
    assert answer[0]["generated_text"] == told["texts"]["0_beams1"].lstrip()


@pytest.mark.parametrize(("case", "copies"), zip(CASES, (56 + 28, 112 + 28), strict=True))
def test_the_command_reports_what_became_of_every_tensor(converted, case, copies):
    printed = converted[1][case]
    source = torch.load(GOLDEN / case / "checkpoint.pt", weights_only=True)
    target = stored(converted[0] / case)
    counts = re.search(r"(\d+) tensors of the source: (\d+) renamed, (\d+) split, (\d+) dropped; (\d+) of", printed)
    total, renamed, split, dropped, filled = map(int, counts.groups())
    # Split are the view vectors, and keys from values twice in each of two blocks; two dropped are dead.
    assert (total, split, dropped, filled) == (len(source), 5, copies + 2, len(target))
    assert renamed == total - split - dropped == filled - 1 - 2 * 4
    lines = re.findall(r"^ *(\d+) (renamed|split|dropped) +\S+: .+", printed, re.MULTILINE)
    assert sum(int(count) for count, _ in lines) == total


@pytest.mark.parametrize("case", CASES)
def test_verify_prints_differences_no_larger_than_rounding(converted, case):
    line = re.search(
        r"Largest differences from the reference: pixels (\S+), features (\S+), logits (\S+)", converted[1][case]
    )
    pixels, features, logits = map(float, line.groups())
    assert pixels <= 1e-6
    assert features <= 2e-4
    assert logits <= 2e-3


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_complete(converted, case):
    assert {path.name for path in (converted[0] / case).iterdir()} == CODE | {
        "README.md",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model-00001-of-00001.safetensors",
        INDEX,
    }
    for name in CODE:
        assert (converted[0] / case / name).read_bytes() == (ROOT / name).read_bytes()


# --- Variants of the format ---


WIDE = tiny_text_config(hidden_size=128)
VARIANTS = {
    "no global LoRA": small_config(global_lora_rank=0),
    "reduce 2": small_config(cross_attention_reduction=2, text_config=WIDE),
    "from layer 2": small_config(cross_attention_start_layer=2),
    "nine crops, text wider than vision": small_config(tiles_per_side=3, text_config=WIDE),
    "every layer, one LoRA rank": small_config(cross_attention_interval=1, global_lora_rank=3, local_lora_rank=3),
    "vision wider than text": small_config(vision_config=tiny_vision_config(hidden_size=128, patch_size=8)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_format_agree_with_the_reference(tmp_path, capsys, name):
    config = VARIANTS[name]
    source = write(tmp_path / "source", make_tensors(config), config)
    assert converter.main([str(source), str(tmp_path / "out"), "--verify"]) == 0
    assert "Largest differences" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for field in ("cross_attention_reduction", "cross_attention_start_layer", "global_lora_rank", "local_lora_rank"):
        assert written[field] == getattr(config, field)
    assert written["global_lora_alpha"] == 2 * config.global_lora_rank
    assert written["local_lora_alpha"] == 2 * config.local_lora_rank


def test_verify_finds_a_wrong_mapping(tmp_path, tensors, capsys, monkeypatch):
    """Keys and values have one shape, so only the reference can tell that they were exchanged."""
    source = write(tmp_path / "source", tensors)
    exchanged = tuple(
        rule._replace(target=rule.target[::-1]) if "to_kv" in rule.source else rule for rule in rules.RULES
    )
    monkeypatch.setattr(rules, "RULES", exchanged)
    error = refuse(capsys, source, tmp_path / "out", "--verify")
    assert "differs from the source" in error
    assert converter.main([str(source), str(tmp_path / "out")]) == 0


def test_verify_says_which_models_it_knows(tmp_path, capsys):
    config = small_config(text_config=tiny_text_config(hidden_size=64, intermediate_size=96, qk_layernorm=True))
    source = write(tmp_path / "source", make_tensors(config), config)
    assert "knows CLIP with Phi" in refuse(capsys, source, tmp_path / "out", "--verify")
    assert converter.main([str(source), str(tmp_path / "out")]) == 0


def test_an_option_that_a_variable_left_empty_is_refused(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    for part in ("encoder", "decoder", "tokenizer"):
        assert f"The {part} is an empty text" in refuse(capsys, source, tmp_path / "out", f"--{part}", "")
    with pytest.raises(SystemExit):
        converter.main([str(source), str(tmp_path / "out"), "--push_to_hub", ""])
    assert "--push_to_hub is an empty text" in capsys.readouterr().err


# --- Whole or not at all ---


def test_an_existing_output_stays_unless_forced(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert "give --force to replace it" in refuse(capsys, source, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert converter.main([str(source), str(output), "--force"]) == 0
    assert not (output / "mine.txt").exists()
    assert stored(output)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    (tmp_path / "file").write_text("mine")
    assert "it is no folder" in refuse(capsys, source, tmp_path / "file", "--force")
    assert "holds" in refuse(capsys, source, tmp_path / "source", "--force")
    assert (source / "checkpoint.pt").exists()


def fail_late(monkeypatch, error):
    """Let the writing fail when half of the tensors are written."""
    written, write_all = [], writing.write_all

    def write_some(file, data):
        written.append(file)
        if len(written) > 80:
            raise error
        write_all(file, data)

    monkeypatch.setattr(writing, "write_all", write_some)


def test_a_full_disk_leaves_nothing_and_a_rerun_works(tmp_path, tensors, capsys, monkeypatch):
    source = write(tmp_path / "source", tensors)
    with monkeypatch.context() as patch:
        fail_late(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert "No space left on device" in refuse(capsys, source, tmp_path / "out")
    assert converter.main([str(source), str(tmp_path / "out"), "--verify"]) == 0


def test_an_error_of_another_language_is_told_in_a_line(tmp_path, tensors, capsys, monkeypatch):
    """tokenizers and safetensors raise errors of their own kinds on a full disk."""
    source = write(tmp_path / "source", tensors)

    def fail(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        error = refuse(capsys, source, tmp_path / "out")
    assert f"{tmp_path / 'out'} could not be written: No space left on device (os error 28). Mend this" in error
    assert error.count("\n") == 2


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path, tensors, capsys, monkeypatch):
    source, write_configs = write(tmp_path / "source", tensors), converter.write_configs

    def change(*args):
        write_configs(*args)
        (source / "other").write_bytes((source / "checkpoint.pt").read_bytes())
        (source / "other").rename(source / "checkpoint.pt")

    monkeypatch.setattr(converter, "write_configs", change)
    assert "was changed while it was read" in refuse(capsys, source, tmp_path / "out")


def test_a_failed_replacement_keeps_what_was_there(tmp_path, tensors, capsys, monkeypatch):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    converter.convert(str(source), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with monkeypatch.context() as patch:
        fail_late(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        refuse(capsys, source, output, "--force")
    with monkeypatch.context() as patch:
        fail_late(patch, KeyboardInterrupt())
        assert converter.main([str(source), str(output), "--force"]) == 130
        assert f"Nothing was written to {output}; the same command begins anew." in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


STOPPED_TWICE = """
import os, resource, signal, sys
from pheye import convert_checkpoint
from pheye.conversion import writing

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
print("status", convert_checkpoint.main(sys.argv[1:]), "left", os.listdir("."), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

write_all, written = writing.write_all, []
def write_some(file, data):
    written.append(file)
    if len(written) > 80:
        os.kill(os.getpid(), signal.SIGKILL)
    write_all(file, data)
writing.write_all = write_some
convert_checkpoint.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of Unix")
def test_a_run_that_the_system_stops_and_a_killed_one_leave_no_half_folder(tmp_path, tensors):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    done = run(["-c", STOPPED_TWICE, source, output], cwd=tmp_path)
    assert "status 1 left ['source']" in done.stdout, done.stderr
    assert "File too large" in done.stderr
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.glob(".out.unfinished-*/*.safetensors"))  # it was killed while it wrote

    assert converter.main([str(source), str(output), "--verify"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pheye import convert_checkpoint
from pheye.common import files

rename = files.os.rename
def rename_once(*paths):
    rename(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
files.os.rename = rename_once
convert_checkpoint.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_run_killed_between_its_last_two_renames_is_put_right(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert run(["-c", KILLED_BETWEEN_RENAMES, source, output, "--force"]).returncode == -9
    assert not output.exists()
    assert converter.main([str(source), str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert (output / "mine.txt").read_text() == "mine"


def test_what_is_called_like_a_leftover_stays(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    for name in (".out.unfinished-notes", ".out.unfinished-123", ".out.replaced", f".out.replaced-{'0' * 32}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    assert converter.main([str(source), str(output)]) == 0
    assert len(list(tmp_path.glob(".out.*/mine.txt"))) == 4
    (tmp_path / ".out.unfinished").write_text("mine")
    assert "is in the way" in refuse(capsys, source, output, "--force")
    assert (tmp_path / ".out.unfinished").read_text() == "mine"


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, tensors, capsys, monkeypatch):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    write_card = converter.write_card

    def write_card_late(*args):
        write_card(*args)
        output.mkdir()
        (output / "mine.txt").write_text("mine")

    monkeypatch.setattr(converter, "write_card", write_card_late)
    assert converter.main([str(source), str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Unix")
def test_a_second_conversion_into_the_same_output_is_refused_at_once(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    wait = "import sys; from pheye.common.files import *\n"
    wait += "with appear_whole(Path(sys.argv[1]), True): print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        for options in ([], ["--force"]):
            assert "Another process is still writing" in refuse(capsys, source, output, *options)
        other.stdin.close()
    assert other.returncode == 0
    assert list(output.iterdir()) == []  # what the other one has made


# --- What it reads is never replaced ---


def link(path, target):
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "encoder": lambda folder: folder / "source" / "encoder",
        "decoder": lambda folder: folder / "source" / "decoder",
        "above the source": lambda folder: folder,
        "a link to the source": lambda folder: link(folder / "link", "source"),
        "what holds the real checkpoint": lambda folder: folder / "real",
        "what holds the tokenizer's real file": lambda folder: folder / "elsewhere",
        "the package": lambda folder: folder / "package",
    }.items(),
)
def test_force_replaces_nothing_that_the_conversion_reads(tmp_path, tensors, capsys, monkeypatch, name, make):
    code = tmp_path / "package" / "modeling_pheye.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(converter, "code_files", lambda: [code])
    source = write(tmp_path / "source", tensors)
    for folder, file in {"real": source / "checkpoint.pt", "elsewhere": source / "decoder" / "tokenizer.json"}.items():
        (tmp_path / folder).mkdir()
        file.rename(tmp_path / folder / file.name)
        file.symlink_to(tmp_path / folder / file.name)
    output, before = make(tmp_path), contents(tmp_path)
    assert converter.main([str(source), str(output), "--force"]) == 1
    assert "which the conversion reads; choose another OUTPUT" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_output_within_the_source_may_be_replaced(tmp_path, tensors):
    source = write(tmp_path / "source", tensors)
    for options in ([], ["--force"]):
        assert converter.main([str(source), str(source / "out"), *options]) == 0
    assert stored(source / "out")


def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), link(tmp_path / "out", "out")
    assert "it is no folder" in refuse(capsys, source, output, "--force")


# --- Options ---


def test_a_relative_output_and_missing_parents_work(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors)
    monkeypatch.chdir(tmp_path)
    assert converter.main([str(source), "deep/er/out"]) == 0
    assert stored(tmp_path / "deep" / "er" / "out")


def test_without_the_package_the_script_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pheye", None)
    with pytest.raises(SystemExit, match=r"pip install \."):
        runpy.run_path(str(ROOT / "convert_checkpoint.py"))


@pytest.mark.parametrize(
    "options", [["--private"], ["--revision", "x"], ["--max_shard_size", "lots"], ["--max-shard-size", "0GB"]]
)
def test_options_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        converter.main(["source", "output", *options])
    assert re.search(r"--push_to_hub|is no size", capsys.readouterr().err)


# --- The Hub ---


FROM_HUB_TO_HUB = """
import sys, torch
from huggingface_hub import HfApi, snapshot_download
from pheye.convert_checkpoint import main
golden, api = sys.argv[1], HfApi()
api.create_repo("miguelcarv/Pheye-x2-448")
api.upload_folder(repo_id="miguelcarv/Pheye-x2-448", folder_path=golden)
api.create_repo("me/converted")
api.upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id="me/converted")
push = ["--push_to_hub", "me/converted", "--private", "--revision", "first/try"]
assert main(["miguelcarv/Pheye-x2-448", "out", *push]) == 0
assert main(["out", "again", "--push_to_hub", "me/converted"]) == 1
from transformers import AutoModelForImageTextToText, pipeline
pipe = pipeline("image-to-text", model="me/converted", revision="first/try", trust_remote_code=True)
print(pipe(golden + "/image0.png", prompt="What is written on the sign?", max_new_tokens=12))
path = snapshot_download("miguelcarv/Pheye-x2-448", allow_patterns="checkpoint.pt") + "/checkpoint.pt"
tensors = torch.load(path, weights_only=True)
tensors["lang_encoder.lm_head.bias"] += 1
torch.save(tensors, path)
assert main(["miguelcarv/Pheye-x2-448", "other"]) == 1
"""


def test_a_repo_on_the_hub_becomes_a_repo_on_the_hub(tmp_path):
    with FakeHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        done = run(["-c", FROM_HUB_TO_HUB, GOLDEN / "x2-448"], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        published = hub.repos["miguelcarv/Pheye-x2-448"]
        pushed = hub.repos["me/converted"]
        files = pushed.commits[pushed.branches["first/try"]].files
    answer = json.loads((GOLDEN / "x2-448" / "expected.json").read_text())["texts"]["0_beams1"].lstrip()
    assert repr(answer) in done.stdout
    assert set(files) == {path.name for path in (tmp_path / "out").iterdir()}  # the old weights are gone
    assert list(pushed.commits[pushed.branches["main"]].files) == ["model.safetensors"]
    assert "lacks encoder" in done.stderr  # a converted folder is no source
    assert "checkpoint.pt is not the file that the Hub holds" in done.stderr
    assert not (tmp_path / "other").exists()
    # The card tells where it came from, and how well the published model does.
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert published.branches["main"] in card.text
    assert "miguelcarv/Pheye-x2-448" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [76.0, 111.8, 47.3, 108.9]


def test_a_push_that_fails_leaves_the_folder(tmp_path, tensors, capsys, monkeypatch):
    def fail(*args):
        raise OSError("no network")

    monkeypatch.setattr(converter, "push", fail)
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    assert converter.main([str(source), str(output), "--push_to_hub", "me/x"]) == 1
    assert f"error: {output} is whole, but pushing it failed: no network\n" in capsys.readouterr().err
    assert stored(output)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "push", interrupt)
    assert converter.main([str(source), str(output), "--force", "--push_to_hub", "me/x"]) == 130
    assert f"interrupted. {output} is whole; to push it, give `hf upload me/x {output}`." in capsys.readouterr().err


def test_private_repos_are_asked_for(monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo, **kwargs):
            calls.append(("create_repo", repo, kwargs))
            return type("Url", (), {"repo_id": repo})

        def create_branch(self, repo, **kwargs):
            calls.append(("create_branch", repo, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", kwargs["repo_id"], kwargs))
            return type("Commit", (), {"commit_url": "there"})

    monkeypatch.setattr(converter, "HfApi", Api)
    converter.push(tmp_path, "me/x", private=True, revision=None)
    assert calls[0] == ("create_repo", "me/x", {"private": True, "exist_ok": True})
    assert [name for name, _, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][2]["folder_path"] == tmp_path
