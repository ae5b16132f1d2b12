"""Packaging: two import packages from one tree, megacpt and megacpt_kernels (kept in kernels/)."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"megacpt runs on Python 3.11, 3.12 or 3.13; this is {sys.version.split()[0]} ({sys.executable}). "
        "Make the virtual environment with one of those."
    )

from setuptools import find_packages, setup

with open("README.md", encoding="utf-8") as file:
    readme = file.read()

hugging_face = ["transformers>=4.51"]
topics = ["scikit-learn>=1.5"]

setup(
    name="megacpt",
    version="0.1.0",
    description="4D-parallel continual pre-training of Llama, Qwen2, Qwen3 and Mistral models, from raw text to a Hugging Face checkpoint",
    long_description=readme,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["megacpt", "megacpt.*"]), "megacpt_kernels"],
    package_dir={"megacpt_kernels": "kernels/megacpt_kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "pydantic>=2.8,<3",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "pyarrow>=17",
        "zstandard>=0.23",
        "tensorboard>=2.18",
        "rich>=13.7",
        "tomli-w>=1.0",
    ],
    extras_require={
        "hf": hugging_face,
        "dev": [
            *hugging_face,
            *topics,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "basedpyright>=1.40",  # a build of pyright whose wheel holds all of it; the package pyright downloads itself at its first run
            "matplotlib>=3.9",
            "lm-eval[hf]>=0.4.9",
            "liger-kernel>=0.8; platform_system == 'Linux'",
            "jsonschema>=4.20",
            "build>=1.2",
        ],
        "topics": topics,
        "bench": [*hugging_face, "psutil>=6", "gigatoken>=0.10", "liger-kernel>=0.8"],
        "gigatoken": ["gigatoken>=0.10"],
        "flash-attn": ["flash-attn>=2.7"],
        "fa4": ["flash-attn-4>=4.0.0b36"],
        "fa4-cu13": ["flash-attn-4[cu13]>=4.0.0b36"],
    },
    entry_points={"console_scripts": ["megacpt = megacpt.cli:main"]},
)
