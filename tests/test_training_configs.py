"""The files of `training/configs`, read and checked as `accelerate launch --config_file` does before anything starts.

DeepSpeed itself is not installed for the tests: what accelerate makes of the files is checked, not what it does then.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.training import train

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training" / "configs"
CLUSTER = ["--num_machines", "4", "--num_processes", "32", "--main_process_ip", "10.0.0.1", "--machine_rank", "3"]


def validated(name: str, *options: str):
    """The arguments and environment with which `accelerate launch` would start its processes."""
    command = ["--config_file", str(CONFIGS / name), *options, "-m", "pheye.training.train", "--model", "x"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


def test_all_files_are_tested():
    assert {path.name for path in CONFIGS.iterdir()} == {"ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"}


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_launch_takes_the_file_for_one_machine_and_for_four(name):
    args, environment = validated(name)
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2.yaml", name.startswith("zero"))
    assert args.multi_gpu == (name == "ddp.yaml")
    assert args.nproc_per_node == "8" and args.num_machines == 1
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    args, _ = validated(name, *CLUSTER)
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "4", 3)
    assert args.rdzv_endpoint.startswith("10.0.0.1:")


def test_no_key_of_a_plugin_is_unknown_to_launch():
    # launch sets whatever it reads there as an argument, so that a mistyped key would do nothing.
    known = vars(launch_command_parser().parse_args(["script"]))
    for path in CONFIGS.iterdir():
        for section in ("fsdp_config", "deepspeed_config"):
            assert set(yaml.safe_load(path.read_text()).get(section, {})) <= set(known), path.name


def test_fsdp_wraps_classes_that_the_published_models_have():
    with patch_environment(**validated("fsdp2.yaml")[1]):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(PheyeConfig.from_variant("x4-672"))
    plugin.set_auto_wrap_policy(model)  # raises for a class that the model lacks
    count = dict.fromkeys(plugin.transformer_cls_names_to_wrap, 0)
    for module in model.modules():
        if type(module).__name__ in count:
            count[type(module).__name__] += 1
    assert count == {"CLIPEncoderLayer": 32, "PhiDecoderLayer": 24, "PheyeCrossAttentionBlock": 6}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_its_stage_and_leaves_the_rest_to_the_trainer(stage):
    with patch_environment(**validated(f"zero{stage}.yaml")[1]):
        plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)  # without it, nothing whole can be saved
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert plugin.deepspeed_config[name] == "auto", name
    assert not plugin.zero3_init_flag


def documented_commands() -> list[str]:
    """Those that train, in the documents that say how."""
    text = "".join((ROOT / name).read_text() for name in ("docs/training.md", "nano/README.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line for line in lines if "pheye train " in line or "pheye.training.train" in line]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("$RANK", "1").replace("$MAIN", "10.0.0.1"))
    if words[:2] == ["accelerate", "launch"]:
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        assert args.module and args.config_file
        assert args.training_script == "pheye.training.train"
        options = args.training_script_args
    else:
        assert words[:2] == ["pheye", "train"]
        options = words[2:]
    assert train.parse([*options, "--use_cpu", "true"])  # raises for an option that there is not


def test_documentation_has_a_command_for_each_number_of_machines():
    commands = documented_commands()
    assert any("--num_machines 4 --num_processes 32" in command for command in commands)
    assert any(command.startswith("accelerate") and "--num_machines" not in command for command in commands)
