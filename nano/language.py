"""Stage 0 for the words: a byte-level BPE tokenizer and a small language model, trained on the texts it needs.

    python -m pheye.nano.language --output FOLDER [--steps 6000]

The texts are Pheye's prompts with answers about pictures that nobody drew. Most of them give the answer away in the
instruction, for the model to copy letter by letter or to find among what it is told: if it cannot do so when it is
told, it will not when it is shown. The others it can only guess, within the answers that there are. First come short
texts, one question about one shape that is told, then about two, and so on: from whole conversations alone the model
did not learn to look for the kind that is asked. Words of the prompts are one token each; signs, all capitals and
digits, are written letter by letter.
"""

import argparse
import functools
import itertools
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import PhiForCausalLM, PreTrainedTokenizerFast

from ..common.command import Parser, at_least, default_device, exit_status
from ..image_processing_pheye import PheyeImageProcessor
from ..processing_pheye import PheyeProcessor
from ..training.collator import encode
from .learning.checkpoints import claim, load_checkpoint, log, save_checkpoint
from .learning.configs import language_config
from .learning.muon import optimizers_for, set_learning_rates
from .learning.texts import MOST_SHAPES, conversation, learn, lesson, padded

VOCABULARY = 1024  # at most; the texts have fewer words
TOKENIZER_TEXTS = 5000
LETTER_OF_SIGN = r"[A-Z0-9](?![a-z])"  # never joined with what stands beside it
END = "<|endoftext|>"
BATCH, WARMUP = 16, 50
SORTED = 4  # steps whose texts are sorted by length
LESSON = 100  # steps of short texts about up to one shape; then as many about up to two, and so on to MOST_SHAPES
SAVE_EVERY = 250
LOG_EVERY = 50


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    rng = random.Random(f"tokenizer {seed}")
    backend = Tokenizer(models.BPE())
    letters = pre_tokenizers.Split(Regex(LETTER_OF_SIGN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([letters, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    template = PheyeProcessor(PheyeImageProcessor(), tokenizer).apply_chat_template
    backend.train_from_iterator((template(conversation(rng)) for _ in range(TOKENIZER_TEXTS)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


@functools.lru_cache(maxsize=1)
def sorted_rows(processor: PheyeProcessor, seed: int, group: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the texts of SORTED steps, sorted by length, which saves a seventh of the tokens."""
    rng = random.Random(f"texts {seed} {group}")
    rows = (encode(processor, conversation(rng)) for _ in range(SORTED * BATCH))
    return sorted(rows, key=lambda row: len(row[0]))


def batch_of(processor: PheyeProcessor, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, T) of a step's texts, padded on the right; only answers are learnt.

    B is BATCH, and SORTED times as many while they are short.
    """
    most_shapes = step // LESSON + 1
    if most_shapes <= MOST_SHAPES:
        rng = random.Random(f"lesson {seed} {step}")
        rows = [encode(processor, lesson(rng, most_shapes)) for _ in range(SORTED * BATCH)]
    else:
        rows = sorted_rows(processor, seed, step // SORTED)[step % SORTED * BATCH :][:BATCH]
    return padded(rows, processor.tokenizer.pad_token_id)


class Groups(Dataset):
    """The texts of SORTED steps at a time, so that a process which makes them sorts them once."""

    def __init__(self, processor: PheyeProcessor, seed: int):
        self.processor, self.seed = processor, seed

    def __getitem__(self, group: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [batch_of(self.processor, self.seed, group * SORTED + number) for number in range(SORTED)]


def batches(processor: PheyeProcessor, seed: int, steps: range, workers: int) -> Iterator[tuple]:
    """What `batch_of` gives for `steps`, made by `workers` other processes while the model trains."""
    groups = range(steps.start // SORTED, math.ceil(steps.stop / SORTED))
    loader = DataLoader(Groups(processor, seed), batch_size=None, sampler=groups, num_workers=workers)
    made = itertools.chain.from_iterable(loader)
    return itertools.islice(made, steps.start % SORTED, steps.start % SORTED + len(steps))


def train(output: Path, steps: int, seed: int = 0, workers: int = 0, device: str = "cpu"):
    """Train for `steps` steps, go on from the last checkpoint if there is one, and save model and tokenizer."""
    claim(output, seed=seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    processor = PheyeProcessor(PheyeImageProcessor(), tokenizer)
    model = PhiForCausalLM(language_config(len(tokenizer))).train().to(device)
    optimizers = optimizers_for(model, model.model.layers, 3e-3, 1.5e-3)
    losses = []
    order = range(load_checkpoint(output, model, optimizers), steps)
    for step, tensors in zip(order, batches(processor, seed, order, workers), strict=True):
        set_learning_rates(optimizers, min(1.0, (step + 1) / WARMUP) * (1 - step / steps))
        losses.append(learn(model, optimizers, *(tensor.to(device) for tensor in tensors)))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            log(output, {"step": step + 1, "loss": round(sum(losses) / len(losses), 4)})
            losses = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_checkpoint(output, model, optimizers, step + 1)
    model.eval().save_pretrained(output / "language")
    tokenizer.save_pretrained(output / "language")


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.language", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--steps", type=at_least(0), default=6000, help=f"the first {LESSON * MOST_SHAPES} are of short texts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=at_least(0), default=1, help="processes that make the texts")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
