"""The page in a real browser, with Pheye-nano: what a visitor sees, and what the server holds for him.

Chromium is the system's (Debian: `apt-get install chromium`); Gradio and Playwright come by tests/test_app.py.
"""

import itertools
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed here; tests/test_app.py runs these tests where it is.")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed here; see tests/test_app.py."
)
import httpx  # noqa: E402 - Gradio brings it

from pheye import PheyeForConditionalGeneration, PheyeImageToTextPipeline, PheyeProcessor  # noqa: E402
from pheye.page import layout, visits  # noqa: E402
from pheye.page.handlers import Handlers  # noqa: E402
from pheye.processing_pheye import CAPTION_INSTRUCTION  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PATIENCE = 30_000  # milliseconds, on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.skipif(CHROMIUM is None, reason="There is no Chromium; apt-get install chromium."),
]


class Served:
    """A page that is served, with the images that its model has encoded, and a brake: seconds before each token."""

    def __init__(self):
        folder = ROOT / "checkpoints" / "pheye-nano"
        self.model = PheyeForConditionalGeneration.from_pretrained(folder)
        self.processor = PheyeProcessor.from_pretrained(folder)
        self.encoded, self.brake, self.generating = 0, 0.0, 0
        encode = self.model.get_image_features

        def counted(**inputs):
            self.encoded += 1
            return encode(**inputs)

        self.model.get_image_features = counted

    def answer(self, image: Image.Image, prompt: str = CAPTION_INSTRUCTION) -> str:
        pipe = PheyeImageToTextPipeline(model=self.model, processor=self.processor)
        return pipe(image, prompt=prompt)[0]["generated_text"]


@pytest.fixture(scope="module")
def served():
    served, made = Served(), []
    with pytest.MonkeyPatch.context() as patch:
        pace = visits.Pace.__call__

        def slowly(self, *args, **kwargs):
            time.sleep(served.brake)
            return pace(self, *args, **kwargs)

        patch.setattr(visits.Pace, "__call__", slowly)
        patch.setattr(layout, "Handlers", lambda *args: made.append(Handlers(*args)) or made[0])
        page = layout.build(served.model, served.processor, "pheye-nano")
        served.visits = made[0].visits.open
        layout.launch(page, prevent_thread_lock=True, quiet=True)
        served.url = page.local_url
        yield served
        page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(served, browser):
    """Opens the page as a new visitor; what it loads comes from the server alone."""
    served.brake, contexts, strange = 0.0, [], set()

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()
        page.on(
            "request",
            lambda request: request.url.startswith((served.url, "data:", "blob:")) or strange.add(request.url),
        )
        page.goto(served.url)
        page.wait_for_selector("#picture img")
        return page

    yield open_page
    served.brake = 0.0
    for context in contexts:
        context.close()
    assert not strange


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files by name: two signs, and three that no page can use."""
    folder = tmp_path_factory.mktemp("pictures")
    sign = Image.open(ROOT / "docs" / "sign.jpg").convert("RGB")
    sign.save(folder / "sign.png")
    sign.transpose(Image.Transpose.ROTATE_180).crop((0, 0, sign.width, sign.height // 2)).save(folder / "turned.png")
    (folder / "broken.png").write_bytes((folder / "sign.png").read_bytes()[:3000])
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    (folder / "heavy.png").write_bytes(bytes(65 * 2**20))
    return folder


def give(page, file: Path):
    """A picture in place of the one that is there; the page has it when its preview has."""
    if page.get_by_label("Remove Image").count():
        page.get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(file)


def give_whole(page, file: Path):
    give(page, file)
    page.wait_for_selector(f"#picture img[src*='{file.name}']")


def said(page) -> str:
    return page.locator("#answer textarea").input_value()


def until(check, seconds: float = PATIENCE / 1000):
    """Wait until `check` gives something true, and give it."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "nothing came of it in time"
        time.sleep(0.02)
    return found


def ask(page, question: str | None = None):
    """Ask, and wait until all has been said."""
    if question is None:
        page.get_by_role("button", name="Caption").click()
    else:
        page.get_by_label("Question", exact=True).fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
    finished(page)


def finished(page):
    page.get_by_role("button", name="Stop").wait_for(state="visible")
    page.get_by_role("button", name="Ask", exact=True).wait_for(state="visible")


def source(page, name: str) -> str:
    return page.locator(f"#{name} img").get_attribute("src")


def test_upload_ask_watch_click_and_ask_again(served, visit, pictures):
    page, before = visit(), served.encoded
    give_whole(page, pictures / "sign.png")
    served.brake, seen = 0.03, [""]
    page.get_by_role("button", name="Caption").click()

    def finished():
        if said(page) != seen[-1]:
            seen.append(said(page))
        return page.locator("#crops img").count()

    until(finished)
    expected = served.answer(Image.open(pictures / "sign.png"))
    assert seen[-1] == expected and len(seen) > 5, seen
    assert all(after.startswith(text) for text, after in itertools.pairwise(seen)), seen
    assert "HOTEL" in expected

    words = page.locator("#words label")
    assert words.all_inner_texts() == expected.split()
    sources = {name: source(page, name) for name in ("global", "crops")}
    shares = page.locator("#share").inner_text()
    words.filter(has_text="HOTEL").click()
    until(lambda: all(source(page, name) != old for name, old in sources.items()))
    until(lambda: page.locator("#share").inner_text() != shares)
    sources = {name: source(page, name) for name in ("global", "crops")}
    page.locator("#block input[type=number]").fill("2")
    page.locator("#block input[type=number]").blur()
    until(lambda: all(source(page, name) != old for name, old in sources.items()))

    served.brake = 0
    assert "kept" not in page.locator("#cost").inner_text()
    count = served.encoded
    ask(page, "How many triangles are there?")
    assert said(page) == served.answer(Image.open(pictures / "sign.png"), "How many triangles are there?")
    assert "kept" in page.locator("#cost").inner_text()
    assert (count - before, served.encoded - count) == (1, 0)  # the pipeline encodes inside of `generate`
    time.sleep(1)  # for what the new words and the block that goes back to 0 may set off
    assert page.locator(".toast-body").all_inner_texts() == []


def test_two_visitors_get_their_own_answers_and_a_third_waits_in_a_queue_that_he_sees(served, visit, pictures):
    pages = [visit() for _ in range(3)]
    names = "sign.png", "turned.png", "sign.png"
    for page, name in zip(pages, names, strict=True):
        give_whole(page, pictures / name)
    served.brake = 0.1
    for page in pages[:2]:
        page.get_by_role("button", name="Caption").click()
    until(lambda: all(map(said, pages[:2])))  # both at once, and neither has ended
    assert all(page.get_by_role("button", name="Stop").is_visible() for page in pages[:2])
    pages[2].get_by_role("button", name="Caption").click()
    pages[2].get_by_text("queue: 1/1").wait_for()
    served.brake = 0
    expected = [served.answer(Image.open(pictures / name)) for name in names]
    assert expected[0] != expected[1]
    for page, text in zip(pages, expected, strict=True):
        page.wait_for_selector("#crops img")
        assert said(page) == text


def test_stop_ends_an_answer_and_a_closed_tab_ends_it_too_and_frees_what_it_held(served, visit, pictures):
    page = visit()
    give_whole(page, pictures / "sign.png")
    served.brake = 0.2
    page.get_by_role("button", name="Caption").click()
    until(lambda: len(said(page).split()) > 2)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#crops img")
    stopped = said(page)
    page.get_by_role("button", name="Caption").click()
    until(lambda: said(page) not in ("", stopped))
    [held] = [one for one in served.visits.values() if one.turn.locked()]
    page.close()
    until(lambda: held not in served.visits.values(), 5)
    until(lambda: not held.turn.locked(), 1)  # a whole answer would take longer
    served.brake = 0
    whole = served.answer(Image.open(pictures / "sign.png"))
    assert whole.startswith(stopped) and whole != stopped


def test_pictures_that_cannot_be_used_are_refused_with_the_reason(visit, pictures):
    page = visit()
    for name, message in (
        ("broken.png", "The picture could not be read as an image"),
        ("huge.png", "The picture is too large: it may have up to 178 million pixels. Make it smaller."),
        ("heavy.png", "exceed the maximum allowed size of 64.0 Mb"),
    ):
        give(page, pictures / name)
        page.locator(".toast-body", has_text=message).wait_for()
    assert "/" not in "".join(page.locator(".toast-body").all_inner_texts())  # no path of the server's
    give_whole(page, pictures / "sign.png")
    ask(page, "What is written on the sign?")
    assert said(page) == "HOTEL"


def test_on_a_phone_everything_has_room(served, visit):
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.get_by_role("button", name="New page").tap()
    ask(page)
    page.wait_for_selector("#crops img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for part in ("#picture", "#question", "#answer", "#words", "#share", "#block", "#global", "#crops"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["width"] > 250, (part, box)
    assert brightness(page) > 200


def brightness(page) -> float:
    """Of what lies behind everything, from 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")  # rgb(1, 2, 3)
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_keyboard_alone_in_the_dark(served, visit):
    page = visit(color_scheme="dark")
    assert brightness(page) < 50
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#crops img")
    page.get_by_label("Question", exact=True).focus()
    tab_to(page, "document.activeElement.innerText == 'Caption'")
    page.keyboard.press("Enter")
    until(lambda: page.locator("#words label").count() > 3)
    before = source(page, "crops")
    tab_to(page, "document.activeElement.type == 'radio' && document.activeElement.value == '2'")
    page.keyboard.press("Space")
    until(lambda: source(page, "crops") != before)
    before = source(page, "crops")
    tab_to(page, "document.activeElement.type == 'range'")
    page.keyboard.press("ArrowRight")
    until(lambda: source(page, "crops") != before)


def tab_to(page, is_there: str):
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(is_there):
            return
    raise AssertionError(f"60 tabs lead to no element with {is_there}")


def test_a_photograph_is_taken(served, visit):
    page = visit()
    page.get_by_label("Remove Image").click()
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#picture video').readyState > 2")
    page.get_by_label("capture photo").click()
    page.wait_for_selector("#picture img")
    ask(page)
    assert said(page)


COPY = """async (bytes) => {
    const image = new Blob([new Uint8Array(bytes)], {type: "image/png"});
    await navigator.clipboard.write([new ClipboardItem({"image/png": image})]);
}"""


def test_a_picture_is_pasted(served, visit, pictures):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Remove Image").click()
    page.evaluate(COPY, list((pictures / "turned.png").read_bytes()))
    page.get_by_label("Paste from clipboard").click()
    page.wait_for_selector("#picture img")
    ask(page)
    assert said(page) == served.answer(Image.open(pictures / "turned.png"))


def test_a_table_fills_and_can_be_downloaded(served, visit, pictures):
    page = visit()
    page.get_by_role("tab", name="Several pictures").click()
    names = ["sign.png", "broken.png", "turned.png"]
    page.locator("#pictures input[type=file]").set_input_files([pictures / name for name in names])
    page.locator("#pictures").get_by_text("turned").wait_for()
    page.get_by_label("Question about each").fill("Is there a star?")
    served.brake = 0.3
    page.get_by_role("button", name="Ask about all").click()
    until(lambda: page.locator("#table").inner_text().count("…") == 1)  # the last is waited for, the others are there
    served.brake = 0
    page.get_by_role("button", name="Ask about all").wait_for(state="visible")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as JSON lines").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [(row["image"], row["prompt"]) for row in rows] == [(name, "Is there a star?") for name in names]
    assert rows[1]["error"].startswith("The picture could not be read") and "answer" not in rows[1]
    for row in rows[::2]:
        assert row["answer"] == served.answer(Image.open(pictures / row["image"]), "Is there a star?")
        assert row["answer"] in page.locator("#table").inner_text()


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/x.png", "https://example.com/x.png", "/etc/passwd", ROOT / "docs/sign.jpg"]
)
def test_no_path_and_no_address_of_a_visitor_is_opened(served, monkeypatch, path):
    """By the protocol itself, past the browser."""
    opened = []
    monkeypatch.setattr(visits, "load_image", lambda *args, **kwargs: opened.append(args))
    monkeypatch.setattr("gradio.processing_utils.sh.get", lambda *args, **kwargs: opened.append(args))
    call = f"{served.url}gradio_api/call/answer"
    picture = {"path": str(path), "url": str(path), "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(call, json={"data": [picture, "What?"]}).json()["event_id"]
    assert httpx.get(f"{call}/{event}").text.startswith("event: error")
    assert not opened


def test_few_pictures_are_opened_at_once_as_few_answers_are_made(served):
    page = layout.build(served.model, served.processor, "pheye-nano")
    limits = {function.name: function.concurrency_limit for function in page.fns.values()}
    assert limits["choose"] == limits["answer"] == limits["table"] == layout.TOGETHER
