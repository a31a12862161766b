"""What `save_pretrained` writes is enough to load the model anywhere, and the package stays light and stable."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors import safe_open
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import pheye
from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeModel

from tiny import tiny_config, tiny_image, tiny_model, tiny_text_config

TESTS = Path(__file__).parent
CONTRACT = TESTS / "fixtures" / "contract.json"
HUB_FILES = sorted(TESTS.parent.glob("*_pheye.py"))
ALLOWED = {"torch", "transformers", "PIL", "numpy", "safetensors"}
PROMPT, TOKENS = "What colour?", 8
LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")

# Hides packages from imports and from questions whether they are there, as if they were not installed.
HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in HIDDEN:
    try:
        __import__(name)
        raise SystemExit(f"{name} could be imported")
    except ModuleNotFoundError:
        pass
"""

LOAD = """
import json
from PIL import Image
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

classes = {}
for auto_class in (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoImageProcessor, AutoProcessor
):
    loaded = auto_class.from_pretrained("folder", **TRUST)
    classes[auto_class.__name__] = [type(loaded).__module__.rpartition(".")[2], type(loaded).__name__]

model = AutoModelForImageTextToText.from_pretrained("folder", **TRUST)
processor = AutoProcessor.from_pretrained("folder", **TRUST)
text = processor.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
inputs = processor(images=Image.open("image.png"), text=text, return_tensors="pt")
sequences = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
print(json.dumps({
    "ids": sequences[0].tolist(),
    "classes": classes,
    "nested": [type(processor.image_processor).__name__, type(model.config).__name__],
    "hidden": sorted(HIDDEN & {name.partition(".")[0] for name in sys.modules}),
}))
"""

SERVE = """
import json
import torch
from transformers.cli.serving.model_manager import ModelManager

manager = ModelManager(device="cpu", dtype="float32", trust_remote_code=TRUST)
model, processor = manager.load_model_and_processor("folder@main")
print(json.dumps([type(model).__name__, type(processor).__name__, manager.get_model_modality(model, processor).name]))
manager.shutdown()
"""

REGISTER = """
import sys, pheye
pheye.register()
pheye.register()
HIDDEN = set()
"""

OLDEST = pheye.OLDEST_TRANSFORMERS
TOO_OLD = "5.16.99"
ENTRIES = """
import importlib
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

entries = [lambda: importlib.import_module("pheye"), lambda: importlib.import_module("pheye.modeling_pheye")]
for auto_class in (AutoConfig, AutoModel, AutoImageProcessor, AutoProcessor):
    entries.append(functools.partial(auto_class.from_pretrained, "folder", trust_remote_code=True))
messages = []
for entry in entries:
    try:
        entry()
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}" if error.__context__ is None else "several errors")
print(json.dumps(messages))
"""

EXPECTED_CLASSES = {
    "AutoConfig": ["configuration_pheye", "PheyeConfig"],
    "AutoModel": ["modeling_pheye", "PheyeForConditionalGeneration"],
    "AutoModelForImageTextToText": ["modeling_pheye", "PheyeForConditionalGeneration"],
    "AutoModelForMultimodalLM": ["modeling_pheye", "PheyeForConditionalGeneration"],
    "AutoImageProcessor": ["image_processing_pheye", "PheyeImageProcessor"],
    "AutoProcessor": ["processing_pheye", "PheyeProcessor"],
}


def run(script: str, folder: Path, **names) -> dict:
    """Run `script` in a fresh process, in `folder` and with caches there; it prints JSON on its last line."""
    constants = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    done = subprocess.run(
        [sys.executable, "-c", f"{constants}\n{script}"],
        env={**os.environ, "HF_HOME": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def needed_by(names: set[str]) -> set[str]:
    """Distributions that come with `names` in an installation without extras, by their normalized names."""
    found, queue = set(), list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if name not in found:
            found.add(name)
            wanted = map(Requirement, requirements)
            queue += [item.name for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    return found


def superfluous_packages() -> set[str]:
    """Top-level names of all that is installed here and is not needed by the Hub files."""
    needed = needed_by({"torch", "transformers", "pillow", "numpy", "safetensors", "tokenizers"})
    installed = importlib.metadata.packages_distributions()
    extra = {
        package
        for package, owners in installed.items()
        if not needed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }
    return extra | {"pheye", "peft", "accelerate", "torchvision", "datasets", "skimage"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, processor):
    """A place with what `save_pretrained` writes, a picture, and nothing else."""
    folder = tmp_path_factory.mktemp("stranger")
    model.save_pretrained(folder / "folder")
    processor.save_pretrained(folder / "folder")
    tiny_image().save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def stranger(folder):
    """What a process sees in which only transformers and its dependencies are installed."""
    hidden = superfluous_packages()
    return run(HIDE + LOAD, folder, HIDDEN=hidden, PROMPT=PROMPT, TOKENS=TOKENS, TRUST={"trust_remote_code": True})


@pytest.fixture(scope="module")
def registered(folder):
    """What a process sees that calls `pheye.register()` twice and trusts nobody."""
    return run(REGISTER + LOAD, folder, PROMPT=PROMPT, TOKENS=TOKENS, TRUST={})


@pytest.fixture(scope="module")
def inputs(processor):
    text = processor.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    return processor(images=tiny_image(), text=text, return_tensors="pt")


@pytest.fixture(scope="module")
def expected_ids(model, inputs):
    return model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()


# --- Remote code ---


def test_a_saved_folder_answers_where_only_transformers_is_installed(stranger, expected_ids):
    assert stranger["ids"] == expected_ids
    assert stranger["hidden"] == []


def test_what_is_hidden_holds_everything_but_the_dependencies_of_transformers():
    hidden = superfluous_packages()
    assert {"pytest", "pheye", "peft", "accelerate"} <= hidden
    assert not hidden & {*ALLOWED, "tokenizers", "huggingface_hub", "jinja2", "yaml", "regex"}


def test_auto_classes_give_the_right_classes_from_a_folder(stranger):
    assert stranger["classes"] == EXPECTED_CLASSES
    assert stranger["nested"] == ["PheyeImageProcessor", "PheyeConfig"]


def test_registered_classes_load_a_folder_without_trust(registered, expected_ids):
    assert registered["ids"] == expected_ids
    assert registered["classes"] == EXPECTED_CLASSES
    assert registered["nested"] == ["PheyeImageProcessor", "PheyeConfig"]


def foreign_imports(source: str) -> set[str]:
    """Modules that Python code imports anywhere and a Hub file must not."""
    foreign = set()
    siblings = {path.stem for path in HUB_FILES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module not in siblings:
                foreign.add("." * node.level + (node.module or ""))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {name.partition(".")[0] for name in names}
            foreign |= tops - ALLOWED - sys.stdlib_module_names
    return foreign


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)
def test_hub_files_import_only_what_every_user_has(path):
    assert foreign_imports(path.read_text()) == set()
    # The loader reads files in its own way: docstrings too, and only one form of relative import.
    assert set(get_imports(path)) - ALLOWED - sys.stdlib_module_names == set()
    assert set(get_relative_imports(path)) <= {other.stem for other in HUB_FILES}


def test_foreign_imports_are_seen_at_any_level():
    source = "import os, peft.tuners\nfrom . import modeling_pheye\ndef f():\n    from ..evaluation import scores\n"
    assert foreign_imports(source) == {"peft", ".", "..evaluation"}
    assert len(HUB_FILES) == 12


# --- The package ---


def test_importing_the_package_imports_neither_torch_nor_transformers(tmp_path):
    script = """
import json, sys
import pheye
heavy = sorted({"torch", "transformers", "numpy", "PIL"} & set(sys.modules))
names = dir(pheye)
try:
    pheye.PheyeTypo
except AttributeError as error:
    message = str(error)
print(json.dumps({"heavy": heavy, "names": names, "message": message, "late": "torch" in sys.modules}))
"""
    seen = run(script, tmp_path)
    assert seen["heavy"] == []
    assert set(pheye.__all__) <= set(seen["names"])
    assert "PheyeTypo" in seen["message"]
    assert not seen["late"]


def test_every_public_name_is_there():
    assert all(getattr(pheye, name).__name__ == name for name in pheye.__all__)


# --- The contract ---


def plain(value):
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)


def saved_shapes(folder: Path, **kwargs) -> dict[str, list[int]]:
    """Keys and shapes of the weights that a tiny model saves."""
    tiny_model(**kwargs).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {key: weights.get_slice(key).get_shape() for key in sorted(weights.keys())}


def weight_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def contract(folder: Path) -> dict:
    """What users and published weights rely on.

    To change it on purpose, write the fixture anew by `PHEYE_WRITE_CONTRACT=1 pytest tests/test_remote_code.py` and
    say in the changelog what breaks.
    """
    weights = saved_shapes(folder / "full")
    config = json.loads((folder / "full" / "config.json").read_text())
    without_global = saved_shapes(folder / "no-global", global_lora_rank=0)
    return {
        "public_names": sorted(pheye.__all__),
        "model_type": config["model_type"],
        "architectures": config["architectures"],
        "auto_map": config["auto_map"],
        "custom_pipelines": config["custom_pipelines"],
        "config_fields": {name: plain(getattr(PheyeConfig, name)) for name in PheyeConfig.__annotations__},
        "variants": {
            variant: {
                name: getattr(PheyeConfig.from_variant(variant), name)
                for name in (
                    "tiles_per_side",
                    "cross_attention_interval",
                    "tokens_per_image",
                    "cross_attention_layers",
                )
            }
            for variant in ("x4-448", "x4-672", "x2-448", "x2-672")
        },
        "weights": weights,
        "weights_without_global_lora": without_global,
    }


def test_names_fields_and_weight_keys_keep_their_contract(tmp_path):
    current = json.loads(json.dumps(contract(tmp_path)))
    if os.environ.get("PHEYE_WRITE_CONTRACT"):
        CONTRACT.write_text(json.dumps(current, indent=1) + "\n")
    promised = json.loads(CONTRACT.read_text())
    assert current.keys() == promised.keys()
    for part in promised:
        assert current[part] == promised[part], part


def test_weights_are_saved_under_the_names_that_the_model_shows(model, model_folder):
    assert weight_names(model_folder) == set(model.state_dict())


# --- Saving and loading ---


def loaded_whole(model_class, folder: Path, **kwargs):
    """A model of which every key was found and used."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    faults = {name: info[name] for name in LOADING_FAULTS if info.get(name)}
    assert faults == {}
    return model


def save(model, folder: Path, sharded: bool) -> Path:
    model.save_pretrained(folder, **({"max_shard_size": "50KB"} if sharded else {}))
    assert (len(list(folder.glob("*.safetensors"))) > 2) == sharded
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_saved_weights_give_the_same_logits(tmp_path, model, inputs, sharded):
    loaded = loaded_whole(PheyeForConditionalGeneration, save(model, tmp_path, sharded))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_weights_keep_their_names_when_a_loaded_model_is_saved_again(tmp_path, model_folder):
    """As every fine-tuned model is. Releases that rename keys while loading may rename them back while saving."""
    loaded_whole(PheyeForConditionalGeneration, model_folder).save_pretrained(tmp_path / "again")
    loaded_whole(PheyeModel, model_folder).save_pretrained(tmp_path / "base")
    names = weight_names(model_folder)
    assert weight_names(tmp_path / "again") == names
    assert weight_names(tmp_path / "base") == {name.removeprefix("pheye.") for name in names}


def test_the_base_model_loads_from_the_same_folder(model, model_folder, inputs):
    base = loaded_whole(PheyeModel, model_folder)
    expected = model.model(**inputs).last_hidden_state
    assert torch.equal(base(**inputs).last_hidden_state, expected)


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written to holds NaN, or the largest integer, in place of what luck left there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_in_a_loaded_model_is_left_uninitialized(poisoned_memory, model, model_folder, inputs):
    """Buffers that are not saved are made anew; where that is forgotten, models talk fluent nonsense."""
    loaded = loaded_whole(PheyeForConditionalGeneration, model_folder)
    buffers = dict(model.named_buffers())
    unsaved = buffers.keys() - model.state_dict().keys()
    assert len(unsaved) >= 2  # the rotary frequencies and the vision tower's positions
    assert dict(loaded.named_buffers()).keys() == buffers.keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("model_class", [PheyeModel, PheyeForConditionalGeneration])
def test_a_model_is_built_on_the_meta_device(model_class):
    """Loaders build models without memory first, so no constructor may read a value."""
    with torch.device("meta"):
        model = model_class(tiny_config())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert hasattr(model, "all_tied_weights_keys")


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_language_model_keeps_its_head_tied_or_untied(tmp_path, inputs, tied, sharded):
    config = tiny_config(text_config=tiny_text_config(tie_word_embeddings=tied))
    model = tiny_model(config)
    loaded = loaded_whole(PheyeForConditionalGeneration, save(model, tmp_path, sharded))
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embeddings) == tied
    assert len(model.all_tied_weights_keys) == int(tied)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_missing_weight_is_reported(tmp_path, model):
    """The tests above trust `output_loading_info`; here it has something to say."""
    name = "pheye.cross_attention_blocks.1.to_q.weight"
    state = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(AssertionError, match=re.escape(name)):
        loaded_whole(PheyeForConditionalGeneration, tmp_path)


@pytest.mark.once
def test_transformers_that_are_too_old_are_refused_in_one_sentence_wherever_one_comes_in(model_folder, tmp_path):
    (tmp_path / "folder").symlink_to(model_folder)
    metadata = tmp_path / f"transformers-{TOO_OLD}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {TOO_OLD}\n")
    # Found before the metadata of what is installed.
    messages = run(
        f"import functools, json, sys\nsys.path.insert(0, FOLDER)\n{ENTRIES}", tmp_path, FOLDER=str(tmp_path)
    )
    assert len(messages) == 6
    for message in messages:
        assert re.match(rf"ImportError: .*transformers>={OLDEST}.*transformers=={TOO_OLD}", message)


def test_the_oldest_release_is_the_same_for_pip_and_in_all_files():
    root = TESTS.parent
    requirement = re.search(r'"(transformers.*)"', (root / "setup.py").read_text()).group(1)
    found = re.findall(r'"transformers(>=[\d.]+)"', "".join(file.read_text() for file in HUB_FILES))
    assert len(found) == 2
    assert {f"transformers{bound},<6" for bound in found} == {requirement} == {f"transformers>={OLDEST},<6"}
    pinned = re.search(r"^transformers==(.+)$", (root / "constraints-oldest.txt").read_text(), re.MULTILINE).group(1)
    assert pinned == OLDEST


@pytest.mark.parametrize("trust", [True, False])
def test_transformers_serve_loads_the_folder(folder, trust):
    """Unmodified: it takes classes from a list of names, to which the configuration adds. Without trust, where the
    package makes its classes known."""
    loaded = run(SERVE if trust else REGISTER + SERVE, folder, TRUST=trust)
    assert loaded == ["PheyeForConditionalGeneration", "PheyeProcessor", "MULTIMODAL"]
