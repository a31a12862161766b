"""Fine-tune a Pheye with TRL's SFTTrainer on conversations about one image each; only the answers are learnt.

    python examples/train_with_trl.py --model FOLDER_OR_ID --data FILE.jsonl --output FOLDER [--image_folder FOLDER]
                                      [--epochs 1] [--batch_size 4] [--learning_rate 5e-5]

Each line of the data has one image and any number of turns:

    {"images": ["cat.jpg"], "messages": [{"role": "user", "content": "What is it?"},
                                         {"role": "assistant", "content": "A cat."}]}

What trains is what the paper trains, and the output is a whole model folder. TRL's loss on the answers only needs
transformers 5.18 for data with images.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.common.command import Parser
from pheye.training.trained import choose_trained, describe_trained


def read_data(path: str, image_folder: str) -> Dataset:
    """The columns that TRL takes: `images`, which may be opened images or, as here, paths, and `messages`."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        row["images"] = [str(Path(image_folder) / name) for name in row["images"]]
    return Dataset.from_list(rows)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--image_folder", default=".")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    arguments = parser.parse_args()

    model = PheyeForConditionalGeneration.from_pretrained(arguments.model)
    choose_trained(model)
    print(describe_trained(model))
    dataset = read_data(arguments.data, arguments.image_folder)
    trainer = SFTTrainer(
        model=model,
        processing_class=PheyeProcessor.from_pretrained(arguments.model),
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=arguments.output,
            assistant_only_loss=True,
            bf16=is_torch_bf16_gpu_available(),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()  # the processor too

    model = PheyeForConditionalGeneration.from_pretrained(arguments.output).eval()
    processor = PheyeProcessor.from_pretrained(arguments.output)
    for row in dataset.select(range(min(2, len(dataset)))):
        turns = [message["role"] for message in row["messages"]].index("assistant")
        prompt = processor.apply_chat_template(row["messages"][:turns], add_generation_prompt=True)
        inputs = processor(images=row["images"][0], text=prompt, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=32)
        (answer,) = processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])
        print(f"{row['images'][0]}: {row['messages'][turns - 1]['content']}\n  answer: {answer.strip()!r}")


if __name__ == "__main__":
    main()
