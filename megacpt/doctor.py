"""What this machine has: versions, devices, attention backends, NCCL, disk. For people, and for a first look at a node."""

import importlib.metadata
import platform
import shutil

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "pyarrow",
    "zstandard",
    "tensorboard",
    "rich",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "gigatoken",
    "liger-kernel",
    "lm_eval",
)


def report() -> list[str]:
    """Lines to print."""
    import torch
    import torch.distributed as dist
    from megacpt_kernels.attention import available_backends, resolve_backend

    import megacpt

    lines = [f"megacpt {megacpt.__version__}, Python {platform.python_version()}, {platform.platform()}", "packages:"]
    for name in _PACKAGES:
        try:
            lines.append(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name}: not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.append(f"devices: {torch.cuda.device_count()} CUDA, {torch.get_num_threads()} CPU threads")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        lines.append(f"  {i}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}")
    lines.append(f"attention on {device} (auto in bfloat16: {resolve_backend('auto', device, torch.bfloat16)}):")
    lines += [f"  {name}: {reason or 'available'}" for name, reason in available_backends(device).items()]
    nccl = (
        ".".join(map(str, torch.cuda.nccl.version()))
        if dist.is_nccl_available() and device == "cuda"
        else "not available"
    )
    lines.append(f"NCCL {nccl}; gloo {'available' if dist.is_gloo_available() else 'not available'}")
    lines.append(f"disk here: {shutil.disk_usage('.').free / 1e9:.0f} GB free")
    return lines
