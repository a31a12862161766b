"""Which model a folder or Hub id stands for, so that no run goes on with another one under the same name."""

import json
from pathlib import Path

from .command import InputError
from .files import fingerprint

FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
         "merges.txt", "added_tokens.json", "special_tokens_map.json", "*processor_config.json",
         "chat_template*")  # fmt: skip
UNFINISHED = {
    "trained.safetensors": "holds only what was trained: put it onto its base model first, by `load_trained` of "
    "pheye.training.trained",
    "run.json": "holds a training run that is not finished: give its command again",
    "adapter_config.json": "holds a PEFT adapter: load it onto its base model first, and save the whole",
}


def find_model(model: str, revision: str | None = None) -> str:
    """What tells this model from others of its name: the commit of a repository, or a fingerprint of a folder's files.

    Raises:
        InputError: if it is no Pheye, when the message says what it is instead; for a revision of a folder.
    """
    from transformers.utils import cached_file

    folder = Path(model)
    if folder.is_dir() and revision is not None:
        raise InputError(f"{model} is a folder, which has no revision {revision!r}; leave --revision out.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        held = next((what for name, what in UNFINISHED.items() if (folder / name).is_file()), "has no config.json")
        raise InputError(f"{model} {held}. Give the folder or Hub id of a whole model.")
    file = Path(cached_file(model, "config.json", revision=revision))
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (AttributeError, ValueError) as error:
        raise InputError(f"The config.json of {model} is no whole JSON object: {error}.") from error
    if kind != "pheye":
        raise InputError(f"{model} is a {kind} model; give the folder or Hub id of a Pheye.")
    if not folder.is_dir() and file.parent.parent.name == "snapshots":
        return file.parent.name
    return fingerprint(*sorted({path for pattern in FILES for path in file.parent.glob(pattern)}))
