"""The repository root is the package `pheye`, and the set of files that a Hub model repo carries."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

TRAIN = ["accelerate>=1.1", "datasets>=3.0", "matplotlib>=3.8", "tensorboard>=2.14"]
EVAL = ["accelerate>=1.1", "datasets>=3.0", "matplotlib>=3.8", "sacrebleu>=2.3", "tqdm>=4.66"]
SERVE = ["starlette>=0.46", "uvicorn>=0.34"]
RAY = ["ray[data]>=2.40"]
TEST = [
    *RAY,
    "accelerate>=1.1",
    'atheris>=3.0; sys_platform == "linux" and platform_machine == "x86_64"',
    "datasets>=3.0",
    "fastapi>=0.115",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "openai>=2.0",
    "parameterized>=0.9",
    "pdoc>=15",
    "pycocoevalcap>=1.2",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff==0.17.6",
    "torchao>=0.16",
    "trl>=1.15",
]
DEMO = ["scikit-image>=0.22"]
# In an environment of its own until a Gradio takes pillow 13: docs/app.md.
APP = [*DEMO, "gradio>=6.31"]
# In an environment of its own: docs/evaluation.md. lmms-eval 0.7.3 imports a module that filelock 4.3 lacks.
LMMS = ["lmms-eval>=0.7", "filelock<4.3"]
NANO = [
    *DEMO,
    "font-amatic-sc",
    "font-caladea",
    "font-fredoka-one",
    "font-hanken-grotesk",
    "font-intuitive",
    "font-lato",
    "font-manrope",
    "font-roboto",
    "font-source-sans-pro",
    "font-source-serif-pro",
    "matplotlib>=3.8",
    "pyspellchecker>=0.8",
]


class BuildModules(build_py):
    """All modules of the root but this one."""

    def find_package_modules(self, package, package_dir):
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    name="pheye",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text()).group(1),
    description="Pheye: efficient high-resolution vision-language models as a Hugging Face Transformers plugin",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    cmdclass={"build_py": BuildModules},
    package_dir={"pheye": "."},
    packages=[
        "pheye",
        "pheye.answering",
        "pheye.benchmarks",
        "pheye.common",
        "pheye.conversion",
        "pheye.evaluation",
        "pheye.evaluation.metrics",
        "pheye.nano",
        "pheye.nano.comparing",
        "pheye.nano.drawing",
        "pheye.nano.learning",
        "pheye.nano.scoring",
        "pheye.page",
        "pheye.serving",
        "pheye.training",
    ],
    install_requires=[
        "huggingface_hub>=1.5",
        "peft>=0.18",
        "pillow>=10.3",
        "safetensors>=0.5",
        "torch>=2.6",
        "transformers>=5.17.0,<6",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "app": APP,
        "demo": DEMO,
        "lmms": LMMS,
        "nano": NANO,
        "ray": RAY,
        "serve": SERVE,
        "test": sorted({*TEST, *TRAIN, *EVAL, *NANO, *SERVE}),
    },
    package_data={"pheye": ["py.typed"]},
    entry_points={
        "console_scripts": ["pheye = pheye.__main__:main"],
        "lmms_eval.models": ["pheye = pheye.evaluation.lmms:manifest"],
    },
)
