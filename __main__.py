"""The command `pheye`: a subcommand per command of the package, imported only when it is asked for."""

import importlib
import sys

from . import __version__

COMMANDS = {
    "ask": ("answering.ask", "ask a question about an image"),
    "caption": ("answering.caption", "caption images: files, folders, lists or a data set"),
    "serve": ("serving.serve", "answer programs by the protocol of OpenAI, many at once"),
    "train": ("training.train", "train a model: the paper's stages, or fine-tuning on your own data"),
    "budgets": ("training.budgets", "find budgets of a model, label questions with them, train its router"),
    "evaluate": ("evaluation.evaluate", "score a model on a benchmark"),
    "app": ("app", "open a page in the browser: a picture, a question, an answer, and where the model looked"),
    "attention": ("evaluation.attention", "draw where a model looks while it answers"),
    "detail": ("evaluation.detail", "compare two scores by the size of what the questions ask for"),
    "convert": ("convert_checkpoint", "turn a published checkpoint into a folder that transformers loads"),
}
HELP = "\n".join(
    [
        "usage: pheye COMMAND [OPTIONS]",
        "",
        *(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()),
        "",
        "pheye COMMAND --help lists the options of a command; pheye --version prints the version.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: There is no command {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f".{COMMANDS[name][0]}", __package__).main(options)
    except KeyboardInterrupt:  # while modules are imported, before the command itself answers to it
        print("\ninterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
