"""What stands where on the page, and which handler each part calls."""

import gradio as gr
from gradio import processing_utils

from ..configuration_pheye import PheyeConfig
from ..image_opening_pheye import MOST_BYTES
from ..processing_pheye import CAPTION_INSTRUCTION
from . import samples
from .handlers import AUTOMATIC, Handlers

NANO = "pheye-nano"
ABOUT_NANO = """\
It is **very small**, and trained on drawn pictures only. It **reads signs** with up to 9 capitals or digits in plain
fonts, and knows **circles, squares, triangles and stars** in eight colours. It **cannot** read lower-case letters,
or say what is on a photograph, and it knows nothing of the world: it answers any other question with something of the
above. About one sign in twenty it gets wrong by a letter or more."""
ABOUT_OTHERS = "Its answers may be wrong. It sees one picture and one question at a time, and was trained in English."
QUESTIONS = "What is written on the sign?", "How many circles are there?", "What colour is the triangle?"
TOGETHER = 2  # answers at once, and pictures that are opened
MOST_WAITING = 32
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
MAP_BUTTONS = ["fullscreen", "download"]
CSS = """
.cost dl { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0; }
.cost dt { font-size: .75rem; opacity: .8; }
.cost dd { margin: 0; font-variant-numeric: tabular-nums; }
#words input { position: absolute; opacity: 0; }  /* the keyboard still reaches it */
#words .wrap { gap: .3rem; }
#words label { padding: .2rem .5rem; }
#words label span { margin: 0; }
#words label.selected { background: var(--button-primary-background-fill); color: var(--button-primary-text-color); }
#words label:focus-within { outline: 2px solid currentColor; }
"""


def build(model, processor, name: str) -> gr.Blocks:
    """The page about a model of this name; `launch` serves it."""
    processing_utils.async_ssrf_protected_get = refuse_url  # Gradio fetches what a visitor gives as a file's address
    handlers, is_nano = Handlers(model, processor), name == NANO
    with gr.Blocks(title=f"Pheye: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {'Pheye-nano' if is_nano else name}\n{ABOUT_NANO if is_nano else ABOUT_OTHERS}")
        with gr.Tab("One picture"):
            one_picture(page, handlers, QUESTIONS if is_nano else ())
        with gr.Tab("Several pictures"):
            several_pictures(handlers, QUESTIONS[0] if is_nano else CAPTION_INSTRUCTION)
        page.unload(handlers.close)
    return page.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=None)


def launch(page: gr.Blocks, **options):
    """Serve the page; `options` go to Gradio's `launch`."""
    page.launch(
        theme=gr.themes.Default(**FONTS),
        css=CSS,
        footer_links=[],
        max_file_size=MOST_BYTES,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        **options,
    )


async def refuse_url(url: str):
    raise gr.Error("A picture is taken as a file, not as an address.", print_exception=False)


def one_picture(page: gr.Blocks, handlers: Handlers, questions: tuple[str, ...]):
    with gr.Row():
        with gr.Column(scale=5):
            picture = gr.Image(
                label="Picture: drop, paste or photograph",
                sources=["upload", "webcam", "clipboard"],
                format="png",
                height=420,
                elem_id="picture",
            )
            with gr.Row():
                drawings = {
                    gr.Button("New sign", size="sm", min_width=70): samples.sign,
                    gr.Button("New page", size="sm", min_width=70): samples.page,
                    gr.Button("A photograph", size="sm", min_width=70): samples.photograph,
                }
        with gr.Column(scale=4):
            question = gr.Textbox(label="Question", value=(*questions, "")[0], elem_id="question")
            with gr.Row(visible=bool(questions)):
                for text in questions:
                    button = gr.Button(text, size="sm", min_width=70)
                    button.click(lambda text=text: text, None, question, show_progress="hidden")
            budget = budget_choice(handlers.model.config)
            with gr.Row():
                ask, caption = gr.Button("Ask", variant="primary", min_width=120), gr.Button("Caption", min_width=120)
                stop = gr.Button("Stop", variant="stop", visible=False, min_width=120)
            reply = gr.Textbox(label="Answer", lines=3, interactive=False, buttons=["copy"], elem_id="answer")
            cost = gr.HTML(html_template="<dl>${value}</dl>", elem_classes="cost", elem_id="cost")
    where, drawn = where_it_looked(handlers)
    fresh = [picture, reply, cost, where]
    page.load(lambda: first(samples.sign), None, fresh, show_progress="hidden")
    for button, draw in drawings.items():
        button.click(lambda draw=draw: first(draw), None, fresh, show_progress="hidden")
    picture.input(
        handlers.choose,
        picture,
        fresh,
        preprocess=False,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=TOGETHER,
    )
    buttons = [ask, stop]
    asked = gr.on([ask.click, question.submit], handlers.begin, None, buttons, queue=False)
    captioned = caption.click(handlers.begin_caption, None, [*buttons, question], queue=False)
    for begun in (asked, captioned):
        answer_with(
            handlers, handlers.answer, begun, [picture, question, budget], [reply, cost, where, *drawn], buttons
        )


def budget_choice(config: PheyeConfig) -> gr.Radio:
    """How closely to read the picture; hidden where the model has no budgets."""
    budgets = config.self_attention_budgets
    by_itself = "chosen by the router" if config.router_size else "the largest"
    choices = [(by_itself, AUTOMATIC)] + [(f"{len(budget)} layers", number) for number, budget in enumerate(budgets)]
    return gr.Radio(choices, value=AUTOMATIC, label="How closely it reads", visible=bool(budgets), elem_id="budget")


def where_it_looked(handlers: Handlers) -> tuple[gr.Column, list]:
    """The column, hidden at first; the words, the block, and what is drawn for both."""
    with gr.Column(visible=False, elem_id="where") as where:
        words = gr.Radio([], label="Where it looked: choose a word of the answer", elem_id="words")
        share = gr.HTML(elem_id="share")
        blocks = len(handlers.model.config.cross_attention_layers)
        block = gr.Slider(0, blocks, 0, step=1, label="Block (0: mean of all)", elem_id="block")
        with gr.Row():
            whole = gr.Image(label="Global view", interactive=False, elem_id="global", buttons=MAP_BUTTONS)
            crops = gr.Image(label="Crops", interactive=False, elem_id="crops", buttons=MAP_BUTTONS)
    gr.on(
        [words.input, block.input],
        handlers.draw,
        [words, block],
        [share, whole, crops],
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return where, [words, block, share, whole, crops]


def first(draw) -> tuple:
    """A drawn picture, and nothing said of it yet."""
    return draw(), "", "", gr.update(visible=False)


def several_pictures(handlers: Handlers, asked: str):
    files = gr.File(label="Pictures: drop a handful", file_count="multiple", file_types=["image"], elem_id="pictures")
    question = gr.Textbox(label="Question about each", value=asked)
    with gr.Row():
        ask = gr.Button("Ask about all", variant="primary", min_width=120)
        stop = gr.Button("Stop", variant="stop", visible=False, min_width=120)
        download = gr.DownloadButton("Download as JSON lines", interactive=False)
    rows = gr.Dataframe(
        headers=["", "picture", "answer"],
        datatype=["html", "str", "str"],
        column_widths=["110px", "30%", "60%"],
        wrap=True,
        interactive=False,
        elem_id="table",
    )
    asked = gr.on([ask.click, question.submit], handlers.begin, None, [ask, stop], queue=False)
    answer_with(handlers, handlers.table, asked, [files, question], [rows, download], [ask, stop])


def answer_with(handlers: Handlers, handler, begun, inputs: list, outputs: list, buttons: list):
    """Let `handler` answer once its button's event has `begun`; `buttons`: to ask, and to stop, of which one shows."""
    answered = begun.then(
        handler,
        inputs,
        outputs,
        preprocess=False,
        concurrency_limit=TOGETHER,
        concurrency_id="model",
        show_progress_on=outputs[0],
    )
    answered.then(handlers.end, None, buttons, queue=False)
    buttons[1].click(handlers.stop, queue=False)
