"""Push, load, pin, fine-tune and push again, with the real Hub client against a small server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hub_server import FakeHub
from tiny import tiny_image, tiny_model

TESTS = Path(__file__).parent
REPO = "me/7b-pheye.v1.0-x"  # leading digit, dots and hyphens: none of it may be in a Python module's name
IMAGES = ("image_opening", "canvases", "image_processing", "vision", "visor")
PARTS = ("configuration", *IMAGES, "processing", "blocks", "layers", "modeling", "generation", "pipeline")
CODE = {f"{part}_pheye.py" for part in PARTS}
WEIGHTS = "model.safetensors"
OTHERS = {
    "README.md",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
PROMPT = "What colour?"
TOKENS = 8
MARK = b"\nSECOND_COMMIT = True\n"

# What every script below starts with; PROMPT, TOKENS, REPO, IMAGE and MARK are set before.
HEADER = """
import json, sys
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

def report(**values):
    print("REPORT" + json.dumps({**values, "pheye_imported": "pheye" in sys.modules}))

def inputs_for(processor):
    text = processor.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    return processor(images=Image.open(IMAGE), text=text, return_tensors="pt")

def seen(repo, **kwargs):
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **kwargs)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **kwargs)
    return model, processor, describe(model, processor, answer(repo, **kwargs))

def answer(repo, **kwargs):
    pipe = pipeline("image-to-text", model=repo, trust_remote_code=True, **kwargs)
    return pipe(IMAGE, prompt=PROMPT, max_new_tokens=TOKENS)[0]["generated_text"]

def describe(model, processor, answer=None):
    inputs = inputs_for(processor)
    return {
        "ids": model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist(),
        "logits": model(**inputs).logits[0, -1].tolist(),
        "answer": answer,
        "marked": "SECOND_COMMIT" in vars(sys.modules[type(model).__module__]),
    }
"""

PUSH = """
sys.path.insert(0, TESTS)
from tiny import tiny_model, tiny_processor

model, processor = tiny_model(), tiny_processor()
model.push_to_hub(REPO)
processor.push_to_hub(REPO)
model.push_to_hub("me/shards", max_shard_size="50KB")
model.push_to_hub("me/secret", private=True)
tiny_model(seed=1).push_to_hub("me/secret", revision="side/branch")
report()
"""

FINE_TUNE = """
model, processor, loaded = seen(REPO)
shards = AutoModelForImageTextToText.from_pretrained("me/shards", trust_remote_code=True)
shards_differ = [name for name, weight in shards.state_dict().items() if not weight.equal(model.state_dict()[name])]

inputs = inputs_for(processor)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()
model(**inputs, labels=inputs["input_ids"]).loss.backward()
optimizer.step()
model.eval()
model.push_to_hub("me/tuned.v2")
processor.push_to_hub("me/tuned.v2")
report(loaded=loaded, tuned=describe(model, processor), shards_differ=shards_differ)

# The first repo moves on, in weights and in code.
model.push_to_hub(REPO)
with open(sys.modules[type(model).__module__].__file__, "rb") as file:
    code = file.read() + MARK
HfApi().upload_file(path_or_fileobj=code, path_in_repo="modeling_pheye.py", repo_id=REPO)
"""

RELOAD = """
side = AutoModelForImageTextToText.from_pretrained("me/secret", revision="side/branch", trust_remote_code=True)
report(
    tuned=seen("me/tuned.v2")[2],
    first=seen(REPO, revision=FIRST)[2],
    main=seen(REPO)[2],
    side_sum=sum(parameter.double().sum().item() for parameter in side.parameters()),
)
"""


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Run a script as a user on a machine of their own would: fresh process, empty cache, this Hub."""

    def run(script: str, **names) -> dict:
        folder = tmp_path_factory.mktemp("machine")
        tiny_image().save(folder / "image.png")
        names = {"PROMPT": PROMPT, "TOKENS": TOKENS, "REPO": REPO, "MARK": MARK, "IMAGE": "image.png", **names}
        constants = "\n".join(f"{name} = {value!r}" for name, value in names.items())
        done = subprocess.run(
            [sys.executable, "-c", f"{constants}\n{HEADER}\n{script}"],
            env={**os.environ, **hub.environment(folder / "cache")},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("REPORT")[2].splitlines()[0])

    return run


@pytest.fixture(scope="module")
def pushed(hub, run):
    return {
        **run(PUSH, TESTS=str(TESTS)),
        "first": hub.repos[REPO].branches["main"],
        "files": set(files_in(hub, REPO)),
    }


@pytest.fixture(scope="module")
def tuned(pushed, run):
    return run(FINE_TUNE)


@pytest.fixture(scope="module")
def reloaded(pushed, tuned, run):
    return run(RELOAD, FIRST=pushed["first"])


@pytest.fixture(scope="module")
def source(model, processor):
    """What the pushed model gives in this process, without a Hub."""
    text = processor.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    return {
        "ids": ids,
        "prompt_length": inputs["input_ids"].shape[1],
        "logits": model(**inputs).logits[0, -1].tolist(),
    }


def answer_in(processor, ids: list[int], prompt_length: int) -> str:
    return processor.tokenizer.decode(ids[prompt_length:], skip_special_tokens=True).lstrip()


def files_in(hub: FakeHub, repo: str, branch: str = "main") -> dict[str, str]:
    return hub.repos[repo].commits[hub.repos[repo].branches[branch]].files


def test_a_pushed_repo_holds_weights_settings_and_all_code(pushed):
    assert pushed["files"] == {WEIGHTS} | OTHERS | CODE


def test_code_is_pushed_as_it_is_in_the_repository(hub, pushed):
    files = hub.repos[REPO].commits[pushed["first"]].files
    for name in CODE:
        assert hub.contents[files[name]] == (TESTS.parent / name).read_bytes(), name


def test_weights_go_by_lfs_and_the_rest_does_not(hub, pushed):
    files = hub.repos[REPO].commits[pushed["first"]].files
    oid = files[WEIGHTS]
    assert hashlib.sha256(hub.contents[oid]).hexdigest() == oid
    steps = [
        ("POST", f"/{REPO}.git/info/lfs/objects/batch", 200),
        ("PUT", f"/lfs/{oid}", 200),
        ("POST", f"/lfs/{oid}/verify", 200),
        ("POST", f"/api/models/{REPO}/commit/main", 200),
    ]
    positions = [hub.log.index(step) for step in steps]
    assert positions == sorted(positions)
    assert {name for name, oid in files.items() if len(oid) == 64} == {WEIGHTS}


def test_the_private_flag_reaches_the_server(hub, pushed):
    assert hub.repos["me/secret"].private
    assert not hub.repos[REPO].private
    assert urllib.request.urlopen(f"{hub.url}/{REPO}/resolve/main/config.json").status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{hub.url}/me/secret/resolve/main/config.json")


def test_a_fresh_process_loads_a_repo_by_its_own_code_and_answers_the_same(source, tuned):
    assert not tuned["pheye_imported"]
    assert tuned["loaded"]["ids"] == source["ids"]
    torch.testing.assert_close(tuned["loaded"]["logits"], source["logits"])


def test_the_pipeline_works_from_a_repo(processor, source, tuned):
    assert tuned["loaded"]["answer"] == answer_in(processor, source["ids"], source["prompt_length"])


def test_a_sharded_push_loads_to_the_same_weights(hub, tuned):
    files = files_in(hub, "me/shards")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in files
    assert tuned["shards_differ"] == []


def test_a_fine_tuned_model_pushed_from_remote_code_is_whole(hub, tuned):
    assert set(files_in(hub, "me/tuned.v2")) == {WEIGHTS} | OTHERS | CODE


def test_a_fine_tuned_model_keeps_the_names_of_its_weights(hub, pushed, tuned):
    before = hub.repos[REPO].commits[pushed["first"]].files[WEIGHTS]
    after = files_in(hub, "me/tuned.v2")[WEIGHTS]
    assert load(hub.contents[after]).keys() == load(hub.contents[before]).keys()


def test_a_fine_tuned_model_loads_again_differs_and_serves_the_pipeline(processor, source, tuned, reloaded):
    assert not reloaded["pheye_imported"]
    torch.testing.assert_close(reloaded["tuned"]["logits"], tuned["tuned"]["logits"])
    assert reloaded["tuned"]["ids"] == tuned["tuned"]["ids"]
    assert (torch.tensor(reloaded["tuned"]["logits"]) - torch.tensor(source["logits"])).abs().max() > 0.1
    assert reloaded["tuned"]["answer"] == answer_in(processor, tuned["tuned"]["ids"], source["prompt_length"])


def test_revision_pins_weights_and_code(processor, source, tuned, reloaded):
    first, main = reloaded["first"], reloaded["main"]
    assert first["ids"] == source["ids"]
    torch.testing.assert_close(first["logits"], source["logits"])
    assert first["answer"] == answer_in(processor, source["ids"], source["prompt_length"])
    assert not first["marked"]
    torch.testing.assert_close(main["logits"], tuned["tuned"]["logits"])
    assert main["marked"]


def test_a_branch_is_pushed_to_and_loaded_from(hub, reloaded):
    branches = hub.repos["me/secret"].branches
    assert set(branches) == {"main", "side/branch"}
    assert branches["main"] != branches["side/branch"]
    expected = sum(parameter.double().sum().item() for parameter in tiny_model(seed=1).parameters())
    assert reloaded["side_sum"] == pytest.approx(expected, abs=1e-9)


def test_the_server_knew_every_request(hub, reloaded):
    """So that a client that takes another way shows here, and not as a fallback that hides it."""
    assert [entry for entry in hub.log if entry[2] >= 500] == []
    assert any(entry[0] == "HEAD" for entry in hub.log)


def test_the_server_sends_a_part_of_a_file(hub, pushed):
    url = f"{hub.url}/{REPO}/resolve/main/config.json"
    whole = urllib.request.urlopen(url).read()
    part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=5-9"}))
    assert (part.status, part.read()) == (206, whole[5:10])
    rest = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=10-"}))
    assert rest.read() == whole[10:]
