"""The example that captions on a Ray cluster: on two nodes on this machine."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import tiny_image

pytestmark = [pytest.mark.slow, pytest.mark.once]

ray = pytest.importorskip("ray", reason="needs pip install '.[ray]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two CPUs each, and what they must have to import the example and the package."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join([str(EXAMPLES), *filter(None, sys.path)]))
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # by default others on this machine come first, for minutes
        patch.syspath_prepend(str(EXAMPLES))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 2 * 10**8})
        cluster.add_node(num_cpus=2, object_store_memory=2 * 10**8)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def rows(folder: Path) -> list[dict]:
    lines = [line for file in folder.glob("*.json*") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: row["image"])


def write_parquet(images: Path, folder: Path, is_struct: bool):
    """The files of a folder as a column of a Parquet file, as they are, or as `datasets` writes images."""
    cells = [path.read_bytes() for path in sorted(images.iterdir())]
    cells = [{"bytes": cell, "path": None} for cell in cells] if is_struct else cells
    folder.mkdir()
    pq.write_table(pa.table({"number": list(range(len(cells))), "photo": cells}), folder / "part-0.parquet")


@pytest.mark.parametrize("source", ["files", "bytes of a column", "images of a column"])
def test_captions_are_those_of_the_library_and_errors_are_rows(
    cluster, model, processor, model_folder, tmp_path, source
):
    from caption_with_ray import caption

    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    folder, options = tmp_path / "images", {"actors": 2}
    folder.mkdir()
    images = [tiny_image(seed, 40 + 9 * seed, 90) for seed in range(5)]
    for seed, image in enumerate(images):
        image.save(folder / f"{seed}.png")
    (folder / "broken.png").write_bytes(b"no image")
    if source != "files":
        write_parquet(folder, tmp_path / "table", is_struct=source.startswith("images"))
        folder, options = tmp_path / "table", {"column": "photo"}
    caption(
        str(model_folder), str(folder), str(tmp_path / "out"),
        prompt="What?", max_new_tokens=8, batch_size=2, **options,
    )  # fmt: skip
    text = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    expected = []
    for image in images:
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.post_process_image_text_to_text(ids)[0].lstrip())
    found = rows(tmp_path / "out")
    [broken] = [row for row in found if row.get("error") is not None]
    assert "could not be read" in broken["error"] and broken.get("caption") is None
    assert sorted(row["caption"] for row in found if row is not broken) == sorted(expected)
    if source == "files":
        assert broken["image"].endswith("broken.png")
        assert [row["caption"] for row in found if row is not broken] == expected
    else:
        assert all(row["image"].endswith("part-0.parquet") for row in found)
