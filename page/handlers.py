"""What happens on the page: each method is called by a button, a picture or a closed tab, with the page's request."""

import base64
import html
import json
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from ..evaluation.heatmaps import draw_edges, draw_heat, heat_maps
from ..evaluation.word_attention import view_shares
from ..processing_pheye import CAPTION_INSTRUCTION
from .visits import LONGEST_QUESTION, Answer, Looked, Visit, Visits

MOST_PICTURES = 50  # in a table
THUMBNAIL = 96  # pixels
AUTOMATIC = -1  # the budget that the model takes by itself


class Handlers:
    """Pictures come as Gradio's dicts about files (`preprocess=False`): Gradio has put them into its own folder, and
    nothing but `load_image` opens them."""

    def __init__(self, model, processor):
        self.model, self.processor, self.visits = model, processor, Visits()

    def look(self, picture: dict | None, request: gr.Request) -> Looked:
        """The visitor's picture, which is opened once, also if he asks while it is being opened."""
        if picture is None:
            raise refusal("There is no picture; drop one, take a photograph, or choose a sample.")
        visit = self.visits.of(request.session_hash)
        with visit.opening:
            if visit.looked is None or visit.looked.path != picture["path"]:
                visit.looked = open_picture(self.processor, picture["path"])
            return visit.looked

    def choose(self, picture: dict | None, request: gr.Request) -> tuple:
        """A picture of the visitor's own: kept, or refused at once; what was said of the last one goes."""
        if picture is not None:
            try:
                self.look(picture, request)
            except gr.Error as error:
                gr.Warning(error.message, duration=30)
                return None, "", "", gr.update(visible=False)
        return gr.skip(), "", "", gr.update(visible=False)

    def begin(self, request: gr.Request) -> tuple:
        self.visits.of(request.session_hash).stop.clear()
        return gr.update(visible=False), gr.update(visible=True)

    def begin_caption(self, request: gr.Request) -> tuple:
        return *self.begin(request), CAPTION_INSTRUCTION

    def end(self) -> tuple:
        return gr.update(visible=True), gr.update(visible=False)

    def stop(self, request: gr.Request):
        """End the visitor's answer; one that still waits in the queue ends when its turn comes."""
        self.visits.of(request.session_hash).stop.set()

    def close(self, request: gr.Request):
        self.visits.close(request.session_hash)

    def answer(self, picture: dict | None, question: str, vision_budget: int, request: gr.Request) -> Iterator[tuple]:
        """The answer while it is made; then what it cost, its words, and the heat maps of the first."""
        looked, visit = self.look(picture, request), self.visits.of(request.session_hash)
        hidden, nothing = gr.update(visible=False), (gr.skip(),) * 5
        yield "", "", hidden, *nothing
        for answer, text in self.answers(visit, looked, question, vision_budget):  # noqa: B007 - the last one is used
            yield text, "", gr.skip(), *nothing
        if answer.tokens == 0:
            return
        text, costs = f"{text} …" if answer.is_cut else text, cost(answer)
        yield text, costs, gr.skip(), *nothing
        visit.answered = looked, answer.words()
        words = [(word, number) for number, (word, _) in enumerate(visit.answered[1])]
        if words:
            radio = gr.update(choices=words, value=0)
            yield text, costs, gr.update(visible=True), radio, gr.update(value=0), *self.draw(0, 0, request)

    def answers(
        self, visit: Visit, looked: Looked, question: str, vision_budget: int = AUTOMATIC
    ) -> Iterator[tuple[Answer, str]]:
        """The visitor's answer, one at a time, with its text so far."""
        if not question.strip() or len(question) > LONGEST_QUESTION:
            raise refusal(f"The question has {len(question)} characters; ask with 1 to {LONGEST_QUESTION}.")
        if not visit.turn.acquire(blocking=False):
            raise refusal("Your last question is still being answered; wait, or stop it.")
        try:
            budget = None if vision_budget == AUTOMATIC else vision_budget
            answer = Answer(self.model, self.processor, looked, question, visit.stop, budget)
            yield answer, ""
            for text in answer:
                yield answer, text
        except ValueError as error:
            raise refusal(str(error)) from error
        finally:
            visit.turn.release()

    def draw(self, word: int, block: int, request: gr.Request) -> tuple:
        """Where the model looked for a word of the answer: the shares, and heat maps of the global view and of the
        crops. block: 0 for the mean of all, else its number."""
        answered = self.visits.of(request.session_hash).answered
        if answered is None:
            raise refusal("The answer is no longer held; ask again.")
        config, (looked, words) = self.model.config, answered
        text, weights = words[word]
        weights = weights[block - 1] if block else weights.mean(0)  # (N,)
        share = float(view_shares(weights, config.tokens_per_view)[0])
        whole, crops = heat_maps(weights, looked.grid, config.patches_per_side)
        crops = draw_heat(looked.shown, crops, looked.shares)
        draw_edges(ImageDraw.Draw(crops, "RGBA"), looked.grid, looked.shares, (0, 0), crops.size)
        said = f"<b>{html.escape(text)}</b>: {share:.0%} of the attention on the global view, {1 - share:.0%} on crops"
        return said, draw_heat(looked.shown, whole, looked.shares), crops

    def table(self, pictures: list[dict] | None, question: str, request: gr.Request) -> Iterator[tuple]:
        """A row for each picture, filled in one after another; then a file with a line of JSON for each."""
        if not pictures or len(pictures) > MOST_PICTURES:
            raise refusal(f"There are {len(pictures or [])} pictures; drop 1 to {MOST_PICTURES}.")
        visit = self.visits.of(request.session_hash)
        rows = [["", picture["orig_name"], "…"] for picture in pictures]
        lines = []
        for row, picture in zip(rows, pictures, strict=True):
            if visit.stop.is_set():
                break
            yield rows, gr.update(interactive=False)
            line = {"image": row[1], "prompt": question}
            try:
                looked = open_picture(self.processor, picture["path"])
                row[0] = thumbnail(looked.shown)
                for _, text in self.answers(visit, looked, question):
                    row[2] = text
                line["answer"] = text
            except gr.Error as error:
                row[2] = line["error"] = html.unescape(error.message)
            lines.append(json.dumps(line, ensure_ascii=False))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "answers.jsonl")
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            yield rows, gr.update(value=str(file), interactive=True)  # which copies the file


def refusal(message: str) -> gr.Error:
    """What the page says in a box that stays; it is HTML, and may hold what a visitor has sent."""
    return gr.Error(html.escape(message), duration=None, print_exception=False)


def open_picture(processor, path: str) -> Looked:
    try:
        return Looked(processor, path, get_upload_folder())
    except ValueError as error:
        raise refusal(str(error)) from error


def thumbnail(image: Image.Image) -> str:
    """A small copy, as HTML that holds it."""
    small, data = image.copy(), BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(data, "JPEG")
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def cost(answer: Answer) -> str:
    """What an answer has cost, as a list."""
    rows, columns = answer.looked.grid
    peak, pace = answer.peak_memory, answer.tokens_per_second
    entries = {
        "encode": "kept" if answer.encode_seconds is None else f"{answer.encode_seconds:.2f} s",
        "first token": f"{answer.first_seconds:.2f} s",
        "tokens/s": "-" if pace is None else f"{pace:.0f}",
        "tokens": str(answer.tokens),
        "peak memory": "-" if peak is None else f"{peak / 1e6:,.0f} MB",
        "crops": f"{rows} x {columns}",
    }
    if answer.vision_budget is not None:
        entries["budget"] = str(answer.vision_budget)
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries.items())
