"""A new, untrained Pheye from a pretrained vision transformer and a pretrained language model, saved ready to train.

    python examples/new_model.py --vision FOLDER_OR_ID --language_model FOLDER_OR_ID --output FOLDER
                                 [--tiles_per_side 3] [--interval 4] [--initializer_range 0.01] [--no_lora]
                                 [--high_res FOLDER_OR_ID]

What trains is what the paper trains: the cross-attention blocks, both LoRA sets and the encoding of the views. With
`--high_res`, a backbone such as ConvNeXt, so do the fusion blocks of its high-resolution branch.
"""

import argparse

from transformers import AutoTokenizer

# Not from transformers itself, where older releases hide it unless torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pheye import PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from pheye.common.command import Parser


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True)
    parser.add_argument("--language_model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tiles_per_side", type=int, default=3)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--initializer_range", type=float, default=0.01, help="of the blocks; narrow models need more")
    parser.add_argument("--no_lora", action="store_true", help="leave the vision transformer as it is")
    parser.add_argument("--high_res", help="a backbone with stages, for a high-resolution branch")
    arguments = parser.parse_args()

    model = PheyeForConditionalGeneration.from_pretrained_parts(
        arguments.vision,
        arguments.language_model,
        high_res=arguments.high_res,
        tiles_per_side=arguments.tiles_per_side,
        cross_attention_interval=arguments.interval,
        initializer_range=arguments.initializer_range,
        **({"global_lora_rank": 0, "local_lora_rank": 0} if arguments.no_lora else {}),
    )
    pretrained = ("vision_tower", "language_model", "high_res_tower")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in pretrained))

    # Pixels as the vision transformer and the backbone know them.
    preprocessor = AutoImageProcessor.from_pretrained(arguments.vision)
    size = model.config.vision_config.image_size
    image_processor = PheyeImageProcessor(
        tiles_per_side=arguments.tiles_per_side,
        size={"height": size, "width": size},
        image_mean=preprocessor.image_mean,
        image_std=preprocessor.image_std,
    )
    if arguments.high_res:
        preprocessor = AutoImageProcessor.from_pretrained(arguments.high_res)
        image_processor.high_res_tile_size = model.config.high_res_tile_size
        image_processor.high_res_image_mean = preprocessor.image_mean
        image_processor.high_res_image_std = preprocessor.image_std
    processor = PheyeProcessor(image_processor, AutoTokenizer.from_pretrained(arguments.language_model))

    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{arguments.output}: {model.num_parameters():,} parameters, of which {trained:,} train")


if __name__ == "__main__":
    main()
