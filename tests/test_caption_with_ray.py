"""The example that captions on a Ray cluster: on two nodes on this machine."""

import json
import sys
from pathlib import Path

import pytest

from tiny import tiny_image

pytestmark = [pytest.mark.slow, pytest.mark.once]

ray = pytest.importorskip("ray", reason="needs pip install '.[ray]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of two CPUs each, and what they must have to import the example and the package."""
    from ray.cluster_utils import Cluster

    paths = [str(EXAMPLES), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default others on this machine come first, for minutes
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 2 * 10**8})
    cluster.add_node(num_cpus=2, object_store_memory=2 * 10**8)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def rows(folder: Path) -> list[dict]:
    lines = [line for file in folder.glob("*.json*") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: row["image"])


def test_captions_are_those_of_the_library_and_errors_are_rows(cluster, model, processor, model_folder, tmp_path):
    from caption_with_ray import caption

    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    (tmp_path / "images").mkdir()
    images = [tiny_image(seed, 40 + 9 * seed, 90) for seed in range(5)]
    for seed, image in enumerate(images):
        image.save(tmp_path / "images" / f"{seed}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    caption(
        str(model_folder), str(tmp_path / "images"), str(tmp_path / "out"),
        prompt="What?", max_new_tokens=8, batch_size=2, actors=2,
    )  # fmt: skip
    *found, broken = rows(tmp_path / "out")
    assert broken["image"].endswith("broken.png") and "could not be read" in broken["error"]
    assert broken.get("caption") is None and len(found) == 5
    text = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    for row, image in zip(found, images, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert row["caption"] == processor.post_process_image_text_to_text(ids)[0].lstrip()
        assert row.get("error") is None
